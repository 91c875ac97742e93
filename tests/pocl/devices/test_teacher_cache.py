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
from pocl.teacher.filling import live_states
from pocl.teacher.shards import PAD_MULTIPLE, TeacherBatch
from pocl.teacher.signal import LiveTeacher, TeacherSource
from tests.pocl.test_packed import random_samples
from tests.pocl.test_teacher_cache import CountingTeacher, full_sample
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


@pytest.mark.cuda
@pytest.mark.parametrize("name", FOUR_FAMILIES)
def test_states_of_a_sample_do_not_depend_on_who_shares_its_batch_on_a_gpu(name: str) -> None:
    live = CountingTeacher(name, precision=Precision("bf16", torch.device("cuda"))).live
    samples = [full_sample(index, PAD_MULTIPLE - index % 3) for index in range(6)]

    def states(*order: int) -> dict[int, torch.Tensor]:
        batch = TeacherBatch(tuple(samples[index] for index in order), 6, PAD_MULTIPLE)
        split = torch.split(live_states(live, batch), [samples[index].predicted_tokens for index in order])
        return dict(zip(order, split, strict=True))

    together = states(*range(6))
    for order in ([5, 3, 1, 0, 2, 4], [0, 3], [2]):
        for index, alone in states(*order).items():
            assert torch.equal(alone, together[index])


@pytest.mark.cuda
def test_cached_states_reach_the_gpu_without_a_wait(tmp_path: Path) -> None:
    samples = random_samples(8)
    with CountingTeacher(precision=Precision("bf16", torch.device("cuda"))).opened(tmp_path, samples) as cached:
        batch = collate(samples, device="cuda")
        cached.hidden(batch)
        torch.cuda.set_sync_debug_mode("error")
        try:
            cached.hidden(batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
