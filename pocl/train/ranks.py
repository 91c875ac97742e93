"""Data parallelism: the ranks (processes) that share one optimiser step.

The gradient of a step is the sum over the valid response tokens of all its micro-batches on all ranks,
divided by their number. So ranks sum numbers and gradients (all-reduce), and never average.
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
"""Numbers of a bucket of gradients: enough to make the start of a collective call small beside the transfer."""


class Ranks(Protocol):
    """The ranks of a run, as each of them sees them.

    All ranks call the same methods in the same order, each with numbers and gradients of its own.
    """

    @property
    def rank(self) -> int:
        """The number of this process, from 0."""
        ...

    @property
    def world_size(self) -> int:
        """How many processes there are."""
        ...

    def local_samples(self, samples: Sequence[EncodedSample]) -> list[EncodedSample]:
        """The samples of this rank, of the `samples` of an optimiser step; there may be none.

        `samples` are equal on all ranks, and each of them goes to one rank.
        """
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
    """A run of one process, whose sums are those of all."""

    rank: int = 0
    world_size: int = 1

    def local_samples(self, samples: Sequence[EncodedSample]) -> list[EncodedSample]:
        return list(samples)

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
    """The device of this rank's tensors."""

    def local_samples(self, samples: Sequence[EncodedSample]) -> list[EncodedSample]:
        return assign_samples(samples, self.world_size)[self.rank]

    def all_reduce_(self, tensor: Tensor) -> None:
        dist.all_reduce(tensor)

    def all_reduce_number(self, number: float) -> float:
        tensor = torch.tensor(number, dtype=torch.float64, device=self.device)
        self.all_reduce_(tensor)
        return tensor.item()

    def all_reduce_gradients(self, parameters: Iterable[Tensor]) -> None:
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        # An expert that no token of this rank chose has no gradient here, and takes part in the sum where another rank
        # has one. A parameter without gradient on any rank keeps none, since the optimiser would otherwise decay it.
        has_gradient = torch.tensor(
            [parameter.grad is not None for parameter in trained], dtype=torch.int32, device=self.device
        )
        self.all_reduce_(has_gradient)
        gradients = []
        for parameter, ranks_with_gradient in zip(trained, has_gradient.tolist(), strict=True):
            if ranks_with_gradient and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if parameter.grad is not None:
                gradients.append(parameter.grad)
        for bucket in _buckets(gradients):
            flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
            self.all_reduce_(flat)
            for gradient, total in zip(bucket, torch.split(flat, [member.numel() for member in bucket]), strict=True):
                gradient.copy_(total.view_as(gradient))


@contextmanager
def process_group(
    device: torch.device, *, rank: int, world_size: int, init_method: str, timeout: timedelta
) -> Iterator[ProcessGroup]:
    """Join the process group, over NCCL on a GPU and Gloo elsewhere, and leave it at the end.

    Args:
        device: The device of this rank's tensors.
        rank: The number of this process, from 0 to `world_size` - 1.
        world_size: How many processes there are.
        init_method: Rendezvous of the processes, such as `file:///path/of/a/new/file` or `tcp://host:port`.
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


def assign_samples(samples: Sequence[EncodedSample], world_size: int) -> list[list[EncodedSample]]:
    """The samples of each rank, by serpentine assignment: from long to short, in snake order over the ranks.

    No two ranks then differ by more tokens than the longest sample has. The order of `samples` has no influence.
    """
    assigned: list[list[EncodedSample]] = [[] for _ in range(world_size)]
    by_length = sorted(
        samples, key=lambda sample: (len(sample.input_ids), sample.digest, sample.input_ids), reverse=True
    )
    for index, sample in enumerate(by_length):
        round_, place = divmod(index, world_size)
        assigned[place if round_ % 2 == 0 else world_size - 1 - place].append(sample)
    return assigned


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Consecutive gradients of one dtype, up to `_BUCKET_ELEMENTS` numbers together unless one alone is larger."""
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
