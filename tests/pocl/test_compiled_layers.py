"""Layers compiled one by one: the loss and the gradient of a step are those of the layers as they are."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from pocl.models.compiled_layers import Compile, CompiledLayers, layer_compiler
from pocl.models.layers import decoder_layers
from pocl.models.precision import Precision
from pocl.spec import JS
from pocl.teacher.distillation_loss import training_loss
from pocl.teacher.signal import LiveTeacher
from pocl.train.accumulation import GradientAccumulator, StepMeans
from tests.pocl.one_step import samples_of_lengths
from tests.pocl.tiny_models import VOCABULARY, tiny

BF16 = Precision("bf16", torch.device("cpu"))
SAMPLES = samples_of_lengths(9, 4, 12, 7)


def step(compiler: Compile | None, *, packed: bool) -> tuple[StepMeans, dict[str, Tensor]]:
    model = tiny("qwen2").train()
    teacher = LiveTeacher(tiny("llama", seed=1), BF16)
    accumulator = GradientAccumulator(
        model,
        training_loss(model, teacher, JS(), shared_vocabulary=VOCABULARY, precision=BF16),
        max_grad_norm=1e9,
        packed=packed,
        micro_batch_size=4,
        on_halved=lambda _rows: None,
        compiled_layers=CompiledLayers(decoder_layers(model), compiler),
    )
    means = accumulator.step(SAMPLES, temperature=1.5, kd_weight=0.7)
    assert all("forward" not in vars(layer) for layer in decoder_layers(model))
    return means, {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


@pytest.mark.slow
# Dynamo looks at the gradient of each of its inputs.
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
@pytest.mark.parametrize("packed", [False, True])
def test_a_step_through_compiled_layers_is_that_through_the_layers(packed: bool) -> None:
    torch._dynamo.reset()
    backend = CompileCounterWithBackend("aot_eager")
    means, gradients = step(partial(torch.compile, backend=backend), packed=packed)
    expected_means, expected = step(None, packed=packed)
    assert 0 < backend.frame_count <= 7  # Not once for each part of each of the four layers.
    assert means.loss == pytest.approx(expected_means.loss, rel=1e-3)
    assert gradients.keys() == expected.keys()
    largest = max(each.abs().max().item() for each in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=0.02 * largest)


def test_layers_have_their_own_forward_after_an_error() -> None:
    model = tiny("llama")
    layers = decoder_layers(model)
    compiled = CompiledLayers(layers, lambda _forward: lambda *_args, **_kwargs: 1 / 0)
    ids = torch.arange(5)[None]
    expected = model(input_ids=ids).logits
    with pytest.raises(ZeroDivisionError), compiled.in_use():
        model(input_ids=ids)
    assert torch.equal(model(input_ids=ids).logits, expected)


def test_what_compiles_a_layer_follows_from_the_two_choices() -> None:
    assert layer_compiler(compiled=False, graphs=False, few_shapes=True) is None
    assert all(
        layer_compiler(compiled=one, graphs=other, few_shapes=few)
        for one, other in ((True, False), (False, True), (True, True))
        for few in (True, False)
    )
