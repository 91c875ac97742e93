"""The cached teacher equals the live one, however its entry was filled, and its layers run once for each sample."""

import gc
import os
import random
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from pocl.data.batches import EncodedSample, collate
from pocl.errors import DiskFull, RunStopped
from pocl.events import Event, Progressed, Warned
from pocl.models.precision import Precision
from pocl.storage.manifest import discard, sha256_of, write_manifest
from pocl.storage.shared_cache import SharedCache
from pocl.teacher import cache
from pocl.teacher.cache import BATCH_TOKENS, PAD_MULTIPLE, CachedTeacher, open_teacher, plan_shards, teacher_key
from pocl.teacher.signal import LiveTeacher, TeacherSignal, teacher_logits
from tests.pocl.tiny_models import CONFIGS, VOCABULARY, tiny

FP32 = Precision("fp32", torch.device("cpu"))
PLENTY = 1 << 30
ROOT = Path(__file__).resolve().parents[2]


def random_samples(count: int = 12, longest: int = 60) -> list[EncodedSample]:
    generator = torch.Generator().manual_seed(2)
    samples = []
    for index in range(count):
        length = int(torch.randint(4, longest, (1,), generator=generator))
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        samples.append(EncodedSample(f"{index:064x}", tuple(ids), prompt_length=1 + index % (length - 1)))
    return samples


