"""The head as arithmetic is the model's own head, and what is not of that form is left alone."""

import pytest
import torch
from torch import nn

from pocl.models.heads import apply_head, without_layers
from pocl.models.output_head import head_of
from tests.pocl.tiny_models import CONFIGS, tiny


@pytest.mark.parametrize("name", CONFIGS)
def test_it_gives_the_models_logits(name: str) -> None:
    model = tiny(name)
    head = head_of(model)
    assert head is not None
    hidden = torch.randn(5, head.weight.shape[1], generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(head.logits(hidden), apply_head(model, hidden), rtol=1e-5, atol=1e-5)


def test_it_holds_the_parameters_themselves() -> None:
    model = tiny("qwen2")
    head = head_of(model)
    assert head is not None
    assert head.weight is model.get_input_embeddings().weight


def test_a_head_with_a_bias_has_it() -> None:
    model = tiny("llama")
    model.lm_head.bias = nn.Parameter(torch.linspace(-3, 3, model.lm_head.weight.shape[0]))
    head = head_of(model)
    assert head is not None
    assert head.bias is model.lm_head.bias


def test_a_head_that_does_more_is_left_alone() -> None:
    model = tiny("llama")
    model.lm_head.register_forward_hook(lambda _module, _args, logits: logits.clamp(-0.1, 0.1))
    assert head_of(model) is None


@pytest.mark.parametrize("name", CONFIGS)
def test_without_layers_the_head_is_the_same(name: str) -> None:
    model = tiny(name)
    headed = without_layers(model)
    head = head_of(headed)
    assert head is not None
    hidden = torch.randn(5, head.weight.shape[1], generator=torch.Generator().manual_seed(0))
    assert torch.equal(apply_head(headed, hidden), apply_head(model, hidden))
    assert len(list(headed.parameters())) < len(list(model.parameters()))
