"""On each device an optimiser step is that of the CPU, and on a GPU the host waits for it once in a step."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from bench.ours import OurStep, optimizer_of, step_spec
from pocl.data.batches import EncodedSample
from pocl.models.precision import Precision
from pocl.teacher.signal import LiveTeacher
from tests.pocl.test_packed import random_samples
from tests.pocl.tiny_models import FOUR_FAMILIES, tiny
from tests.support.device_parameters import ON_EACH_DEVICE, on

_SAMPLES: Sequence[EncodedSample] = random_samples(8)


def step_of(name: str, precision: Precision) -> OurStep:
    """A step at a learning rate of nearly nothing, with a live teacher."""
    student, teacher = on(precision.device, tiny(name, seed=1)), on(precision.device, tiny(name))
    spec = step_spec(len(_SAMPLES))
    return OurStep(
        student,
        LiveTeacher(teacher, precision),
        optimizer_of(student, spec),
        spec,
        precision,
        temperature=1.5,
        kd_weight=0.7,
    )


@ON_EACH_DEVICE
@pytest.mark.parametrize("name", FOUR_FAMILIES)
def test_loss_of_a_step_does_not_depend_on_the_device(name: str, device: str) -> None:
    here, there = (step_of(name, Precision("fp32", torch.device(place)))(_SAMPLES) for place in ("cpu", device))
    assert there.loss == pytest.approx(here.loss, rel=1e-4)
    assert there.divergence == pytest.approx(here.divergence, rel=1e-4)


@ON_EACH_DEVICE
@pytest.mark.parametrize("name", FOUR_FAMILIES)
def test_loss_in_bf16_is_near_to_that_in_fp32(name: str, device: str) -> None:
    place = torch.device(device)
    exact, rounded = (step_of(name, Precision(each, place))(_SAMPLES) for each in ("fp32", "bf16"))
    assert rounded.loss == pytest.approx(exact.loss, rel=0.05)


@pytest.mark.cuda
@pytest.mark.parametrize("name", FOUR_FAMILIES)
def test_the_host_waits_for_the_gpu_at_most_once_in_a_step(name: str) -> None:
    """The one wait is for what the step reports: samples are copied to the GPU without one."""
    step = step_of(name, Precision("bf16", torch.device("cuda")))
    for _ in range(2):
        step(_SAMPLES)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step(_SAMPLES)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [f"{Path(each.filename).name}:{each.lineno}" for each in caught if "synchroniz" in str(each.message)]
    assert len(waits) <= 1, waits
