"""What each of several workers of one machine gets: GPUs of its own, and a part of the processors and of the memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from domain.workers.models import Device
from worker.settings import DEFAULT_ENGINE, WorkerSettings

_MIN_BYTES: Final = 2 << 30
"""Memory of a worker: an engine with its libraries and a small model."""


class TooManyWorkers(Exception):
    """The machine has not enough for so many workers; the message says what to do."""


@dataclass(frozen=True)
class WorkerShare:
    """What one of several workers may use; a worker that is alone has no share, and uses all."""

    gpus: tuple[str, ...] = ()
    """UUIDs; empty for a worker that computes on the CPU, or finds its GPUs itself."""
    memory_bytes: int | None = None
    """Of the machine's memory; null: all."""
    threads: int | None = None
    """Of its engine on the CPU; null leaves the choice to it."""

    def variables(self) -> dict[str, str]:
        """The settings of the worker, as environment variables."""
        values = {
            "POCL_WORKER_GPUS": ",".join(self.gpus) or None,
            "POCL_WORKER_MEMORY_BYTES": self.memory_bytes,
            "POCL_WORKER_THREADS": self.threads,
        }
        return {name: str(value) for name, value in values.items() if value is not None}


def divide_machine(
    options: WorkerSettings, gpus: Sequence[Device], *, memory_bytes: int, processors: int
) -> list[WorkerShare]:
    """A share for each worker of `options.count`; where that is null, for one worker per GPU (or per as many as the
    engine of a job is given), and for one without GPUs.

    Args:
        gpus: those that torch and the driver both see; none where the workers compute on the CPU.
        memory_bytes: the memory that all of them may use.
        processors: as many threads may run at once.

    Raises:
        TooManyWorkers: there is not a GPU, a processor or the memory for each.
    """
    per_job = options.gpus_per_job or (1 if options.engine == DEFAULT_ENGINE else max(1, len(gpus)))
    groups = _groups(gpus, per_job)
    count = max(1, len(groups)) if options.count is None else options.count
    if count <= 1:
        return [WorkerShare()] * count
    if gpus and count > len(groups):
        raise TooManyWorkers(
            f"{count} workers need {count * per_job} GPUs, {per_job} each, and there are {len(gpus)}: start"
            f" {len(groups)} at most (--job-workers)."
        )
    if not gpus and count > processors:
        raise TooManyWorkers(
            f"{count} workers on the CPU need a processor each, and there are {processors}: start {processors} at most"
            " (--job-workers)."
        )
    if memory_bytes // count < _MIN_BYTES:
        most = max(1, memory_bytes // _MIN_BYTES)
        raise TooManyWorkers(
            f"{count} workers need {_MIN_BYTES >> 30} GiB of memory each, and there are {memory_bytes / (1 << 30):.1f}"
            f" GiB: start {most} at most (--job-workers)."
        )
    threads = None if options.threads is not None else max(1, processors // count)
    return [WorkerShare(groups[index] if gpus else (), memory_bytes // count, threads) for index in range(count)]


def _groups(gpus: Sequence[Device], size: int) -> list[tuple[str, ...]]:
    """The GPUs of each worker, those with the most memory first; what is left over makes no group."""
    ordered = sorted(gpus, key=lambda device: -(device.memory_bytes or 0))
    uuids = [device.uuid or "" for device in ordered]
    return [tuple(uuids[start : start + size]) for start in range(0, len(uuids) - size + 1, size)]
