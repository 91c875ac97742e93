"""The cached teacher equals the live one, however its shards were filled, and its layers run once for each sample."""

import errno
import gc
import os
import random
import shutil
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from pocl.data.batches import EncodedSample, collate
from pocl.errors import RunStopped
from pocl.events import Event, Progressed, Warned
from pocl.models.precision import Precision
from pocl.storage.manifest import sha256_of, write_manifest
from pocl.storage.shared_cache import SharedCache
from pocl.teacher import shards
from pocl.teacher.cache import CachedTeacher, open_teacher
from pocl.teacher.filling import SPOT_CHECK_SAMPLES, live_states
from pocl.teacher.shards import PAD_MULTIPLE, TeacherBatch, batch_tokens_for, plan_batches, shard_kind
from pocl.teacher.signal import LiveTeacher, TeacherSignal, TeacherSource, teacher_logits
from tests.pocl.tiny_models import CONFIGS, VOCABULARY, tiny

FP32 = Precision("fp32", torch.device("cpu"))
BF16 = Precision("bf16", torch.device("cpu"))
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


BATCH_TOKENS = 3 * PAD_MULTIPLE
"""Makes several batches of a handful of short samples."""


class CountingTeacher:
    """A teacher that counts the samples that its layers run on, dummies left out, and records events."""

    def __init__(self, name: str = "llama", seed: int = 0, precision: Precision = FP32) -> None:
        self.model: PreTrainedModel = tiny(name, seed)
        torch.nn.Module.to(self.model, device=precision.device, dtype=precision.weights)
        self.live = LiveTeacher(self.model, precision)
        self.samples_run = 0
        self.loaded = 0
        self.events: list[Event] = []
        self.model.get_decoder().register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, _module: object, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]) -> None:
        input_ids = args[0] if args else kwargs["input_ids"]
        # Random samples have no token 0, and dummies no other.
        self.samples_run += int(input_ids.any(dim=1).sum())

    @property
    def warnings(self) -> list[str]:
        return [event.code for event in self.events if isinstance(event, Warned)]

    def source(self, digest: str) -> TeacherSource:
        def load() -> PreTrainedModel:
            self.loaded += 1
            return self.model

        return replace(TeacherSource.loaded(self.model, digest, self.live.precision), load=load)

    @contextmanager
    def opened(
        self,
        root: Path,
        samples: Sequence[EncodedSample],
        *,
        digest: str = "d",
        max_bytes: int = PLENTY,
        should_stop: Callable[[], bool] = lambda: False,
        batch_tokens: int = BATCH_TOKENS,
    ) -> Iterator[TeacherSignal]:
        store = SharedCache(root, max_bytes)
        with open_teacher(
            self.source(digest),
            samples,
            shared_cache=store,
            sink=self.events.append,
            should_stop=should_stop,
            batch_tokens=batch_tokens,
        ) as opened_teacher:
            yield opened_teacher


def content(root: Path) -> dict[str, str]:
    """Digest of every shard, by its path."""
    return {path.relative_to(root).as_posix(): sha256_of(path) for path in (root).glob("teacher-*/*/*.safetensors")}


def states_of(teacher: TeacherSignal, samples: Sequence[EncodedSample]) -> dict[str, torch.Tensor]:
    """The stored states by sample."""
    assert isinstance(teacher, CachedTeacher)
    return {sample.content_digest: teacher.hidden(collate([sample])) for sample in samples}


def assert_equal_bits(some: dict[str, torch.Tensor], all_states: dict[str, torch.Tensor]) -> None:
    for key, states in some.items():
        assert states.dtype == all_states[key].dtype
        assert torch.equal(states, all_states[key])


def shrink_shards(assign: Callable[[object, str, int], None] = setattr) -> None:
    """Make several shards of a handful of short samples."""
    assign(shards, "SHARD_TOKENS", 40)


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


def test_cached_teacher_equals_the_live_teacher_bit_for_bit_in_batches_of_equal_shape(tmp_path: Path) -> None:
    teacher, samples = CountingTeacher(), random_samples()
    with teacher.opened(tmp_path, samples) as cached:
        for batch in plan_batches(samples, BATCH_TOKENS, 64):
            assert torch.equal(cached.hidden(collate(batch.samples)), live_states(teacher.live, batch))


