"""The cached teacher is the live one, to the bit, however the cache came about; and it runs once."""

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


def rows(count: int = 12, longest: int = 60) -> list[EncodedSample]:
    generator = torch.Generator().manual_seed(2)
    made = []
    for row in range(count):
        length = int(torch.randint(4, longest, (1,), generator=generator))
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        made.append(EncodedSample(f"{row:064x}", tuple(ids), prompt_length=1 + row % (length - 1)))
    return made


class Teacher:
    """A live teacher, the tokens of the rows that its layers were run on, and what was reported."""

    def __init__(self, name: str = "llama", seed: int = 0) -> None:
        self.model: PreTrainedModel = tiny(name, seed)
        self.live = LiveTeacher(self.model, FP32)
        self.rows_run = 0
        self.events: list[Event] = []
        self.model.get_decoder().register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, _module: object, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]) -> None:
        self.rows_run += (args[0] if args else kwargs["input_ids"]).shape[0]

    @property
    def warnings(self) -> list[str]:
        return [event.code for event in self.events if isinstance(event, Warned)]

    @contextmanager
    def opened(
        self,
        root: Path,
        of: list[EncodedSample],
        *,
        digest: str = "d",
        max_bytes: int = PLENTY,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Iterator[TeacherSignal]:
        store = SharedCache(root, max_bytes)
        with open_teacher(
            self.live, digest, of, shared_cache=store, sink=self.events.append, should_stop=should_stop
        ) as signal_:
            yield signal_


def content(root: Path) -> dict[str, str]:
    """Digest of every shard, by its path."""
    return {path.relative_to(root).as_posix(): sha256_of(path) for path in root.rglob("*.safetensors")}


def small(assign: Callable[[object, str, int], None] = setattr) -> None:
    """Make several batches and shards of a handful of short rows."""
    assign(cache, "SHARD_TOKENS", 40)
    assign(cache, "BATCH_TOKENS", 3 * PAD_MULTIPLE)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch.setattr)


@pytest.mark.parametrize("name", CONFIGS)
def test_cached_is_live(tmp_path: Path, name: str) -> None:
    teacher, of = Teacher(name), rows()
    with teacher.opened(tmp_path, of) as cached:
        assert isinstance(cached, CachedTeacher)
        assert len(list(cached.model.parameters())) < len(list(teacher.model.parameters()))
        batch = collate(of[3:8])
        torch.testing.assert_close(cached.hidden(batch), teacher.live.hidden(batch), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            teacher_logits(cached, batch), teacher_logits(teacher.live, batch), rtol=1e-4, atol=1e-4
        )


def test_at_the_same_padding_it_is_live_to_the_bit(tmp_path: Path) -> None:
    teacher, of = Teacher(), rows()
    with teacher.opened(tmp_path, of) as cached:
        for shard in plan_shards(of, 64):
            for batch_rows, length in zip(shard.batches, shard.padded_lengths, strict=True):
                batch = collate(batch_rows, length=length)
                assert torch.equal(cached.hidden(batch), teacher.live.hidden(batch))


def test_rows_without_a_response_token_are_no_trouble(tmp_path: Path) -> None:
    silent = EncodedSample("s" * 64, (5, 6, 7), prompt_length=3)
    with Teacher().opened(tmp_path, [silent, *rows(2)]) as cached:
        assert cached.hidden(collate([silent])).shape == (0, 32)


def test_the_layers_leave_memory_while_a_cached_teacher_is_used(tmp_path: Path) -> None:
    model, of = tiny("llama"), rows()
    layer = weakref.ref(model.get_decoder().layers[0])
    opened = open_teacher(
        LiveTeacher(model, FP32), "d", of, shared_cache=SharedCache(tmp_path, PLENTY), sink=lambda _: None
    )
    with opened as cached:
        del model
        gc.collect()
        assert layer() is None
        assert teacher_logits(cached, collate(of)).shape[1] == VOCABULARY


