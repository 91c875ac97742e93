"""The processes that share one optimiser step.

The gradient of a step is the sum over the valid response tokens of all its micro-batches on all ranks,
divided by their number. Ranks therefore add up numbers and gradients, and never average.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from pocl.data.batches import EncodedSample

_BUCKET_ELEMENTS = 1 << 23


class Ranks(Protocol):
    """All ranks call the same methods in the same order, each with numbers and gradients of its own."""

    @property
    def rank(self) -> int:
        """Of this process, from 0."""
        ...

    @property
    def world_size(self) -> int: ...

    def local_samples(self, rows: Sequence[EncodedSample]) -> list[EncodedSample]:
        """Of the rows of an optimiser step, equal on all ranks, those of this rank; there may be none."""
        ...

    def all_reduce_(self, tensor: Tensor) -> None:
        """Replace `tensor` by its sum over all ranks."""
        ...

    def all_reduce_number(self, number: float) -> float:
        """The sum over all ranks, in float64."""
        ...

    def all_reduce_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace each gradient by its sum over all ranks; a missing one counts as zero where another has one."""
        ...


@dataclass(frozen=True)
class SingleProcess:
    """One process: there is nothing to share and nobody to ask."""

    rank: int = 0
    world_size: int = 1

    def local_samples(self, rows: Sequence[EncodedSample]) -> list[EncodedSample]:
        return list(rows)

    def all_reduce_(self, tensor: Tensor) -> None:
        """Already the sum."""

    def all_reduce_number(self, number: float) -> float:
        return number

    def all_reduce_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Already the sums."""


@dataclass(frozen=True)
class ProcessGroup:
    """The default process group of torch.distributed; see :func:`process_group`."""

    rank: int
    world_size: int
    device: torch.device
    """Where the tensors of this rank are."""

    def local_samples(self, rows: Sequence[EncodedSample]) -> list[EncodedSample]:
        return assign_samples(rows, self.world_size)[self.rank]

    def all_reduce_(self, tensor: Tensor) -> None:
        dist.all_reduce(tensor)

    def all_reduce_number(self, number: float) -> float:
        tensor = torch.tensor(number, dtype=torch.float64, device=self.device)
        self.all_reduce_(tensor)
        return tensor.item()

    def all_reduce_gradients(self, parameters: Iterable[Tensor]) -> None:
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        # An expert that no token of this rank chose has no gradient here, and must take part where others have one;
        # what has none anywhere keeps none, as the optimiser would otherwise decay it.
        owned = torch.tensor(
            [parameter.grad is not None for parameter in trained], dtype=torch.int32, device=self.device
        )
        self.all_reduce_(owned)
        gradients = []
        for parameter, ranks in zip(trained, owned.tolist(), strict=True):
            if ranks and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if parameter.grad is not None:
                gradients.append(parameter.grad)
        for bucket in _buckets(gradients):
            flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
            self.all_reduce_(flat)
            for gradient, part in zip(bucket, torch.split(flat, [each.numel() for each in bucket]), strict=True):
                gradient.copy_(part.view_as(gradient))


@contextmanager
def process_group(
    device: torch.device, *, rank: int, world_size: int, init_method: str, timeout: timedelta
) -> Iterator[ProcessGroup]:
    """Join the other ranks, over NCCL on a GPU and Gloo elsewhere, and leave them at the end.

    Args:
        device: Of this rank.
        rank: From 0 to `world_size` - 1, another for each process.
        world_size: Processes in all.
        init_method: Where they meet, such as `file:///path/of/a/new/file` or `tcp://host:port`.
        timeout: How long a rank waits for the others before it fails.
    """
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=init_method,
        rank=rank,
        world_size=world_size,
        timeout=timeout,
        device_id=device if device.type == "cuda" else None,
    )
    try:
        yield ProcessGroup(rank, world_size, device)
    finally:
        dist.destroy_process_group()


def assign_samples(rows: Sequence[EncodedSample], ranks: int) -> list[list[EncodedSample]]:
    """The rows of each rank: from long to short, dealt to and fro, so that no two ranks differ by more tokens
    than the longest row has. The order of `rows` has no influence.
    """
    hands: list[list[EncodedSample]] = [[] for _ in range(ranks)]
    order = sorted(rows, key=lambda row: (len(row.input_ids), row.digest, row.input_ids), reverse=True)
    for at, row in enumerate(order):
        turn, place = divmod(at, ranks)
        hands[place if turn % 2 == 0 else ranks - 1 - place].append(row)
    return hands


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one type, together of a size at which a collective call is worth its start."""
    bucket: list[Tensor] = []
    elements = 0
    for gradient in gradients:
        if bucket and (gradient.dtype != bucket[0].dtype or elements + gradient.numel() > _BUCKET_ELEMENTS):
            yield bucket
            bucket, elements = [], 0
        bucket.append(gradient)
        elements += gradient.numel()
    if bucket:
        yield bucket