@pytest.mark.parametrize("precision", [FP32, BF16], ids=lambda precision: precision.name)
@pytest.mark.parametrize("name", CONFIGS)
def test_states_of_a_sample_do_not_depend_on_who_shares_its_batch(name: str, precision: Precision) -> None:
    live = CountingTeacher(name, precision=precision).live
    # Of full length, so that a batch with and one without padding are among those that are compared.
    samples = [full_sample(index, PAD_MULTIPLE - index % 3) for index in range(6)]

    def states(*order: int) -> dict[int, torch.Tensor]:
        batch = TeacherBatch(tuple(samples[index] for index in order), 6, PAD_MULTIPLE)
        split = torch.split(live_states(live, batch), [samples[index].predicted_tokens for index in order])
        return dict(zip(order, split, strict=True))

    together = states(*range(6))
    for order in ([5, 3, 1, 0, 2, 4], [0, 3], [2], [3]):
        for index, alone in states(*order).items():
            assert torch.equal(alone, together[index])


def full_sample(index: int, length: int) -> EncodedSample:
    ids = torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(index)).tolist()
    return EncodedSample(f"{index:064x}", tuple(ids), prompt_length=1)


def test_samples_without_a_response_token_are_cached(tmp_path: Path) -> None:
    silent = EncodedSample("s" * 64, (5, 6, 7), prompt_length=3)
    with CountingTeacher().opened(tmp_path, [silent, *random_samples(2)]) as cached:
        assert cached.hidden(collate([silent])).shape == (0, 32)


