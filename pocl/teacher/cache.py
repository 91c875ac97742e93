"""The teacher's final hidden states, computed once and used in every stage, epoch, method, temperature and job.

What is kept is the input of the output head at the positions that predict a response token; the head is applied in
the loss. That is exact for every temperature and method, at width x 2 or 4 bytes a token, where logits would take
vocabulary x 2.

The bits of a hidden state depend on what is multiplied together: the padded length of a row, and the number of rows
in its batch. So both follow from the set of rows alone: rows are ordered by padded length and content, padded to a
multiple of 64, and cut into batches and shards by fixed numbers of tokens. A shard is whole or absent, and one that
was interrupted is done again whole, so the content is the same however often the filling was disturbed.
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
BATCH_TOKENS = 4096
"""Of a batch of the teacher, padding included."""
SHARD_TOKENS = 16384
"""Response tokens after which a shard ends: what an interruption costs."""
SPOT_CHECK_SAMPLES = 4
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Largest difference to the live teacher, relative to the largest state. A row is checked alone, and rounding differs
with the batch; a wrong teacher differs by 1."""
_STATES = "hidden.safetensors"


def teacher_key(digest: str, live: LiveTeacher) -> str:
    """SHA-256 over all that the bits of a hidden state depend on besides the rows."""
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
    rows: Sequence[EncodedSample],
    *,
    shared_cache: SharedCache,
    sink: Sink,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[TeacherSignal]:
    """The teacher for these rows: from the store, after what is missing there was computed, or else live.

    A few rows that were found are compared with the live teacher; a difference rebuilds the entry. Without room on
    the disk or within the store's bounds the live teacher is returned, with a warning.

    Args:
        digest: Of the teacher's weights and config.
        rows: Every row that will be asked for; their order and repeats do not matter.

    Raises:
        RunStopped: when `should_stop` turns true; finished shards stay.
    """
    filling = _Filling(live, teacher_key(digest, live), rows, shared_cache, sink, should_stop)
    # Held for as long as the teacher is used, so that no other run evicts it.
    with shared_cache.held(KIND, filling.key) as entry:
        teacher = filling.teacher_from(entry)
        # Both hold the layers, which a cached teacher needs no more.
        del live, filling
        yield teacher


class CachedTeacher:
    """Hidden states out of memory-mapped shards."""

    def __init__(self, headed: PreTrainedModel, live: LiveTeacher, shards: dict[str, Tensor]) -> None:
        self.model = headed
        self.precision = live.precision
        self._states = shards

    def hidden(self, batch: Batch) -> Tensor:
        """`[T, width]` in the order of `hidden[batch.predicts]`.

        Raises:
            KeyError: for a row that the cache was not opened with.
        """
        states = torch.cat([self._states[row.content_digest] for row in batch.samples])
        return states.to(batch.labels.device, non_blocking=True)

    @property
    def rows(self) -> int:
        return len(self._states)


@dataclass(frozen=True)
class _Shard:
    name: str
    batches: tuple[tuple[EncodedSample, ...], ...]
    length: tuple[int, ...]
    """Padded length of each batch."""

    @property
    def rows(self) -> Iterator[EncodedSample]:
        return (row for batch in self.batches for row in batch)