class CountingTeacher:
    """A live teacher that counts the samples that its layers run on and records events."""

    def __init__(self, name: str = "llama", seed: int = 0) -> None:
        self.model: PreTrainedModel = tiny(name, seed)
        self.live = LiveTeacher(self.model, FP32)
        self.samples_run = 0
        self.events: list[Event] = []
        self.model.get_decoder().register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, _module: object, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]) -> None:
        self.samples_run += (args[0] if args else kwargs["input_ids"]).shape[0]

    @property
    def warnings(self) -> list[str]:
        return [event.code for event in self.events if isinstance(event, Warned)]

    @contextmanager
    def opened(
        self,
        root: Path,
        samples: list[EncodedSample],
        *,
        digest: str = "d",
        max_bytes: int = PLENTY,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Iterator[TeacherSignal]:
        store = SharedCache(root, max_bytes)
        with open_teacher(
            self.live, digest, samples, shared_cache=store, sink=self.events.append, should_stop=should_stop
        ) as opened_teacher:
            yield opened_teacher


def content(root: Path) -> dict[str, str]:
    """Digest of every shard, by its path."""
    return {path.relative_to(root).as_posix(): sha256_of(path) for path in root.rglob("*.safetensors")}


def shrink_shards(assign: Callable[[object, str, int], None] = setattr) -> None:
    """Make several batches and shards of a handful of short rows."""
    assign(cache, "SHARD_TOKENS", 40)
    assign(cache, "BATCH_TOKENS", 3 * PAD_MULTIPLE)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink_shards(monkeypatch.setattr)


@pytest.mark.parametrize("name", CONFIGS)
def test_cached_teacher_equals_the_live_teacher(tmp_path: Path, name: str) -> None:
    teacher, samples = CountingTeacher(name), random_samples()
    with teacher.opened(tmp_path, samples) as cached:
        assert isinstance(cached, CachedTeacher)
        assert len(list(cached.model.parameters())) < len(list(teacher.model.parameters()))
        batch = collate(samples[3:8])
        torch.testing.assert_close(cached.hidden(batch), teacher.live.hidden(batch), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            teacher_logits(cached, batch), teacher_logits(teacher.live, batch), rtol=1e-4, atol=1e-4
        )


def test_cached_teacher_equals_the_live_teacher_bit_for_bit_at_equal_padding(tmp_path: Path) -> None:
    teacher, samples = CountingTeacher(), random_samples()
    with teacher.opened(tmp_path, samples) as cached:
        for shard in plan_shards(samples, 64):
            for batch_rows, length in zip(shard.batches, shard.padded_lengths, strict=True):
                batch = collate(batch_rows, length=length)
                assert torch.equal(cached.hidden(batch), teacher.live.hidden(batch))


def test_samples_without_a_response_token_are_cached(tmp_path: Path) -> None:
    silent = EncodedSample("s" * 64, (5, 6, 7), prompt_length=3)
    with CountingTeacher().opened(tmp_path, [silent, *random_samples(2)]) as cached:
        assert cached.hidden(collate([silent])).shape == (0, 32)


def test_layers_are_freed_while_a_cached_teacher_is_used(tmp_path: Path) -> None:
    model, samples = tiny("llama"), random_samples()
    layer = weakref.ref(model.get_decoder().layers[0])
    opened = open_teacher(
        LiveTeacher(model, FP32), "d", samples, shared_cache=SharedCache(tmp_path, PLENTY), sink=lambda _: None
    )
    with opened as cached:
        del model
        gc.collect()
        assert layer() is None
        assert teacher_logits(cached, collate(samples)).shape[1] == VOCABULARY


def test_a_sample_that_the_cache_was_not_opened_with_is_an_error(tmp_path: Path) -> None:
    *known, unknown = random_samples()
    with CountingTeacher().opened(tmp_path, known) as cached, pytest.raises(KeyError):
        cached.hidden(collate([unknown]))


def test_a_second_job_runs_the_teacher_on_spot_check_samples_alone(tmp_path: Path) -> None:
    samples = random_samples()
    first, second = CountingTeacher(), CountingTeacher()
    with first.opened(tmp_path, samples):
        assert first.samples_run == len(samples)
    with second.opened(tmp_path, samples) as cached:
        with FlopCounterMode(display=False) as counter:
            for _ in range(3):
                cached.hidden(collate(samples))
        assert counter.get_total_flops() == 0
        assert 0 < second.samples_run <= cache.SPOT_CHECK_SAMPLES
    assert second.warnings == []


def test_order_and_repeats_of_samples_do_not_change_the_entry(tmp_path: Path) -> None:
    samples = random_samples()
    with CountingTeacher().opened(tmp_path, samples):
        before = content(tmp_path)
    mixed = [*samples, *samples[:5]]
    random.Random(0).shuffle(mixed)
    again = CountingTeacher()
    with again.opened(tmp_path, mixed):
        assert content(tmp_path) == before
    assert again.samples_run <= cache.SPOT_CHECK_SAMPLES


@pytest.mark.parametrize("after", [1, 2, 3])
def test_an_interrupted_entry_ends_with_the_same_content(tmp_path: Path, after: int) -> None:
    samples = random_samples()
    with CountingTeacher().opened(tmp_path / "undisturbed", samples):
        pass
    asked = iter(range(100))
    stopped = CountingTeacher()
    with (
        pytest.raises(RunStopped),
        stopped.opened(tmp_path / "disturbed", samples, should_stop=lambda: next(asked) >= after),
    ):
        pass
    with stopped.opened(tmp_path / "disturbed", samples):
        pass
    assert content(tmp_path / "disturbed") == content(tmp_path / "undisturbed")


@pytest.mark.system
def test_an_entry_filled_by_killed_processes_ends_with_the_same_content(tmp_path: Path) -> None:
    samples = random_samples()
    with CountingTeacher().opened(tmp_path / "undisturbed", samples):
        expected = content(tmp_path / "undisturbed")
    for samples_done in (2, 5, 9):
        assert _killed_after(samples_done, tmp_path / "disturbed") == -signal.SIGKILL
        assert content(tmp_path / "disturbed").items() <= expected.items()
    with CountingTeacher().opened(tmp_path / "disturbed", samples):
        assert content(tmp_path / "disturbed") == expected


def _killed_after(samples_done: int, root: Path) -> int:
    """The exit status of a process that fills a cache below `root` and dies as so many rows are done."""
    # A process of its own from the start: the threads of a forked torch are gone and waited for all the same.
    script = f"""
import sys
from pathlib import Path
from tests.pocl import test_teacher_cache as here
here.shrink_shards()
here.die_after({samples_done}, Path(sys.argv[1]))
"""
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.run([sys.executable, "-c", script, str(root)], env=environment, cwd=ROOT, timeout=120).returncode


def die_after(samples_done: int, root: Path) -> None:
    """Fill the cache below `root`, and be killed."""

    def sink(event: Event) -> None:
        if isinstance(event, Progressed) and event.done >= samples_done:
            os.kill(os.getpid(), signal.SIGKILL)

    with open_teacher(CountingTeacher().live, "d", random_samples(), shared_cache=SharedCache(root, PLENTY), sink=sink):
        pass


def test_a_missing_shard_alone_is_computed_again(tmp_path: Path) -> None:
    samples, again = random_samples(), CountingTeacher()
    with CountingTeacher().opened(tmp_path, samples):
        before = content(tmp_path)
    victim = next(tmp_path.rglob("shard-00001"))
    discard(victim)
    with again.opened(tmp_path, samples):
        assert content(tmp_path) == before
    assert again.samples_run < len(samples)


def test_a_damaged_shard_is_computed_again_with_a_warning(tmp_path: Path) -> None:
    samples, again = random_samples(), CountingTeacher()
    with CountingTeacher().opened(tmp_path, samples):
        before = content(tmp_path)
    victim = next(tmp_path.rglob("shard-00001")) / "hidden.safetensors"
    damaged = bytearray(victim.read_bytes())
    damaged[-1] ^= 1
    victim.write_bytes(damaged)
    with again.opened(tmp_path, samples):
        assert content(tmp_path) == before
    assert again.warnings == ["teacher_cache_damaged"]


def test_states_of_another_teacher_fail_the_spot_check_and_are_rebuilt(tmp_path: Path) -> None:
    samples, again = random_samples(), CountingTeacher()
    with CountingTeacher().opened(tmp_path, samples):
        before = content(tmp_path)
    for path in tmp_path.rglob("hidden.safetensors"):
        states = load_file(path)["hidden"]
        save_file({"hidden": states.flip(0).clone()}, path)
        write_manifest(path.parent)
    with again.opened(tmp_path, samples):
        assert content(tmp_path) == before
    assert again.warnings == ["teacher_cache_rebuilt"]


def test_different_teachers_and_sample_sets_have_different_entries(tmp_path: Path) -> None:
    samples = random_samples()
    for teacher, digest, some in (
        (CountingTeacher(), "d", samples),
        (CountingTeacher(seed=1), "e", samples),
        (CountingTeacher(), "d", samples[:5]),
    ):
        with teacher.opened(tmp_path, some, digest=digest) as cached:
            batch = collate(some[:4])
            torch.testing.assert_close(cached.hidden(batch), teacher.live.hidden(batch), rtol=1e-4, atol=1e-4)
        assert teacher.samples_run >= len(some)
    assert len(list((tmp_path / "teacher").iterdir())) == 3


def test_the_live_teacher_is_used_where_the_quota_is_too_small(tmp_path: Path) -> None:
    teacher = CountingTeacher()
    with teacher.opened(tmp_path, random_samples(), max_bytes=100) as opened_teacher:
        assert opened_teacher is teacher.live
    assert teacher.warnings == ["teacher_cache_skipped"]


def test_the_live_teacher_is_used_where_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_target: Path) -> AbstractContextManager[Path]:
        raise DiskFull

    monkeypatch.setattr(cache, "new_directory", full)
    teacher = CountingTeacher()
    with teacher.opened(tmp_path, random_samples()) as opened_teacher:
        assert opened_teacher is teacher.live
    assert teacher.warnings == ["teacher_cache_skipped"]
    assert not list(tmp_path.rglob("*.safetensors"))