def test_layers_are_freed_while_a_cached_teacher_is_used(tmp_path: Path) -> None:
    model, samples = tiny("llama"), random_samples()
    layer = weakref.ref(model.get_decoder().layers[0])
    opened = open_teacher(
        TeacherSource.loaded(model, "d", FP32),
        samples,
        shared_cache=SharedCache(tmp_path, PLENTY),
        sink=lambda _: None,
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


def test_a_second_job_with_a_full_cache_neither_loads_nor_runs_the_teacher(tmp_path: Path) -> None:
    samples = random_samples()
    first, second = CountingTeacher(), CountingTeacher()
    with first.opened(tmp_path, samples) as cached:
        before = states_of(cached, samples)
        assert first.samples_run == len(samples)
    with FlopCounterMode(display=False) as counter, second.opened(tmp_path, samples) as cached:
        assert_equal_bits(states_of(cached, samples), before)
    assert (second.loaded, second.samples_run, second.warnings) == (0, 0, [])
    assert counter.get_total_flops() == 0


@pytest.mark.parametrize("known", [range(12), range(0, 12, 2), range(3, 12), range(1)], ids=str)
def test_a_job_computes_the_samples_alone_that_no_other_had(tmp_path: Path, known: range) -> None:
    samples = random_samples(13)
    with CountingTeacher().opened(tmp_path / "at once", samples) as cached:
        expected = states_of(cached, samples)
    with CountingTeacher().opened(tmp_path / "shared", [samples[index] for index in known]):
        pass
    again = CountingTeacher()
    with again.opened(tmp_path / "shared", samples) as cached:
        assert_equal_bits(states_of(cached, samples), expected)
    assert again.samples_run <= len(samples) - len(known) + SPOT_CHECK_SAMPLES
    assert again.warnings == []
    # A subset, in another order and with repeats, needs nothing new.
    subset = [*samples[5:], *samples[:9]]
    random.Random(0).shuffle(subset)
    last = CountingTeacher()
    with last.opened(tmp_path / "shared", subset) as cached:
        assert_equal_bits(states_of(cached, subset), expected)
    assert last.samples_run == 0


@pytest.mark.parametrize("after", [1, 2, 3])
def test_an_interrupted_filling_ends_with_the_same_states(tmp_path: Path, after: int) -> None:
    samples = random_samples()
    with CountingTeacher().opened(tmp_path / "undisturbed", samples) as cached:
        expected = states_of(cached, samples)
    asked = iter(range(100))
    stopped = CountingTeacher()
    with (
        pytest.raises(RunStopped),
        stopped.opened(tmp_path / "disturbed", samples, should_stop=lambda: next(asked) >= after),
    ):
        pass
    with stopped.opened(tmp_path / "disturbed", samples) as cached:
        assert_equal_bits(states_of(cached, samples), expected)


@pytest.mark.system
def test_a_cache_filled_by_killed_processes_ends_with_the_same_states(tmp_path: Path) -> None:
    samples = random_samples()
    with CountingTeacher().opened(tmp_path / "undisturbed", samples) as cached:
        expected = states_of(cached, samples)
    for samples_done in (2, 5, 9):
        assert _killed_after(samples_done, tmp_path / "disturbed") == -signal.SIGKILL
    with CountingTeacher().opened(tmp_path / "disturbed", samples) as cached:
        assert_equal_bits(states_of(cached, samples), expected)


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

    teacher = CountingTeacher()
    teacher.events = SinkList(sink)
    with teacher.opened(root, random_samples()):
        pass


class SinkList(list[Event]):
    """A list that passes on what is appended."""

    def __init__(self, sink: Callable[[Event], None]) -> None:
        super().__init__()
        self.append = sink  # type: ignore[method-assign] # It stands in for the list of events of a teacher.


def any_shard(root: Path) -> Path:
    return min(root.glob("teacher-*/*"))


def test_the_samples_of_a_missing_shard_alone_are_computed_again(tmp_path: Path) -> None:
    samples, again = random_samples(), CountingTeacher()
    with CountingTeacher().opened(tmp_path, samples) as cached:
        before = states_of(cached, samples)
    shutil.rmtree(any_shard(tmp_path))
    with again.opened(tmp_path, samples) as cached:
        assert_equal_bits(states_of(cached, samples), before)
    assert 0 < again.samples_run < len(samples)


@pytest.mark.parametrize("name", ["hidden.safetensors", "rows.json", "manifest.json"])
def test_a_damaged_shard_is_computed_again_with_a_warning(tmp_path: Path, name: str) -> None:
    samples, again = random_samples(), CountingTeacher()
    with CountingTeacher().opened(tmp_path, samples) as cached:
        before = states_of(cached, samples)
    victim = any_shard(tmp_path) / name
    damaged = bytearray(victim.read_bytes())
    damaged[-2] ^= 1
    victim.write_bytes(damaged)
    with again.opened(tmp_path, samples) as cached:
        assert_equal_bits(states_of(cached, samples), before)
    assert again.warnings == ["teacher_cache_damaged"]
    assert again.samples_run < len(samples)


def test_states_of_another_teacher_fail_the_spot_check_and_are_rebuilt(tmp_path: Path) -> None:
    *samples, new = random_samples()
    with CountingTeacher().opened(tmp_path, samples) as cached:
        before = states_of(cached, samples)
    for path in tmp_path.rglob("hidden.safetensors"):
        states = load_file(path)["hidden"]
        save_file({"hidden": states.flip(0).clone()}, path)
        (path.parent / "manifest.json").unlink()
        write_manifest(path.parent)
    again = CountingTeacher()
    with again.opened(tmp_path, [*samples, new]) as cached:
        assert_equal_bits(states_of(cached, samples), before)
    assert again.warnings == ["teacher_cache_rebuilt"]


def test_shards_of_another_head_are_rebuilt(tmp_path: Path) -> None:
    samples = random_samples()
    with CountingTeacher().opened(tmp_path, samples):
        pass
    other = CountingTeacher(seed=1)
    # The digest of the whole is wrong, as of a file that was changed behind its back.
    with other.opened(tmp_path, samples, digest="d") as cached:
        batch = collate(samples)
        torch.testing.assert_close(cached.hidden(batch), other.live.hidden(batch), rtol=1e-4, atol=1e-4)
    assert other.warnings == ["teacher_cache_rebuilt"]


def test_teachers_of_different_digests_share_no_state(tmp_path: Path) -> None:
    samples = random_samples()
    for teacher, digest in ((CountingTeacher(), "d"), (CountingTeacher(seed=1), "e")):
        with teacher.opened(tmp_path, samples, digest=digest) as cached:
            batch = collate(samples[:4])
            torch.testing.assert_close(cached.hidden(batch), teacher.live.hidden(batch), rtol=1e-4, atol=1e-4)
        assert (teacher.samples_run, teacher.warnings) == (len(samples) + 4, [])


class _RoundsLate(torch.nn.Module):
    """A norm that gives fp32, as LayerNorm does under autocast on a GPU."""

    def __init__(self, norm: torch.nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = self.norm(hidden)
        return normed.float() * 1.001


def test_states_are_kept_in_the_format_of_the_products(tmp_path: Path) -> None:
    def teacher() -> CountingTeacher:
        made = CountingTeacher("gpt2", precision=BF16)
        made.model.get_decoder().ln_f = _RoundsLate(made.model.get_decoder().ln_f)
        return made

    *samples, new = random_samples()
    first, second, third = teacher(), teacher(), teacher()
    assert first.live.hidden(collate(samples)).dtype == torch.float32
    first.samples_run = 0
    with first.opened(tmp_path, samples) as cached:
        assert cached.hidden(collate(samples)).dtype == torch.bfloat16
        batch = plan_batches(samples, BATCH_TOKENS, 64)[0]
        live = first.live.hidden(batch.collate(torch.device("cpu")))
        with BF16.autocast():
            head = first.model.get_output_embeddings()
            assert torch.equal(head(cached.hidden(collate(batch.samples))), head(live))
    width, tokens = 32, sum(sample.predicted_tokens for sample in samples)
    size = sum(path.stat().st_size for path in tmp_path.rglob("hidden.safetensors"))
    assert size <= tokens * width * 2 + 200 * len(content(tmp_path))
    with second.opened(tmp_path, samples):
        assert (second.samples_run, second.loaded, second.warnings) == (0, 0, [])
    with third.opened(tmp_path, [*samples, new]):
        assert third.warnings == []


def test_what_is_reserved_suffices_and_is_given_back(tmp_path: Path) -> None:
    samples = random_samples(40)
    store = SharedCache(tmp_path, PLENTY)
    with CountingTeacher().opened(tmp_path, samples), store.holder() as holder:
        used = sum(path.stat().st_size for path in tmp_path.glob("teacher-*/*/*"))
        assert holder.reserve(PLENTY - used)
        assert not holder.reserve(1)


def test_the_live_teacher_is_used_where_the_quota_is_too_small(tmp_path: Path) -> None:
    teacher = CountingTeacher()
    with teacher.opened(tmp_path, random_samples(), max_bytes=100) as opened_teacher:
        assert isinstance(opened_teacher, LiveTeacher)
    assert teacher.warnings == ["teacher_cache_skipped"]


def fails(error: Exception) -> Callable[..., None]:
    def fail(*_args: object, **_options: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EMFILE, errno.EDQUOT, errno.EIO], ids=errno.errorcode.get)
def test_the_live_teacher_is_used_where_shards_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(shards, "save_file", fails(OSError(number, "")))
    teacher = CountingTeacher()
    with teacher.opened(tmp_path, random_samples()) as opened_teacher:
        assert isinstance(opened_teacher, LiveTeacher)
    assert teacher.warnings == ["teacher_cache_skipped"]
    assert not list(tmp_path.rglob("*.safetensors"))


def test_the_live_teacher_is_used_where_the_cache_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    teacher = CountingTeacher()
    with teacher.opened(tmp_path / "file", random_samples()) as opened_teacher:
        assert isinstance(opened_teacher, LiveTeacher)
    assert teacher.warnings == ["teacher_cache_skipped"]


def test_shards_of_another_teacher_are_evicted_for_new_ones_as_far_as_is_needed(tmp_path: Path) -> None:
    samples = random_samples()
    with CountingTeacher().opened(tmp_path, samples, digest="old"):
        size = sum(path.stat().st_size for path in tmp_path.rglob("teacher-*/*/*"))
        old = len(content(tmp_path))
    with CountingTeacher().opened(tmp_path, samples, digest="new", max_bytes=2 * size) as cached:
        assert isinstance(cached, CachedTeacher)
    assert old <= len(content(tmp_path)) < 2 * old


class _FailsAbove:
    """Raises as a GPU without memory does where a batch has more than so many tokens."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def __call__(self, _module: object, _args: object, kwargs: dict[str, torch.Tensor]) -> None:
        if kwargs["input_ids"].numel() > self.tokens:
            raise torch.OutOfMemoryError


def test_out_of_memory_halves_the_batch_under_a_kind_of_its_own(tmp_path: Path) -> None:
    samples = random_samples()
    with CountingTeacher().opened(tmp_path / "small", samples, batch_tokens=2 * PAD_MULTIPLE) as cached:
        expected = states_of(cached, samples)
    small = CountingTeacher()
    small.model.get_decoder().register_forward_pre_hook(_FailsAbove(2 * PAD_MULTIPLE), with_kwargs=True)
    with small.opened(tmp_path / "halved", samples, batch_tokens=8 * PAD_MULTIPLE) as cached:
        assert isinstance(cached, CachedTeacher)
        assert cached.batch_tokens == 2 * PAD_MULTIPLE
        assert_equal_bits(states_of(cached, samples), expected)
    assert small.warnings == ["teacher_batch_halved"] * 2
    assert content(tmp_path / "halved") == content(tmp_path / "small")


def test_out_of_memory_for_a_single_sample_is_an_error(tmp_path: Path) -> None:
    tiny_card = CountingTeacher()
    tiny_card.model.get_decoder().register_forward_pre_hook(_FailsAbove(PAD_MULTIPLE - 1), with_kwargs=True)
    with pytest.raises(torch.OutOfMemoryError), tiny_card.opened(tmp_path, random_samples()):
        pass


def test_batches_have_one_shape_for_each_padded_length() -> None:
    samples = random_samples(40, longest=200)
    batches = plan_batches(samples, BATCH_TOKENS, None)
    for batch in batches:
        assert batch.length % PAD_MULTIPLE == 0
        assert {-(-len(row.input_ids) // PAD_MULTIPLE) * PAD_MULTIPLE for row in batch.samples} == {batch.length}
        assert batch.rows == max(1, BATCH_TOKENS // batch.length)
        assert batch.collate(torch.device("cpu")).input_ids.shape == (batch.rows, batch.length)
    assert sorted(row.content_digest for batch in batches for row in batch.samples) == sorted(
        row.content_digest for row in samples
    )


GIB = 1 << 30


@pytest.mark.parametrize(
    ("total_memory", "tokens"),
    [(None, 512), (4 * GIB, 4096), (16 * GIB, 8192), (24 * GIB - 1, 8192), (80 * GIB - 7, 32768), (141 * GIB, 65536),
     (1000 * GIB, 65536)],
)  # fmt: skip
def test_batch_follows_from_the_total_memory_in_powers_of_two(total_memory: int | None, tokens: int) -> None:
    assert batch_tokens_for(total_memory) == tokens


def test_kind_depends_on_all_that_bits_depend_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model, threads = tiny("llama"), torch.get_num_threads()
    cuda = Precision("fp32", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "card")

    def kinds(precision: Precision) -> set[str]:
        found = set()
        try:
            for each in (1, 2):
                torch.set_num_threads(each)
                found.add(shard_kind("d", model, precision, 4096))
        finally:
            torch.set_num_threads(threads)
        return found

    # Threads of the host divide the sums of a CPU, and none of a GPU.
    assert (len(kinds(FP32)), len(kinds(cuda))) == (2, 1)
    assert len({*kinds(FP32), *kinds(cuda), *kinds(BF16)}) == 5
    assert len({shard_kind("d", model, FP32, 4096), shard_kind("e", model, FP32, 4096),
                shard_kind("d", model, FP32, 8192)}) == 3  # fmt: skip


RACER = """
import random, sys
from pathlib import Path
import torch
from tests.pocl import test_teacher_cache as here
torch.set_num_threads(1)
here.shrink_shards()
print(here.race(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])))
"""


def race(root: Path, openings: int, max_bytes: int, seed: int) -> int:
    """Open a cache that others use for random samples again and again; how often the teacher was cached.

    A wrong state is an error.
    """
    cached = 0
    teacher, draw, samples = CountingTeacher(), random.Random(seed), random_samples(24)
    expected = {
        sample.content_digest: states
        for batch in plan_batches(samples, BATCH_TOKENS, 64)
        for sample, states in zip(
            batch.samples,
            live_states(teacher.live, batch).split([each.predicted_tokens for each in batch.samples]),
            strict=True,
        )
    }
    for _ in range(openings):
        some = draw.sample(samples, draw.randrange(1, 13))
        with teacher.opened(root, some, digest=draw.choice("de"), max_bytes=max_bytes) as opened_teacher:
            if isinstance(opened_teacher, CachedTeacher):
                cached += 1
                assert_equal_bits(states_of(opened_teacher, some), expected)
    assert set(teacher.warnings) <= {"teacher_cache_skipped"}
    return cached


def racing(root: Path, processes: int, openings: int, max_bytes: int) -> int:
    """How often the teacher was cached, in all processes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, str(root), str(openings), str(max_bytes), str(seed)],
            env=environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in range(processes)
    ]
    cached = [int(process.communicate(timeout=300)[0]) for process in started]
    assert [process.returncode for process in started] == [0] * processes
    return sum(cached)


@pytest.mark.slow
@pytest.mark.system
def test_openings_of_several_processes_over_a_cache_that_is_too_small_never_fail(tmp_path: Path) -> None:
    # Both ends of an opening are tried: with room, and without.
    assert 0 < racing(tmp_path, processes=4, openings=100, max_bytes=60_000) < 400


@pytest.mark.system
def test_two_processes_at_once_compute_each_sample_once(tmp_path: Path) -> None:
    samples, teacher = random_samples(), CountingTeacher()
    program = """
import sys
from pathlib import Path
from tests.pocl import test_teacher_cache as here
here.shrink_shards()
teacher = here.CountingTeacher()
with teacher.opened(Path(sys.argv[1]), here.random_samples()):
    print(teacher.samples_run)
"""
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path)], env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    assert sum(int(process.communicate(timeout=120)[0]) for process in started) == len(samples)
    with teacher.opened(tmp_path, samples):
        assert teacher.samples_run == 0
