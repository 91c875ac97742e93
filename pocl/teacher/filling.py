"""Computing the hidden states that the cache lacks: batch by batch, while a thread writes those of the batch before."""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import Queue
from threading import Thread
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from pocl.data.batches import EncodedSample
from pocl.errors import DiskFull, RunStopped
from pocl.events import Progressed, Sink
from pocl.storage.shared_cache import CacheHolder
from pocl.teacher import shards
from pocl.teacher.found_shards import FoundShards
from pocl.teacher.shards import ShardRows, TeacherBatch, max_positions_of, padded_length, plan_batches
from pocl.teacher.signal import LiveTeacher

SPOT_CHECK_SAMPLES = 4
"""Stored samples that are compared with the live teacher before others are computed beside them."""
_POLL_SECONDS = 0.2
_QUEUED_BATCHES = 2
"""Batches that wait to be written; more would only take memory."""


class Filling:
    """The live teacher at work for the cache."""

    def __init__(
        self,
        live: LiveTeacher,
        head: str,
        holder: CacheHolder,
        batch_tokens: int,
        sink: Sink,
        should_stop: Callable[[], bool],
    ) -> None:
        """`head` is the digest of the teacher's head."""
        self.head = head
        self._live = live
        self._holder = holder
        self._batch_tokens = batch_tokens
        self._sink = sink
        self._should_stop = should_stop

    def fill(self, found: FoundShards) -> None:
        """Compute what `found` lacks, or wait for it where another process computes it (single flight).

        Raises:
            DiskFull: when there is no room.
            RunStopped: when `should_stop` turns true; finished shards stay.
        """
        try:
            while missing := found.missing():
                claimed = self._holder.claim([f"{found.kind}/{sample.content_digest}" for sample in missing])
                # What was finished before it could be claimed need not be computed.
                found.scan()
                mine = [each for each in found.missing() if f"{found.kind}/{each.content_digest}" in claimed]
                if mine:
                    self._compute(mine, found)
                elif found.missing():
                    if self._should_stop():
                        raise RunStopped
                    time.sleep(_POLL_SECONDS)
        finally:
            with suppress(OSError, DiskFull):
                self._holder.drop_claims()
                self._holder.release_reservation()

    def _compute(self, samples: Sequence[EncodedSample], found: FoundShards) -> None:
        batches = plan_batches(samples, self._batch_tokens, max_positions_of(self._live.model))
        done = len(found.found())
        total = len(found.samples)
        with _ShardWriter(self._holder, found.kind, self.head) as writer:
            for batch in batches:
                if self._should_stop():
                    raise RunStopped
                states = live_states(self._live, batch)
                # The first batch shows what a state takes.
                if batch is batches[0] and not self._holder.reserve(_bytes_of(batches, states)):
                    raise DiskFull("it does not fit within the bound of the cache")
                writer.put(batch, states)
                done += len(batch.samples)
                self._sink(Progressed(phase="caching_teacher", done=done, total=total, unit="rows"))
        for key, shard in writer.written:
            found.add(key, shard)


def live_states(live: LiveTeacher, batch: TeacherBatch) -> Tensor:
    """The hidden states of a batch in the format that they are stored in, `[tokens, width]`, on the teacher's device.

    Dummy samples have none.
    """
    states = live.hidden(batch.collate(live.model.device))
    stored_format = shards.stored_format(live.model, live.precision)
    return states if stored_format is None else states.to(stored_format)


def spot_check(live: LiveTeacher, found: FoundShards, batch_tokens: int) -> bool:
    """Whether a few stored samples have the states that the live teacher gives them, but for rounding."""
    shortest = min((padded_length(each, max_positions_of(live.model)) for each in found.found()), default=None)
    if shortest is None:
        return True
    alike = [each for each in found.found() if padded_length(each, max_positions_of(live.model)) == shortest]
    batch, *_ = plan_batches(alike, batch_tokens, max_positions_of(live.model))
    batch = TeacherBatch(batch.samples[:SPOT_CHECK_SAMPLES], batch.rows, batch.length)
    stored = found.map_states()
    cached = torch.cat([stored[sample.content_digest] for sample in batch.samples])
    expected = live_states(live, batch).cpu()
    if cached.shape != expected.shape or cached.dtype != expected.dtype:
        return False
    if not cached.numel():
        return True
    difference = (cached.float() - expected.float()).abs().max()
    return bool(difference <= shards.TOLERANCE[live.precision.name] * expected.float().abs().max())


class _ShardWriter:
    """Collects batches to shards, and adds these to the cache in a thread of its own.

    Raises:
        DiskFull, OSError: from any method, what the thread met.
    """

    def __init__(self, holder: CacheHolder, kind: str, head: str) -> None:
        self.written: list[tuple[str, ShardRows]] = []
        """Key and rows of each shard."""
        self._holder = holder
        self._kind = kind
        self._head = head
        self._queue: Queue[tuple[TeacherBatch, Tensor, torch.cuda.Event | None] | None] = Queue(_QUEUED_BATCHES)
        self._error: Exception | None = None
        self._is_abandoned = False
        self._thread = Thread(target=self._run, name="shard-writer", daemon=True)

    def put(self, batch: TeacherBatch, states: Tensor) -> None:
        """Have the states of a batch written; blocks while the thread is behind."""
        self._raise_error()
        self._queue.put((batch, *_to_host(states)))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_abandoned = kind is not None
        self._queue.put(None)
        self._thread.join()
        if kind is None:
            self._raise_error()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        pending: list[tuple[TeacherBatch, Tensor]] = []
        while (item := self._queue.get()) is not None:
            # After an error the queue is still emptied, so that nobody waits for room in it.
            if self._error is not None or self._is_abandoned:
                continue
            batch, states, copied = item
            if copied is not None:
                copied.synchronize()
            pending.append((batch, states))
            if sum(each.predicted_tokens for each, _ in pending) >= shards.SHARD_TOKENS:
                self._write(pending)
                pending = []
        if pending and self._error is None and not self._is_abandoned:
            self._write(pending)

    def _write(self, pending: Sequence[tuple[TeacherBatch, Tensor]]) -> None:
        samples = [sample for batch, _ in pending for sample in batch.samples]
        shard = ShardRows(self._head, {sample.content_digest: sample.predicted_tokens for sample in samples})
        try:
            with self._holder.add(self._kind, shard.key) as scratch:
                shard.write(scratch, torch.cat([states for _, states in pending]))
        except Exception as error:  # noqa: BLE001 # Whatever it is, it is raised where the batches come from.
            self._error = error
        else:
            self.written.append((shard.key, shard))


def _to_host(states: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """States in memory of the host, and the event after which they are there; None where they are there already."""
    if states.device.type != "cuda":
        return states, None
    staging = torch.empty(states.shape, dtype=states.dtype, pin_memory=True)
    staging.copy_(states, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()
    return staging, copied


def _bytes_of(batches: Sequence[TeacherBatch], states: Tensor) -> int:
    """At most so many bytes do the shards of these batches take, measured by the states of one of them."""
    tokens = sum(batch.predicted_tokens for batch in batches)
    rows = sum(len(batch.samples) for batch in batches)
    shard_count = tokens // shards.SHARD_TOKENS + 1
    state_bytes = tokens * states.shape[1] * states.element_size()
    return state_bytes + shard_count * shards.SHARD_OVERHEAD_BYTES + rows * shards.ROW_OVERHEAD_BYTES