def test_a_row_that_it_was_not_opened_with_is_an_error(tmp_path: Path) -> None:
    *known, unknown = rows()
    with Teacher().opened(tmp_path, known) as cached, pytest.raises(KeyError):
        cached.hidden(collate([unknown]))


def test_a_second_job_runs_the_teacher_on_spot_checked_rows_alone(tmp_path: Path) -> None:
    of = rows()
    first, second = Teacher(), Teacher()
    with first.opened(tmp_path, of):
        assert first.rows_run == len(of)
    with second.opened(tmp_path, of) as cached:
        with FlopCounterMode(display=False) as counter:
            for _ in range(3):
                cached.hidden(collate(of))
        assert counter.get_total_flops() == 0
        assert 0 < second.rows_run <= cache.SPOT_CHECK_SAMPLES
    assert second.warnings == []


def test_neither_the_order_of_rows_nor_repeats_matter(tmp_path: Path) -> None:
    of = rows()
    with Teacher().opened(tmp_path, of):
        before = content(tmp_path)
    mixed = [*of, *of[:5]]
    random.Random(0).shuffle(mixed)
    again = Teacher()
    with again.opened(tmp_path, mixed):
        assert content(tmp_path) == before
    assert again.rows_run <= cache.SPOT_CHECK_SAMPLES


@pytest.mark.parametrize("after", [1, 2, 3])
def test_content_is_the_same_after_an_interruption(tmp_path: Path, after: int) -> None:
    of = rows()
    with Teacher().opened(tmp_path / "undisturbed", of):
        pass
    asked = iter(range(100))
    stopped = Teacher()
    with (
        pytest.raises(RunStopped),
        stopped.opened(tmp_path / "disturbed", of, should_stop=lambda: next(asked) >= after),
    ):
        pass
    with stopped.opened(tmp_path / "disturbed", of):
        pass
    assert content(tmp_path / "disturbed") == content(tmp_path / "undisturbed")


def test_content_is_the_same_after_kills_at_any_moment(tmp_path: Path) -> None:
    of = rows()
    with Teacher().opened(tmp_path / "undisturbed", of):
        wanted = content(tmp_path / "undisturbed")
    for rows_done in (2, 5, 9):
        assert _killed_after(rows_done, tmp_path / "disturbed") == -signal.SIGKILL
        assert content(tmp_path / "disturbed").items() <= wanted.items()
    with Teacher().opened(tmp_path / "disturbed", of):
        assert content(tmp_path / "disturbed") == wanted


def _killed_after(rows_done: int, root: Path) -> int:
    """The exit status of a process that fills a cache below `root` and dies as so many rows are done."""
    # A process of its own from the start: the threads of a forked torch are gone and waited for all the same.
    script = f"""
import sys
from pathlib import Path
from tests.pocl import test_teacher_cache as here
here.small()
here.die_after({rows_done}, Path(sys.argv[1]))
"""
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.run([sys.executable, "-c", script, str(root)], env=environment, cwd=ROOT, timeout=120).returncode


def die_after(rows_done: int, root: Path) -> None:
    """Fill the cache below `root`, and be killed."""

    def sink(event: Event) -> None:
        if isinstance(event, Progressed) and event.done >= rows_done:
            os.kill(os.getpid(), signal.SIGKILL)

    with open_teacher(Teacher().live, "d", rows(), shared_cache=SharedCache(root, PLENTY), sink=sink):
        pass


def test_a_missing_shard_is_made_again_alone(tmp_path: Path) -> None:
    of, again = rows(), Teacher()
    with Teacher().opened(tmp_path, of):
        before = content(tmp_path)
    victim = next(tmp_path.rglob("shard-00001"))
    discard(victim)
    with again.opened(tmp_path, of):
        assert content(tmp_path) == before
    assert again.rows_run < len(of)


