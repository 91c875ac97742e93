"""Running out of the memory of a device or of the host: what was too large is halved, and the work begins again.

Every phase of a run comes here. Work whose size can be halved says by which size it is limited (:func:`limited_by`),
and whoever pinned that size runs the work with :func:`retry_halved`. A size that was halved is pinned again, so that a
resumed run takes the same one and ends in the same bits. Work that cannot be made smaller is tried a second time once
memory is released (:func:`fit_or_refuse`). Micro-batches of training are halved in :mod:`pocl.train.accumulation`,
where all processes of a step must agree, and batches of the teacher where its states are stored.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from errno import ENOMEM
from typing import Literal, TypeVar

import torch

from pocl.errors import OutOfMemory

T = TypeVar("T")
HalvedSize = Literal["generation_rows", "scoring_tokens"]
"""The sizes of :class:`pocl.sizes.RunSizes` that are halved for a whole phase."""
HALVED_IS_NOT_EXACT = "memory ran out, and a size was halved: with more free memory sums would round differently"
"""Why a run in which a size was halved may end in other bits when it is repeated."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that the device or the host has no more memory.

    Where the host refuses memory, as under a limit of the process, PyTorch reports it as a plain RuntimeError, and a
    file that cannot be mapped is an OSError.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == ENOMEM
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)


class SizeTooLarge(Exception):
    """Memory ran out in work that `size` limits."""

    def __init__(self, size: HalvedSize) -> None:
        super().__init__(f"out of memory: {size} is too large")
        self.size = size


@contextmanager
def limited_by(size: HalvedSize) -> Iterator[None]:
    """While the context lasts, running out of memory is :class:`SizeTooLarge`.

    Raises:
        SizeTooLarge: memory ran out.
    """
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise SizeTooLarge(size) from error
        raise


def retry_halved(work: Callable[[], T], halve: Callable[[HalvedSize], None]) -> T:
    """The result of `work`, begun again as often as a size is too large for it, after `halve` of that size.

    Raises:
        OutOfMemory: `halve` found nothing left to halve.
    """
    while True:
        try:
            return work()
        except SizeTooLarge as error:
            size = error.size
        # The exception is gone by here, and with it the frames that held tensors.
        release_memory()
        halve(size)


def fit_or_refuse(work: Callable[[], T], what: str) -> T:
    """The result of `work`, which cannot be made smaller; tried a second time once memory is released.

    Args:
        work: May be called twice.
        what: Names, in a sentence, what the memory is for.

    Raises:
        OutOfMemory: memory ran out both times.
    """
    try:
        return work()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    release_memory()
    try:
        return work()
    except Exception as error:
        if is_out_of_memory(error):
            raise OutOfMemory(f"{what} does not fit into the memory of the device.") from error
        raise


def release_memory() -> None:
    """Collect what nobody refers to, and give the memory that the allocator keeps back to the device."""
    gc.collect()
    torch.cuda.empty_cache()
