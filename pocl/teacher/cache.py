"""The teacher's final hidden states, computed once and used in every stage, epoch, method, temperature and job.

An entry of the cache holds the input of the output head at the positions that predict a response token; the head is
applied in the loss. That is exact for every temperature and method, at width x 2 or 4 bytes a token, where logits would
take vocabulary x 2.

The bits of a hidden state depend on the shapes of the products: on the padded length of a sample, and on the number of
samples in its batch. So both follow from the set of samples alone: samples are ordered by padded length and content,
padded to a multiple of 64, and divided into batches and shards by fixed numbers of tokens. A shard is whole or absent,
and an interrupted one is computed again whole, so an entry has the same content however often filling it was
interrupted.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from pocl.data.batches import Batch, EncodedSample, collate
from pocl.errors import CheckpointCorrupt, DiskFull, RunStopped
from pocl.events import Progressed, Sink, Warned
from pocl.models.heads import output_head, without_layers
from pocl.models.precision import machine_fingerprint
from pocl.storage.manifest import discard, new_directory, verify
from pocl.storage.shared_cache import SharedCache
from pocl.teacher.signal import LiveTeacher, TeacherSignal

KIND = "teacher"
LAYOUT = 1
"""Part of every key; to be raised when the content of a shard changes for equal inputs."""
PAD_MULTIPLE = 64
"""Padded lengths are multiples of this many tokens."""
BATCH_TOKENS = 4096
"""Tokens of a batch of the teacher, padding included."""
SHARD_TOKENS = 16384
"""Response tokens after which a shard ends: what an interruption costs at most."""
SPOT_CHECK_SAMPLES = 4
"""Samples of an entry that are compared with the live teacher when it is opened."""
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Largest difference to the live teacher, relative to the largest state: the sample is run by itself, and rounding
depends on the batch. The states of another teacher differ by about 1."""
_STATES = "hidden.safetensors"