def plan_shards(rows: Sequence[EncodedSample], positions: int | None) -> tuple[_Shard, ...]:
    """How rows are laid out: a function of their contents alone.

    `positions` is the most that the teacher can take; None for no limit.
    """

    def padded(row: EncodedSample) -> int:
        multiple = -(-len(row.input_ids) // PAD_MULTIPLE) * PAD_MULTIPLE
        return multiple if positions is None else max(len(row.input_ids), min(multiple, positions))

    distinct = {row.content_digest: row for row in rows}
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
            lengths = tuple(padded(each[0]) for each in batches)
            shards.append(_Shard(f"shard-{len(shards):05d}", tuple(batches), lengths))
            batches.clear()

    for row in sorted(distinct.values(), key=lambda row: (padded(row), row.content_digest)):
        if batch and (padded(batch[0]) != padded(row) or (len(batch) + 1) * padded(row) > BATCH_TOKENS):
            end_batch()
            if tokens >= SHARD_TOKENS:
                end_shard()
                tokens = 0
        batch.append(row)
        tokens += row.predicted_tokens
    end_shard()
    return tuple(shards)


class _Filling:
    """One opening of one entry, told in the order in which it happens."""

    def __init__(
        self,
        live: LiveTeacher,
        teacher: str,
        rows: Sequence[EncodedSample],
        shared_cache: SharedCache,
        sink: Sink,
        should_stop: Callable[[], bool],
    ) -> None:
        self._live = live
        self._shards = plan_shards(rows, getattr(live.model.config, "max_position_embeddings", None))
        contents = "".join(sorted({row.content_digest for row in rows}))
        self.key = hashlib.sha256(f"{teacher} {contents}".encode()).hexdigest()
        self._shared_cache = shared_cache
        self._sink = sink
        self._should_stop = should_stop
        self._total = sum(1 for shard in self._shards for _ in shard.rows)

    def teacher_from(self, entry: Path) -> TeacherSignal:
        self._shared_cache.sweep()
        found: list[_Shard] = []
        missing: list[_Shard] = []
        for shard in self._shards:
            (found if self._is_whole(entry / shard.name) else missing).append(shard)
        if not self._shared_cache.make_room(self._bytes(missing), besides=f"{KIND}/{self.key}"):
            return self._instead("it does not fit within the bounds of the cache")
        if found and not self._passes_spot_check(entry, found):
            self._sink(Warned(code="teacher_cache_rebuilt", message="the cached teacher was not this teacher"))
            for shard in found:
                discard(entry / shard.name)
            missing = list(self._shards)
        try:
            self._fill(entry, missing)
        except DiskFull:
            return self._instead("the disk is full")
        return CachedTeacher(without_layers(self._live.model), self._live, self._mapped(entry))

    def _instead(self, reason: str) -> TeacherSignal:
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
        return sum(row.predicted_tokens * width * size for shard in shards for row in shard.rows)

    def _fill(self, entry: Path, missing: Sequence[_Shard]) -> None:
        done = self._total - sum(1 for shard in missing for _ in shard.rows)
        for shard in missing:
            # Two jobs may fill one entry at once: each does whole shards, and none is done twice.
            with _exclusive(entry / "fill.lock"):
                if not (entry / shard.name).is_dir():
                    self._fill_shard(entry / shard.name, shard, done)
            done += sum(len(batch) for batch in shard.batches)

    def _fill_shard(self, target: Path, shard: _Shard, done: int) -> None:
        states = []
        for rows, length in zip(shard.batches, shard.length, strict=True):
            if self._should_stop():
                raise RunStopped
            states.append(self._hidden(rows, length))
            done += len(rows)
            self._progress(done)
        with new_directory(target) as scratch:
            save_file({"hidden": torch.cat(states)}, scratch / _STATES)

    def _hidden(self, rows: Sequence[EncodedSample], length: int) -> Tensor:
        device = self._live.model.device
        try:
            return self._live.hidden(collate(rows, device=device, length=length)).cpu()
        except torch.OutOfMemoryError:
            if len(rows) == 1:
                raise
        torch.cuda.empty_cache()
        middle = len(rows) // 2
        return torch.cat([self._hidden(rows[:middle], length), self._hidden(rows[middle:], length)])

    def _progress(self, done: int) -> None:
        self._sink(Progressed(phase="caching_teacher", done=done, total=self._total, unit="rows"))

    def _passes_spot_check(self, entry: Path, found: Sequence[_Shard]) -> bool:
        step = max(1, len(found) // SPOT_CHECK_SAMPLES)
        for shard in found[::step][:SPOT_CHECK_SAMPLES]:
            row, length = shard.batches[0][0], shard.length[0]
            kept = _read(entry, shard)[row.content_digest]
            lively = self._hidden([row], length)
            if kept.shape != lively.shape or kept.dtype != lively.dtype:
                return False
            if not kept.numel():
                continue
            difference = (kept.float() - lively.float()).abs().max()
            if not difference <= _TOLERANCE[kept.dtype] * lively.float().abs().max():
                return False
        return True

    def _mapped(self, entry: Path) -> dict[str, Tensor]:
        return {content: states for shard in self._shards for content, states in _read(entry, shard).items()}


def _read(entry: Path, shard: _Shard) -> dict[str, Tensor]:
    """The states of each row, as views into the mapped file."""
    whole = load_file(entry / shard.name / _STATES)["hidden"]
    rows = list(shard.rows)
    pieces = torch.split(whole, [row.predicted_tokens for row in rows])
    return {row.content_digest: piece for row, piece in zip(rows, pieces, strict=True)}


@contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
