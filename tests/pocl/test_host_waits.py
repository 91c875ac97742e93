"""The host waits for a GPU once in an optimiser step: to read what is reported of it.

Tensors of the device `meta` have shapes and no numbers, so whatever would read one raises. The packed batch of a
student that could be on a GPU is run through a whole step there.
"""

import warnings
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch.optim import AdamW
from transformers import PreTrainedModel

from pocl.data.batches import Batch
from pocl.models.output_head import Head
from pocl.models.precision import Precision
from pocl.spec import JS, Method
from pocl.teacher import distillation_loss
from pocl.teacher.distillation_loss import training_loss
from pocl.train.accumulation import GradientAccumulator
from tests.pocl.one_step import samples_of_lengths
from tests.pocl.test_objective import every_method
from tests.pocl.tiny_models import VOCABULARY, tiny

META = torch.device("meta")
FP32 = Precision("fp32", META)
SAMPLES = samples_of_lengths(9, 4, 12, 7)


def on(device: torch.device, model: PreTrainedModel) -> PreTrainedModel:
    """`model` itself, moved to `device`."""
    torch.nn.Module.to(model, device=device)
    return model


class NumberlessTeacher:
    """A teacher whose hidden states have no numbers."""

    def __init__(self) -> None:
        self.model = on(META, tiny("llama", seed=1))
        self.precision = FP32

    def hidden(self, batch: Batch) -> Tensor:
        return torch.empty(batch.tokens, 32, device=META)


def head_as_it_is(model: PreTrainedModel) -> Head:
    """The output head of `model`, which cannot be verified without numbers."""
    return Head(model.get_output_embeddings().weight)


@every_method
def test_a_step_reads_no_number_of_the_device_before_its_report(
    method: Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distillation_loss, "extract_head", head_as_it_is)
    # The device has no autocast, which is off here.
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_device: False)
    monkeypatch.setattr(torch, "autocast", lambda *_args, **_options: nullcontext())
    model = on(META, tiny("qwen2").train())
    loss = training_loss(model, NumberlessTeacher(), method, shared_vocabulary=VOCABULARY, precision=FP32)
    accumulator = GradientAccumulator(
        model, loss, max_grad_norm=1.0, packed=True, micro_batch_size=2, on_halved=lambda _rows: None
    )
    with pytest.raises((RuntimeError, NotImplementedError), match=r"[Mm]eta") as raised:
        accumulator.step(SAMPLES, temperature=1.5, kd_weight=0.7)
    # The gradients are there and clipped, and what fails is the transfer of the report.
    assert [entry.name for entry in raised.traceback if "accumulation.py" in str(entry.path)][-1] == "_reduce_and_clip"
    assert "tolist()" in str(raised.traceback[-1].statement)
    assert all(each.grad is not None for each in model.parameters())


class RandomTeacher:
    """A teacher whose hidden states are drawn on the device."""

    def __init__(self, device: torch.device) -> None:
        self.model = on(device, tiny("llama", seed=1))
        self.precision = Precision("bf16", device)

    def hidden(self, batch: Batch) -> Tensor:
        return torch.randn(batch.tokens, 32, device=batch.labels.device)


@pytest.mark.cuda
def test_the_host_waits_for_a_gpu_once_in_a_step() -> None:
    device = torch.device("cuda")
    model = on(device, tiny("qwen2").train())
    teacher = RandomTeacher(device)
    loss = training_loss(model, teacher, JS(), shared_vocabulary=VOCABULARY, precision=teacher.precision)
    accumulator = GradientAccumulator(
        model, loss, max_grad_norm=1.0, packed=True, micro_batch_size=2, on_halved=lambda _rows: None
    )
    optimizer = AdamW(model.parameters(), fused=True)

    def step() -> None:
        accumulator.step(SAMPLES, temperature=1.5, kd_weight=0.7)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()  # Kernels are loaded and memory is allocated.
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([each for each in caught if "synchronizing" in str(each.message)]) == 1
