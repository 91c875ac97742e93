"""Out of memory: the work begins again with half the size, or is refused with the reason."""

import weakref
from collections.abc import Callable
from errno import EACCES, ENOMEM

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from pocl.errors import OutOfMemory
from pocl.out_of_memory import HalvedSize, SizeTooLarge, fit_or_refuse, is_out_of_memory, limited_by, retry_halved
from pocl.sizes import RunSizes
from pocl.train.optimizer import allocate_moments

ERRORS = {
    "device": torch.OutOfMemoryError("CUDA out of memory"),
    "host": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes"),
    "python": MemoryError(),
    "mapping": OSError(ENOMEM, "Cannot allocate memory"),
}
"""What says that memory ran out, by who says it."""
each_error = pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)


class Memory:
    """Has room for work of `room` and no more."""

    def __init__(self, room: int, size: int, error: Exception | None = None) -> None:
        self.room = room
        self.error = error or torch.OutOfMemoryError()
        self.sizes = RunSizes(micro_batch_tokens=1, loss_chunk_tokens=1, generation_rows=size, scoring_tokens=size)
        self.tried: list[int] = []

    def work(self) -> int:
        size = self.sizes.generation_rows
        self.tried.append(size)
        with limited_by("generation_rows"):
            if size > self.room:
                raise self.error
        return size

    def halve(self, size: HalvedSize) -> None:
        self.sizes = self.sizes.halved(size)


@each_error
def test_size_is_halved_until_the_work_fits(error: Exception) -> None:
    memory = Memory(room=5, size=32, error=error)
    assert retry_halved(memory.work, memory.halve) == 4
    assert memory.tried == [32, 16, 8, 4]
    assert memory.sizes.scoring_tokens == 32


def test_work_that_does_not_fit_with_a_size_of_one_is_refused_by_the_name_of_its_field() -> None:
    memory = Memory(room=0, size=4)
    with pytest.raises(OutOfMemory, match=r"evaluation\.batch_size of 1"):
        retry_halved(memory.work, memory.halve)
    assert memory.tried == [4, 2, 1]


def test_other_errors_are_left_alone() -> None:
    with pytest.raises(RuntimeError, match="else"), limited_by("scoring_tokens"):
        raise RuntimeError("something else")


def test_nothing_of_the_failed_work_is_in_memory_when_it_begins_again() -> None:
    held: list[weakref.ref[torch.Tensor]] = []

    def work() -> bool:
        if held:
            return held[0]() is None
        activations = torch.ones(3)
        held.append(weakref.ref(activations))
        with limited_by("scoring_tokens"):
            raise torch.OutOfMemoryError

    assert retry_halved(work, lambda _size: None)


def failing(times: int, error: Exception) -> Callable[[], str]:
    attempts: list[int] = []

    def work() -> str:
        attempts.append(1)
        if len(attempts) <= times:
            raise error
        return "done"

    return work


@each_error
def test_work_that_cannot_be_halved_is_tried_twice(error: Exception) -> None:
    assert fit_or_refuse(failing(1, error), "The student") == "done"
    with pytest.raises(OutOfMemory, match="The student does not fit"):
        fit_or_refuse(failing(2, error), "The student")


def test_work_that_fails_otherwise_is_not_tried_again() -> None:
    work = failing(1, OSError(EACCES, "Permission denied"))
    with pytest.raises(PermissionError):
        fit_or_refuse(work, "The student")
    assert work() == "done"


def test_size_too_large_names_the_size() -> None:
    with pytest.raises(SizeTooLarge) as caught, limited_by("scoring_tokens"):
        raise torch.OutOfMemoryError
    assert caught.value.size == "scoring_tokens"


def stepped(optimizer: AdamW, model: nn.Module) -> list[torch.Tensor]:
    """The weights after two steps."""
    for _ in range(2):
        torch.stack([weight.square().sum() for weight in model.parameters()]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return list(model.parameters())


def optimized_model() -> tuple[AdamW, nn.Module]:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    return AdamW(model.parameters(), lr=0.1, fused=True), model


def test_moments_allocated_beforehand_change_no_bit() -> None:
    plain, allocated = optimized_model(), optimized_model()
    allocate_moments(allocated[0])
    torch.testing.assert_close(stepped(*plain), stepped(*allocated), rtol=0, atol=0)


def test_allocation_of_moments_goes_on_where_memory_ran_out() -> None:
    optimizer, model = optimized_model()
    allocations: list[torch.Tensor] = []

    def zeros_like(parameter: torch.Tensor) -> torch.Tensor:
        allocations.append(parameter)
        if len(allocations) == 4:
            raise torch.OutOfMemoryError
        return torch.zeros_like(parameter)

    fit_or_refuse(lambda: allocate_moments(optimizer, zeros_like), "The state of the optimiser")
    expected, other = optimized_model()
    torch.testing.assert_close(stepped(optimizer, model), stepped(expected, other), rtol=0, atol=0)


def test_memory_that_the_host_refuses_is_told_from_other_errors() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 55, dtype=torch.uint8)
    assert is_out_of_memory(raised.value)
    assert all(map(is_out_of_memory, ERRORS.values()))
    assert not is_out_of_memory(RuntimeError("shapes differ"))
    assert not is_out_of_memory(ValueError("cannot allocate memory"))
