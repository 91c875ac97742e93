"""On each device a packed batch has the loss and the gradient of the padded one."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from pocl.data.batches import EncodedSample, collate, pack
from pocl.models.packed import can_pack
from pocl.models.precision import Precision
from pocl.spec import ForwardKL
from pocl.teacher.distillation_loss import DistillationLoss
from pocl.teacher.signal import LiveTeacher
from tests.pocl.test_packed import random_samples
from tests.pocl.tiny_models import tiny
from tests.support.device_parameters import ON_EACH_DEVICE, on

FAMILIES = ("gpt2", "opt", "llama", "qwen2")


@ON_EACH_DEVICE
@pytest.mark.parametrize("name", FAMILIES)
def test_packed_equals_padded_in_fp32(name: str, device: str) -> None:
    (loss, gradient), (expected_loss, expected) = (
        loss_and_gradient(name, Precision("fp32", torch.device(device)), packed=form) for form in (True, False)
    )
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert distance(gradient, expected) < 1e-4


@ON_EACH_DEVICE
@pytest.mark.parametrize("name", FAMILIES)
def test_packed_is_as_near_to_fp32_as_padded_is_in_bf16(name: str, device: str) -> None:
    place = torch.device(device)
    expected_loss, expected = loss_and_gradient(name, Precision("fp32", place), packed=False)
    (packed_loss, packed), (padded_loss, padded) = (
        loss_and_gradient(name, Precision("bf16", place), packed=form) for form in (True, False)
    )
    # Both round to 8 bits, and in another order.
    assert abs(packed_loss - expected_loss) <= 2 * abs(padded_loss - expected_loss) + 0.01 * expected_loss
    assert distance(packed, expected) <= 2 * distance(padded, expected) + 0.01


def loss_and_gradient(name: str, precision: Precision, *, packed: bool) -> tuple[float, Tensor]:
    """The loss of a batch, and its gradient at every weight of the student, as one vector in float64."""
    student, teacher = on(precision.device, tiny(name, seed=1)), on(precision.device, tiny(name))
    loss = DistillationLoss(
        student, LiveTeacher(teacher, precision), ForwardKL(), shared_vocabulary=None, precision=precision
    )
    assert can_pack(student, 64)
    samples: Sequence[EncodedSample] = random_samples(8)
    batch = (pack if packed else collate)(samples, device=precision.device)
    sums = loss.objective(batch, temperature=1.5, kd_weight=0.7, scale=1 / batch.tokens)
    torch.autograd.backward(sums.loss)
    gradients = [parameter.grad for parameter in student.parameters() if parameter.grad is not None]
    return sums.loss.item(), torch.cat([gradient.detach().double().cpu().flatten() for gradient in gradients])


def distance(gradient: Tensor, expected: Tensor) -> float:
    """The length of the difference in lengths of the expected gradient."""
    return float((gradient - expected).norm() / expected.norm())
