"""Preparing the next micro-batch while the device works on the one before (prefetching).

A thread makes its tensors and reads the teacher's states for it from the cache. On CUDA it copies them on a stream of
its own (a copy stream), so that the copies overlap with the products of the step. What is computed is the same, to the
bit.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from pocl.data.batches import Batch

PieceT = TypeVar("PieceT")


@dataclass(frozen=True)
class MicroBatchInputs:
    """What the loss of a micro-batch is computed from."""

    batch: Batch
    teacher_states: Tensor | None
    """The teacher's hidden states for the batch, `[T, width]`; None where the loss takes none, or computes them."""


class Prefetcher:
    """Prepares micro-batches one ahead."""

    def __init__(self, device: torch.device) -> None:
        """`device` is that of the batches."""
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def ahead(
        self, pieces: Sequence[PieceT], prepare: Callable[[PieceT], MicroBatchInputs]
    ) -> Iterator[MicroBatchInputs]:
        """The inputs of each piece in order; while those of one are used, those of the next are prepared.

        What `prepare` raises is raised where its inputs would be. It must not use what the current stream computes.
        """
        with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as pool:
            following: list[Future[tuple[MicroBatchInputs, torch.cuda.Event | None]]] = []
            for piece in pieces[:1]:
                following.append(pool.submit(self._prepare, prepare, piece))
            for index in range(len(pieces)):
                inputs, copied = following.pop().result()
                for piece in pieces[index + 1 : index + 2]:
                    following.append(pool.submit(self._prepare, prepare, piece))
                if copied is not None:
                    self._hand_over(inputs, copied)
                yield inputs

    def _prepare(
        self, prepare: Callable[[PieceT], MicroBatchInputs], piece: PieceT
    ) -> tuple[MicroBatchInputs, torch.cuda.Event | None]:
        """The inputs, and the event after which they are on the device; None where they are there already."""
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            inputs = prepare(piece)
            if self._stream is None:
                return inputs, None
            copied = torch.cuda.Event()
            copied.record(self._stream)
            return inputs, copied

    def _hand_over(self, inputs: MicroBatchInputs, copied: torch.cuda.Event) -> None:
        """Let the current stream wait for the copies, and keep their memory until it is done with them."""
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(copied)
        # The tensors of a batch share one buffer, so one of them stands for all.
        for tensor in (inputs.batch.input_ids, inputs.teacher_states):
            if tensor is not None:
                tensor.record_stream(stream)
