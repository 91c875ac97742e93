"""How workers of one machine divide it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain.workers.models import Device
from worker.settings import DEFAULT_ENGINE, WorkerSettings
from worker.shares import TooManyWorkers, WorkerShare, divide_machine

GIB = 1 << 30


def gpu(number: int, gibibytes: int = 80) -> Device:
    return Device("cuda", "GPU", gibibytes * GIB, f"GPU-{number}")


def options(**changes: object) -> WorkerSettings:
    return WorkerSettings.model_validate({"engine": DEFAULT_ENGINE, **changes})


@given(
    count=st.none() | st.integers(0, 12),
    per_job=st.none() | st.integers(1, 4),
    gpus=st.lists(st.integers(8, 192), max_size=8),
    memory=st.integers(1, 512),
    processors=st.integers(1, 64),
)
def test_shares_fit_the_machine_and_overlap_nowhere(
    count: int | None, per_job: int | None, gpus: list[int], memory: int, processors: int
) -> None:
    devices = [gpu(number, size) for number, size in enumerate(gpus)]
    try:
        shares = divide_machine(
            options(count=count, gpus_per_job=per_job), devices, memory_bytes=memory * GIB, processors=processors
        )
    except TooManyWorkers:
        return
    expected = max(1, len(gpus) // (per_job or 1)) if count is None else count
    assert len(shares) == expected
    if expected <= 1:
        assert shares == [WorkerShare()] * expected
        return
    given_away = [uuid for share in shares for uuid in share.gpus]
    assert len(set(given_away)) == len(given_away)
    assert {len(share.gpus) for share in shares} == {(per_job or 1) if gpus else 0}
    assert sum(share.memory_bytes or 0 for share in shares) <= memory * GIB
    assert all(share.threads for share in shares)
    assert sum(share.threads or 0 for share in shares) <= max(processors, len(shares))


@pytest.mark.parametrize(
    ("count", "gpus", "memory", "processors", "sentence"),
    [
        (3, 2, 64, 8, "3 workers need 3 GPUs, 1 each, and there are 2: start 2 at most (--job-workers)."),
        (3, 0, 64, 2, "3 workers on the CPU need a processor each, and there are 2: start 2 at most (--job-workers)."),
        (4, 0, 7, 8, "4 workers need 2 GiB of memory each, and there are 7.0 GiB: start 3 at most (--job-workers)."),
    ],
    ids=["GPUs", "processors", "memory"],
)
def test_more_workers_than_fit_are_refused(count: int, gpus: int, memory: int, processors: int, sentence: str) -> None:
    with pytest.raises(TooManyWorkers) as refused:
        divide_machine(
            options(count=count),
            [gpu(number) for number in range(gpus)],
            memory_bytes=memory * GIB,
            processors=processors,
        )
    assert str(refused.value) == sentence


def test_share_is_what_the_settings_of_a_worker_read(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = divide_machine(options(), [gpu(0, 24), gpu(1, 80)], memory_bytes=64 * GIB, processors=9)
    for name, value in second.variables().items():
        monkeypatch.setenv(name, value)
    read = WorkerSettings()
    assert first.gpus == ("GPU-1",), "the GPU with the most memory comes first"
    assert (read.gpus, read.memory_bytes, read.threads) == (("GPU-0",), 32 * GIB, 4)


def test_threads_that_are_set_are_kept() -> None:
    shares = divide_machine(options(count=2, threads=3), [], memory_bytes=64 * GIB, processors=4)
    assert [share.threads for share in shares] == [None, None]
