"""The head on the predicting rows alone gives what the dense head gives, for every kind of head."""

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from pocl.errors import ModelUnsupported
from pocl.models.heads import apply_head, output_head, response_hidden_states, response_logits
from tests.pocl.tiny_models import CONFIGS, VOCABULARY, tiny


def batch(padding: str = "right") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Three rows of 12, 7 and 9 tokens, and the positions that predict their responses."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (3, 12), generator=generator)
    mask = torch.tensor([[1] * length + [0] * (12 - length) for length in (12, 7, 9)])
    predicts = torch.zeros_like(mask, dtype=torch.bool)
    for row, (start, stop) in enumerate([(4, 11), (2, 6), (0, 8)]):
        predicts[row, start:stop] = True
    if padding == "left":
        ids, mask, predicts = ids.flip(1), mask.flip(1), predicts.flip(1)
    return ids, mask, predicts.flatten().nonzero()[:, 0]


def dense_logits(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return logits


def gradients(model: PreTrainedModel, logits: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    weights = torch.linspace(-1, 1, logits.numel()).reshape(logits.shape)
    (logits * weights).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_gradients_are_those_of_the_dense_head(name: str) -> None:
    model, (ids, mask, predicting) = tiny(name), batch()
    dense = dense_logits(model, ids, mask).flatten(0, 1)[predicting]
    sparse = response_logits(model, ids, mask, predicting)
    torch.testing.assert_close(sparse, dense, rtol=1e-5, atol=1e-5)
    expected = gradients(model, dense)
    found = gradients(model, sparse)
    assert found.keys() == expected.keys()
    for parameter, gradient in expected.items():
        torch.testing.assert_close(found[parameter], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_padding_on_the_left_changes_nothing(name: str) -> None:
    model, (ids, mask, predicting) = tiny(name), batch("left")
    alone = torch.zeros(3 * 12, VOCABULARY)
    for row in range(3):
        real = mask[row].bool()
        logits = model(input_ids=ids[row, real][None], use_cache=False).logits[0]
        alone[row * 12 : (row + 1) * 12][real] = logits
    found = response_logits(model, ids, mask, predicting)
    torch.testing.assert_close(found, alone[predicting], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_head_applied_to_captured_hidden_states_gives_the_same_bits(name: str) -> None:
    model, (ids, mask, predicting) = tiny(name), batch()
    hidden = response_hidden_states(model, ids, mask, predicting)
    assert hidden.shape == (len(predicting), output_head(model).get_parameter("weight").shape[1])
    assert torch.equal(apply_head(model, hidden), response_logits(model, ids, mask, predicting))


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "cohere"])
def test_no_response_gives_no_logits_and_finite_gradients(name: str) -> None:
    model, (ids, mask, predicting) = tiny(name), batch()
    logits = response_logits(model, ids, mask, predicting[:0])
    assert logits.shape == (0, VOCABULARY)
    assert all(gradient.isfinite().all() for gradient in gradients(model, logits).values())


def test_logits_are_in_row_major_order_of_positions() -> None:
    model, (ids, mask, predicting) = tiny("llama"), batch()
    whole = response_logits(model, ids, mask, predicting)
    rows = [
        response_logits(model, ids[i : i + 1], mask[i : i + 1], predicting[predicting // 12 == i] - 12 * i)
        for i in range(3)
    ]
    torch.testing.assert_close(whole, torch.cat(rows), rtol=1e-5, atol=1e-5)


def test_head_is_applied_to_the_predicting_positions_alone() -> None:
    model, (ids, mask, predicting) = tiny("llama"), batch()
    rows: list[int] = []
    output_head(model).register_forward_hook(lambda _head, _args, out: rows.append(out.numel() // VOCABULARY))
    response_logits(model, ids, mask, predicting)
    assert rows == [len(predicting)]


def test_layers_are_not_run_to_apply_the_head() -> None:
    model = tiny("opt-350m")
    hidden = torch.randn(5, 16)
    expected = apply_head(model, hidden)
    layers = model.get_submodule("model.decoder.layers")
    for parameter in layers.parameters():
        nn.init.constant_(parameter, torch.nan)
    assert torch.equal(apply_head(model, hidden), expected)


def test_model_is_unchanged_afterwards() -> None:
    model, (ids, mask, predicting) = tiny("llama"), batch()
    before = dense_logits(model, ids, mask)
    response_logits(model, ids, mask, predicting)
    apply_head(model, response_hidden_states(model, ids, mask, predicting))
    assert torch.equal(dense_logits(model, ids, mask), before)


def test_model_is_unchanged_after_an_error() -> None:
    model, (ids, mask, predicting) = tiny("llama"), batch()
    with pytest.raises(IndexError):
        response_logits(model, ids, mask, predicting + 30)
    assert dense_logits(model, ids, mask).shape == (3, 12, VOCABULARY)


def test_gradients_reach_the_model_through_captured_hidden_states() -> None:
    model, (ids, mask, predicting) = tiny("granite"), batch()
    direct = gradients(model, response_logits(model, ids, mask, predicting))
    two_steps = gradients(model, apply_head(model, response_hidden_states(model, ids, mask, predicting)))
    for parameter, gradient in direct.items():
        torch.testing.assert_close(two_steps[parameter], gradient)


def test_model_without_a_head_is_refused() -> None:
    with pytest.raises(ModelUnsupported, match="no output head"):
        output_head(tiny("llama").get_decoder())