def test_a_damaged_shard_is_made_again_with_a_warning(tmp_path: Path) -> None:
    of, again = rows(), Teacher()
    with Teacher().opened(tmp_path, of):
        before = content(tmp_path)
    victim = next(tmp_path.rglob("shard-00001")) / "hidden.safetensors"
    damaged = bytearray(victim.read_bytes())
    damaged[-1] ^= 1
    victim.write_bytes(damaged)
    with again.opened(tmp_path, of):
        assert content(tmp_path) == before
    assert again.warnings == ["teacher_cache_damaged"]


def test_states_of_another_teacher_are_found_out_and_rebuilt(tmp_path: Path) -> None:
    of, again = rows(), Teacher()
    with Teacher().opened(tmp_path, of):
        before = content(tmp_path)
    for path in tmp_path.rglob("hidden.safetensors"):
        states = load_file(path)["hidden"]
        save_file({"hidden": states.flip(0).clone()}, path)
        write_manifest(path.parent)
    with again.opened(tmp_path, of):
        assert content(tmp_path) == before
    assert again.warnings == ["teacher_cache_rebuilt"]


def test_other_teachers_and_other_rows_have_entries_of_their_own(tmp_path: Path) -> None:
    of = rows()
    for teacher, digest, some in ((Teacher(), "d", of), (Teacher(seed=1), "e", of), (Teacher(), "d", of[:5])):
        with teacher.opened(tmp_path, some, digest=digest) as cached:
            batch = collate(some[:4])
            torch.testing.assert_close(cached.hidden(batch), teacher.live.hidden(batch), rtol=1e-4, atol=1e-4)
        assert teacher.rows_run >= len(some)
    assert len(list((tmp_path / "teacher").iterdir())) == 3


def test_where_it_does_not_fit_the_live_teacher_is_used(tmp_path: Path) -> None:
    teacher = Teacher()
    with teacher.opened(tmp_path, rows(), max_bytes=100) as signal_:
        assert signal_ is teacher.live
    assert teacher.warnings == ["teacher_cache_skipped"]


def test_where_the_disk_is_full_the_live_teacher_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_target: Path) -> AbstractContextManager[Path]:
        raise DiskFull

    monkeypatch.setattr(cache, "new_directory", full)
    teacher = Teacher()
    with teacher.opened(tmp_path, rows()) as signal_:
        assert signal_ is teacher.live
    assert teacher.warnings == ["teacher_cache_skipped"]
    assert not list(tmp_path.rglob("*.safetensors"))


def test_an_older_entry_makes_room_for_a_new_one(tmp_path: Path) -> None:
    of = rows()
    with Teacher().opened(tmp_path, of, digest="old"):
        size = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    with Teacher().opened(tmp_path, of, digest="new", max_bytes=size + 1000) as cached:
        assert isinstance(cached, CachedTeacher)
    assert len(list((tmp_path / "teacher").iterdir())) == 1


def test_batches_hold_rows_of_one_padded_length_within_their_budget() -> None:
    of = rows(40, longest=200)
    laid_out = [
        (batch, length)
        for shard in plan_shards(of, None)
        for batch, length in zip(shard.batches, shard.padded_lengths, strict=True)
    ]
    for batch, length in laid_out:
        assert length % PAD_MULTIPLE == 0
        assert {-(-len(row.input_ids) // PAD_MULTIPLE) * PAD_MULTIPLE for row in batch} == {length}
        assert len(batch) == 1 or len(batch) * length <= BATCH_TOKENS
    assert sorted(row.content_digest for batch, _ in laid_out for row in batch) == sorted(
        row.content_digest for row in of
    )


def test_the_threads_of_the_process_are_part_of_the_key() -> None:
    threads, live, keys = torch.get_num_threads(), Teacher().live, set()
    try:
        for each in (1, 2):
            torch.set_num_threads(each)
            keys.add(teacher_key("d", live))
    finally:
        torch.set_num_threads(threads)
    assert len(keys) == 2