def test_an_older_entry_is_evicted_for_a_new_one(tmp_path: Path) -> None:
    samples = random_samples()
    with CountingTeacher().opened(tmp_path, samples, digest="old"):
        size = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    with CountingTeacher().opened(tmp_path, samples, digest="new", max_bytes=size + 1000) as cached:
        assert isinstance(cached, CachedTeacher)
    assert len(list((tmp_path / "teacher").iterdir())) == 1


def test_batches_hold_samples_of_one_padded_length_within_the_token_limit() -> None:
    samples = random_samples(40, longest=200)
    laid_out = [
        (batch, length)
        for shard in plan_shards(samples, None)
        for batch, length in zip(shard.batches, shard.padded_lengths, strict=True)
    ]
    for batch, length in laid_out:
        assert length % PAD_MULTIPLE == 0
        assert {-(-len(row.input_ids) // PAD_MULTIPLE) * PAD_MULTIPLE for row in batch} == {length}
        assert len(batch) == 1 or len(batch) * length <= BATCH_TOKENS
    assert sorted(row.content_digest for batch, _ in laid_out for row in batch) == sorted(
        row.content_digest for row in samples
    )


def test_the_thread_count_is_part_of_the_key() -> None:
    threads, live, keys = torch.get_num_threads(), CountingTeacher().live, set()
    try:
        for each in (1, 2):
            torch.set_num_threads(each)
            keys.add(teacher_key("d", live))
    finally:
        torch.set_num_threads(threads)
    assert len(keys) == 2
