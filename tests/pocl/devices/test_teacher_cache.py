"""On each device the cached teacher is the live one, and a full cache is opened without running it."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pocl.data.batches import collate
from pocl.events import Event
from pocl.models.precision import Precision
from pocl.storage.shared_cache import SharedCache
from pocl.teacher.cache import CachedTeacher, open_teacher
from pocl.teacher.signal import LiveTeacher, TeacherSource
from tests.pocl.test_packed import random_samples
from tests.pocl.tiny_models import FOUR_FAMILIES, tiny
from tests.support.device_parameters import ON_EACH_DEVICE, on

TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2}
"""Of the largest state: a batch of another shape rounds otherwise."""


@ON_EACH_DEVICE
@pytest.mark.parametrize("precision_name", ["fp32", "bf16"])
@pytest.mark.parametrize("name", FOUR_FAMILIES)
def test_cached_equals_live_and_a_second_opening_computes_nothing(
    name: str, precision_name: str, device: str, tmp_path: Path
) -> None:
    precision = Precision(precision_name, torch.device(device))  # type: ignore[arg-type]  # One of its two names.
    model, samples = on(device, tiny(name)), random_samples(8)
    torch.nn.Module.to(model, dtype=precision.weights)
    batch = collate(samples, device=device)
    live = LiveTeacher(model, precision).hidden(batch)
    source, events = TeacherSource.loaded(model, "teacher", precision), list[Event]()

    def hidden() -> torch.Tensor:
        with open_teacher(source, samples, shared_cache=SharedCache(tmp_path, 1 << 30), sink=events.append) as opened:
            assert isinstance(opened, CachedTeacher)
            return opened.hidden(batch)

    first = hidden()
    with FlopCounterMode(display=False) as counter:
        second = hidden()
    assert first.device == live.device
    # Also of a family whose last layer norm gives fp32 under autocast.
    assert first.dtype == precision.weights
    difference = (first.float() - live.float()).abs().max()
    assert difference <= TOLERANCE[precision_name] * live.float().abs().max()
    assert torch.equal(first, second)
    assert counter.get_total_flops() == 0
    assert [event for event in events if event.type == "warning"] == []
