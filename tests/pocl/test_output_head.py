"""A head read off its model gives the model's own logits and gradients, or is not read at all."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from pocl.errors import ModelUnsupported
from pocl.models.heads import apply_head, response_hidden_states, response_logits, without_layers
from pocl.models.output_head import Head, extract_head
from tests.pocl.test_heads import batch
from tests.pocl.tiny_models import CONFIGS, VOCABULARY, tiny


def require_head(model: PreTrainedModel) -> Head:
    head = extract_head(model)
    assert head is not None
    return head


@pytest.mark.parametrize("name", CONFIGS)
def test_extracted_head_gives_the_logits_of_the_model(name: str) -> None:
    model, rows = tiny(name), batch()
    logits = require_head(model).logits(response_hidden_states(model, *rows))
    torch.testing.assert_close(logits, response_logits(model, *rows), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_through_the_extracted_head_reach_the_model(name: str) -> None:
    gradients = []
    for through_head in (True, False):
        model, rows = tiny(name), batch()
        hidden = response_hidden_states(model, *rows)
        logits = require_head(model).logits(hidden) if through_head else apply_head(model, hidden)
        (logits * torch.linspace(-1, 1, VOCABULARY)).sum().backward()
        gradients.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[1].items():
        size = gradient.abs().max().item()
        torch.testing.assert_close(gradients[0][key], gradient, rtol=0, atol=1e-5 * size)


@pytest.mark.parametrize("name", CONFIGS)
def test_extracted_head_shares_the_parameters_of_the_model(name: str) -> None:
    model = tiny(name)
    head = require_head(model)
    assert any(head.weight is parameter for parameter in model.parameters())
    # Of a narrower head, the width is its own.
    assert head.weight.shape == (VOCABULARY, 16 if name == "opt-350m" else 32)


@pytest.mark.parametrize(
    ("name", "scale", "softcap"),
    [("gemma2", 1.0, 2.0), ("cohere", 0.25, None), ("granite", 1 / 3, None), ("gpt2", 1.0, None)],
)
def test_scale_and_softcap_are_those_of_the_config(name: str, scale: float, softcap: float | None) -> None:
    head = require_head(tiny(name))
    assert head.scale == pytest.approx(scale)
    assert head.softcap == softcap


@pytest.mark.parametrize("name", CONFIGS)
def test_half_precision_heads_are_extracted(name: str) -> None:
    assert extract_head(tiny(name).bfloat16()) is not None


def test_extracted_head_has_the_bias() -> None:
    model = tiny("llama")
    with_bias = nn.Linear(32, VOCABULARY)
    model.set_output_embeddings(with_bias)
    hidden = torch.randn(4, 32)
    head = require_head(model)
    assert head.bias is with_bias.bias
    torch.testing.assert_close(head.logits(hidden), apply_head(model, hidden))


class Adapted(nn.Linear):
    """A linear layer with something beside its weight, which does nothing yet."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden) + 0 * hidden.sum(dim=-1, keepdim=True)


def test_a_head_that_is_no_plain_linear_layer_is_not_extracted() -> None:
    model = tiny("llama")
    model.set_output_embeddings(Adapted(32, VOCABULARY, bias=False))
    assert extract_head(model) is None


@pytest.mark.parametrize(
    ("name", "entry", "value"),
    [
        ("llama", "logit_scale", 0.5),
        ("llama", "logits_scaling", 2.0),
        ("llama", "final_logit_softcapping", 30.0),
        ("llama", "logit_scale", "inv_sqrt_d_model"),
        ("gemma2", "final_logit_softcapping", None),
    ],
)
def test_a_head_whose_config_contradicts_the_model_is_that_of_the_model(name: str, entry: str, value: Any) -> None:
    model = tiny(name)
    behaves = model.forward
    cap = model.config.final_logit_softcapping if name == "gemma2" else None
    setattr(model.config, entry, value)
    if cap is not None:
        # The model itself goes on capping, whatever its config says by now.
        model.forward = lambda *args, **kwargs: _capped(behaves(*args, **kwargs), cap)
        assert extract_head(model) is None
        return
    head = extract_head(model)
    assert head is not None
    hidden = torch.randn(3, head.weight.shape[1])
    torch.testing.assert_close(head.logits(hidden), apply_head(model, hidden))


def _capped(output: Any, cap: float) -> Any:
    output.logits = cap * torch.tanh(output.logits / cap)
    return output


def test_extraction_draws_no_random_number_and_changes_no_weight() -> None:
    model = tiny("gemma2")
    random_state, weights = torch.get_rng_state(), {k: v.clone() for k, v in model.state_dict().items()}
    extract_head(model)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_extraction_from_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(ModelUnsupported, match="no output head"):
        extract_head(tiny("llama").get_decoder())


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_without_layers_has_the_same_head(name: str) -> None:
    model = tiny(name)
    headed = without_layers(model)
    head = extract_head(headed)
    assert head is not None
    hidden = torch.randn(5, head.weight.shape[1], generator=torch.Generator().manual_seed(0))
    assert torch.equal(apply_head(headed, hidden), apply_head(model, hidden))
    assert len(list(headed.parameters())) < len(list(model.parameters()))
