"""Copies of weights in bf16: what a step computes with them is what autocast computes, and the masters stay alone."""

from collections.abc import Sequence
from contextlib import nullcontext, suppress
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from pocl.data.batches import EncodedSample
from pocl.losses.fused import fused_objective_sum
from pocl.losses.objective import ObjectiveTerms
from pocl.models.output_head import HeadInputs, extract_head
from pocl.models.precision import Precision
from pocl.models.product_weights import ProductWeights
from pocl.spec import JS, Method
from pocl.teacher.distillation_loss import training_loss
from pocl.teacher.signal import LiveTeacher
from pocl.train.accumulation import GradientAccumulator
from tests.pocl.one_step import samples_of_lengths
from tests.pocl.test_distillation_loss import with_opaque_head
from tests.pocl.tiny_models import CONFIGS, VOCABULARY, tiny

BF16 = Precision("bf16", torch.device("cpu"))
SAMPLES = samples_of_lengths(9, 4, 12, 7, 15, 6)
JS_METHOD: Method = JS()


class NoProductWeights(ProductWeights):
    """Leaves every weight to autocast."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model, Precision("fp32", torch.device("cpu")))


def gradients(
    model: PreTrainedModel, product_weights: ProductWeights, samples: Sequence[EncodedSample] = SAMPLES, *, rows: int
) -> dict[str, Tensor]:
    """The gradient of a step over `samples` in micro-batches of `rows`."""
    loss = training_loss(
        model.train(),
        LiveTeacher(tiny("llama", seed=1), BF16),
        JS_METHOD,
        shared_vocabulary=VOCABULARY,
        precision=BF16,
        product_weights=product_weights,
    )
    accumulator = GradientAccumulator(
        model, loss, max_grad_norm=1e9, packed=False, micro_batch_size=rows, on_halved=lambda _rows: None
    )
    torch.manual_seed(3)  # GPT-2 and OPT have dropout.
    accumulator.step(samples, temperature=1.5, kd_weight=0.85)
    return {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


@pytest.mark.parametrize("family", [*CONFIGS, "opaque"])
def test_the_gradient_of_a_step_is_that_of_autocast_to_the_bit(family: str) -> None:
    def model() -> PreTrainedModel:
        return with_opaque_head(tiny("qwen2")) if family == "opaque" else tiny(family)

    ours, plain = model(), model()
    actual = gradients(ours, ProductWeights(ours, BF16), rows=2)
    expected = gradients(plain, NoProductWeights(plain), rows=2)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert actual[name].dtype == torch.float32
        if family == "opaque" and name == "model.embed_tokens.weight":
            # Head and embedding are summed in another order where both gradients come from autograd.
            torch.testing.assert_close(actual[name], gradient, rtol=1e-6, atol=1e-6 * gradient.abs().max().item())
        else:
            assert torch.equal(actual[name], gradient), name


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "mixtral"])
def test_the_masters_are_what_the_model_has_outside_and_after(family: str) -> None:
    model = tiny(family)
    before = {name: (parameter, parameter.detach().clone()) for name, parameter in model.named_parameters()}
    keys = list(model.state_dict())
    product_weights = ProductWeights(model, BF16)
    with suppress(ZeroDivisionError), product_weights.in_use():
        assert any(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
        raise ZeroDivisionError
    assert list(model.state_dict()) == keys
    for name, parameter in model.named_parameters():
        master, values = before[name]
        assert parameter is master
        assert torch.equal(parameter, values)


def test_a_changed_master_is_read_at_the_next_use() -> None:
    model = tiny("qwen2")
    product_weights = ProductWeights(model, BF16)
    ids = torch.arange(6)[None]

    def logits() -> Tensor:
        with product_weights.in_use(), torch.no_grad(), BF16.autocast():
            result: Tensor = model(input_ids=ids).logits
            return result

    first = logits()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    second = logits()
    assert not torch.equal(first, second)
    with torch.no_grad(), BF16.autocast():
        assert torch.equal(second, model(input_ids=ids).logits)


def test_norms_and_the_lookup_of_embeddings_stay_on_the_masters_and_a_tied_head_does_not() -> None:
    model = tiny("qwen2")
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert head.weight is embedding.weight
    with ProductWeights(model, BF16).in_use():
        assert embedding.weight.dtype == torch.float32
        assert head.weight.dtype == torch.bfloat16
        norms = [each for name, each in model.named_parameters() if "norm" in name]
        assert norms
        assert all(each.dtype == torch.float32 for each in norms)


def test_a_weight_without_gradient_keeps_none_and_one_left_behind_is_dropped() -> None:
    model = tiny("llama")
    product_weights = ProductWeights(model, BF16)
    layer = model.get_decoder().layers[0].mlp.up_proj
    with product_weights.in_use():
        layer.weight.sum().backward()
        product_weights.collect_gradients()
        layer.weight.sum().backward()  # Not collected.
    with product_weights.in_use():
        product_weights.collect_gradients()
    having = {name for name, each in model.named_parameters() if each.grad is not None}
    assert having == {"model.layers.0.mlp.up_proj.weight"}
    assert torch.equal(layer.weight.grad, torch.ones_like(layer.weight))


def test_many_micro_batches_add_up_in_fp32() -> None:
    model = tiny("llama")
    product_weights = ProductWeights(model, BF16)
    layers = [layer.mlp.up_proj for layer in model.get_decoder().layers]
    with product_weights.in_use():
        for _ in range(300):
            sum(layer.weight.sum() for layer in layers).backward()
            product_weights.collect_gradients()
    for layer in layers:
        # In bf16 the sum would stay at 256.
        assert torch.equal(layer.weight.grad, torch.full_like(layer.weight, 300))


def test_a_frozen_weight_receives_no_gradient() -> None:
    model = tiny("llama")
    model.requires_grad_(False)
    model.get_input_embeddings().requires_grad_(True)
    assert gradients(model, ProductWeights(model, BF16), rows=6).keys() == {"model.embed_tokens.weight"}


class _Casts(TorchDispatchMode):
    """Counts casts of weights to bf16."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # torch leaves it unannotated.
        self._weights = {parameter.data_ptr() for parameter in model.parameters()}
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default and args[0].data_ptr() in self._weights:
            self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "qwen2"])
def test_a_step_casts_no_weight_by_itself(family: str) -> None:
    model = tiny(family)
    product_weights = ProductWeights(model, BF16)
    with _Casts(model) as casts:
        gradients(model, product_weights, rows=2)
    assert casts.count == 0


def test_the_head_is_read_from_its_copy_while_that_is_in_use_and_else_from_the_master() -> None:
    model = tiny("qwen2")
    product_weights = ProductWeights(model, BF16)
    head = extract_head(model)
    assert head is not None
    hidden = torch.randn(5, head.weight.shape[1])
    labels = torch.arange(5)

    def loss(context: Any) -> Tensor:
        with context, BF16.autocast():
            inputs = HeadInputs(hidden, product_weights.with_copies(head))
            teacher = HeadInputs(hidden.flip(0), head)
            terms = ObjectiveTerms(JS(), 1.0, 0.5, None)
            return fused_objective_sum(inputs, teacher, labels, terms).loss

    # The copies hold nothing yet when the first of the two reads the head.
    assert torch.equal(loss(nullcontext()), loss(product_weights.in_use()))


def test_fp32_products_need_no_copies() -> None:
    model = tiny("qwen2")
    with ProductWeights(model, Precision("fp32", torch.device("cpu"))).in_use():
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