def teacher_key(digest: str, live: LiveTeacher) -> str:
    """SHA-256 over all that the bits of a hidden state depend on besides the samples; `digest` is the teacher's."""
    parts = {
        "layout": LAYOUT,
        "weights": digest,
        "precision": live.precision.name,
        "attention": live.model.config._attn_implementation,
        "machine": machine_fingerprint(live.precision.device),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@contextmanager
def open_teacher(
    live: LiveTeacher,
    digest: str,
    samples: Sequence[EncodedSample],
    *,
    shared_cache: SharedCache,
    sink: Sink,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[TeacherSignal]:
    """The teacher for these samples: cached, after computing what the cache lacks, or else live.

    A few cached samples are compared with the live teacher; a difference rebuilds the entry. Where the disk or the
    bounds of the cache have no room, the live teacher is returned, with a warning.

    Args:
        live: The teacher with its layers.
        digest: Digest of the teacher's weights and config.
        samples: Every sample that the teacher will be needed for; order and repeats do not matter.
        shared_cache: Where entries are stored, for this run and others.
        sink: Receives progress and warnings.
        should_stop: Called before each batch of the teacher.

    Raises:
        RunStopped: when `should_stop` turns true; finished shards stay.
    """
    builder = _EntryBuilder(live, teacher_key(digest, live), samples, shared_cache, sink, should_stop)
    # The entry is held for as long as the teacher is used, so that no other run evicts it.
    with shared_cache.hold(KIND, builder.key) as entry:
        teacher = builder.build(entry)
        # Both refer to the layers, which a cached teacher does not need: their memory is freed.
        del live, builder
        yield teacher


class CachedTeacher:
    """A teacher whose hidden states come from memory-mapped shards."""

    def __init__(self, head_only: PreTrainedModel, live: LiveTeacher, states: dict[str, Tensor]) -> None:
        """`head_only` is the model without layers; `states` are the hidden states by content digest of the sample."""
        self.model = head_only
        self.precision = live.precision
        self._states = states

    def hidden(self, batch: Batch) -> Tensor:
        """Input of the output head at the positions that predict a response token, `[T, width]`.

        Raises:
            KeyError: for a sample that the cache was not opened with.
        """
        states = torch.cat([self._states[sample.content_digest] for sample in batch.samples])
        return states.to(batch.labels.device, non_blocking=True)


@dataclass(frozen=True)
class _Shard:
    """What one file of an entry holds."""

    name: str
    batches: tuple[tuple[EncodedSample, ...], ...]
    """The samples that the teacher runs on together."""
    padded_lengths: tuple[int, ...]
    """Of each batch, in tokens."""

    @property
    def samples(self) -> Iterator[EncodedSample]:
        """The samples in the order of the file."""
        return (sample for batch in self.batches for sample in batch)


def plan_shards(samples: Sequence[EncodedSample], max_positions: int | None) -> tuple[_Shard, ...]:
    """The layout of an entry: which samples are in which batch and shard, as a function of their contents alone.

    `max_positions` is the longest input of the teacher in tokens; None for no limit.
    """

    def padded_length(sample: EncodedSample) -> int:
        multiple = -(-len(sample.input_ids) // PAD_MULTIPLE) * PAD_MULTIPLE
        return multiple if max_positions is None else max(len(sample.input_ids), min(multiple, max_positions))

    distinct = {sample.content_digest: sample for sample in samples}
    shards: list[_Shard] = []
    batches: list[tuple[EncodedSample, ...]] = []
    batch: list[EncodedSample] = []
    tokens = 0

    def end_batch() -> None:
        if batch:
            batches.append(tuple(batch))
            batch.clear()

    def end_shard() -> None:
        end_batch()
        if batches:
            lengths = tuple(padded_length(first) for first, *_ in batches)
            shards.append(_Shard(f"shard-{len(shards):05d}", tuple(batches), lengths))
            batches.clear()

    for sample in sorted(distinct.values(), key=lambda sample: (padded_length(sample), sample.content_digest)):
        length = padded_length(sample)
        if batch and (padded_length(batch[0]) != length or (len(batch) + 1) * length > BATCH_TOKENS):
            end_batch()
            if tokens >= SHARD_TOKENS:
                end_shard()
                tokens = 0
        batch.append(sample)
        tokens += sample.predicted_tokens
    end_shard()
    return tuple(shards)


class _EntryBuilder:
    """Opens one entry of the cache: verifies what it holds and computes what it lacks."""

    def __init__(
        self,
        live: LiveTeacher,
        teacher: str,
        samples: Sequence[EncodedSample],
        shared_cache: SharedCache,
        sink: Sink,
        should_stop: Callable[[], bool],
    ) -> None:
        self._live = live
        self._shards = plan_shards(samples, getattr(live.model.config, "max_position_embeddings", None))
        contents = "".join(sorted({sample.content_digest for sample in samples}))
        self.key = hashlib.sha256(f"{teacher} {contents}".encode()).hexdigest()
        self._shared_cache = shared_cache
        self._sink = sink
        self._should_stop = should_stop
        self._total = _sample_count(self._shards)

    def build(self, entry: Path) -> TeacherSignal:
        """The cached teacher, once `entry` is whole; the live one where there is no room."""
        self._shared_cache.sweep()
        whole: list[_Shard] = []
        missing: list[_Shard] = []
        for shard in self._shards:
            (whole if self._is_whole(entry / shard.name) else missing).append(shard)
        if not self._shared_cache.make_room(self._bytes(missing), besides=f"{KIND}/{self.key}"):
            return self._fall_back("it does not fit within the bounds of the cache")
        if whole and not self._passes_spot_check(entry, whole):
            self._sink(Warned(code="teacher_cache_rebuilt", message="the cached teacher was not this teacher"))
            for shard in whole:
                discard(entry / shard.name)
            missing = list(self._shards)
        try:
            self._fill(entry, missing)
        except DiskFull:
            return self._fall_back("the disk is full")
        return CachedTeacher(without_layers(self._live.model), self._live, self._mapped_states(entry))

    def _fall_back(self, reason: str) -> TeacherSignal:
        message = f"the teacher runs at each visit of a sample: {reason}"
        self._sink(Warned(code="teacher_cache_skipped", message=message))
        return self._live

    def _is_whole(self, shard: Path) -> bool:
        if not shard.is_dir():
            return False
        try:
            verify(shard)
        except CheckpointCorrupt as error:
            self._sink(Warned(code="teacher_cache_damaged", message=f"a part is computed again: {error}"))
            discard(shard)
            return False
        return True

    def _bytes(self, shards: Sequence[_Shard]) -> int:
        width = output_head(self._live.model).get_parameter("weight").shape[1]
        size = 4 if self._live.precision.name == "fp32" else 2
        return sum(sample.predicted_tokens * width * size for shard in shards for sample in shard.samples)

    def _fill(self, entry: Path, missing: Sequence[_Shard]) -> None:
        done = self._total - _sample_count(missing)
        for shard in missing:
            # Two jobs may fill one entry at the same time: each computes whole shards, and none is computed twice.
            with _exclusive(entry / "fill.lock"):
                if not (entry / shard.name).is_dir():
                    self._fill_shard(entry / shard.name, shard, done)
            done += _sample_count([shard])

    def _fill_shard(self, target: Path, shard: _Shard, done: int) -> None:
        states = []
        for samples, length in zip(shard.batches, shard.padded_lengths, strict=True):
            if self._should_stop():
                raise RunStopped
            states.append(self._live_states(samples, length))
            done += len(samples)
            self._report_progress(done)
        with new_directory(target) as scratch:
            save_file({"hidden": torch.cat(states)}, scratch / _STATES)

    def _live_states(self, samples: Sequence[EncodedSample], length: int) -> Tensor:
        """The hidden states of samples padded to `length`, `[tokens, width]`; out of memory halves the batch."""
        device = self._live.model.device
        try:
            return self._live.hidden(collate(samples, device=device, length=length)).cpu()
        except torch.OutOfMemoryError:
            if len(samples) == 1:
                raise
        torch.cuda.empty_cache()
        middle = len(samples) // 2
        return torch.cat([self._live_states(samples[:middle], length), self._live_states(samples[middle:], length)])

    def _report_progress(self, done: int) -> None:
        self._sink(Progressed(phase="caching_teacher", done=done, total=self._total, unit="rows"))

    def _passes_spot_check(self, entry: Path, whole: Sequence[_Shard]) -> bool:
        step = max(1, len(whole) // SPOT_CHECK_SAMPLES)
        for shard in whole[::step][:SPOT_CHECK_SAMPLES]:
            sample, length = shard.batches[0][0], shard.padded_lengths[0]
            cached = _read(entry, shard)[sample.content_digest]
            live = self._live_states([sample], length)
            if cached.shape != live.shape or cached.dtype != live.dtype:
                return False
            if not cached.numel():
                continue
            difference = (cached.float() - live.float()).abs().max()
            if not difference <= _TOLERANCE[cached.dtype] * live.float().abs().max():
                return False
        return True

    def _mapped_states(self, entry: Path) -> dict[str, Tensor]:
        return {content: states for shard in self._shards for content, states in _read(entry, shard).items()}


def _sample_count(shards: Sequence[_Shard]) -> int:
    return sum(len(batch) for shard in shards for batch in shard.batches)


def _read(entry: Path, shard: _Shard) -> dict[str, Tensor]:
    """The hidden states of each sample by its content digest, as views into the memory-mapped file."""
    states = load_file(entry / shard.name / _STATES)["hidden"]
    samples = list(shard.samples)
    by_sample = torch.split(states, [sample.predicted_tokens for sample in samples])
    return {sample.content_digest: views for sample, views in zip(samples, by_sample, strict=True)}


@contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
