"""Events are read completely, once and in order, and reach the rows exactly once whatever the database does."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.orm import Session

from domain.database_errors import DatabaseUnavailable
from domain.db import Database
from domain.jobs import leases
from domain.jobs.repository import metric_series
from domain.jobs.states import JobStatus
from pocl.events import Warned, to_line
from pocl.layout import EVENTS_FILE
from tests.support.harness import ServiceHarness
from tests.worker.fake_engine import STEPS
from worker.attempt_dir import AttemptDir
from worker.lease import Lease
from worker.sink import EventTail, RowSink


def lines(count: int) -> bytes:
    at = datetime(2026, 1, 1, tzinfo=UTC)
    return "".join(to_line(Warned(code=f"c{n}", message="ü\u2028"), at) + "\n" for n in range(count)).encode()


@given(cuts=st.lists(st.integers(0, len(lines(5))), max_size=6))
def test_each_event_is_read_once_however_the_file_grows(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int]
) -> None:
    content, path = lines(5), tmp_path_factory.mktemp("tail") / "events.jsonl"
    tail, read = EventTail(path), []
    for cut in [*sorted(cuts), len(content)]:
        path.write_bytes(content[:cut])
        read += tail.read()
    assert [envelope.event for envelope, _ in read] == [Warned(code=f"c{n}", message="ü\u2028") for n in range(5)]
    assert [content[:offset].count(b"\n") for _, offset in read] == [1, 2, 3, 4, 5]
    assert tail.offset == len(content)


def test_tail_continues_from_an_offset(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_bytes(lines(2))
    first = EventTail(tmp_path / "events.jsonl").read()[0][1]
    rest = EventTail(tmp_path / "events.jsonl", first).read()
    assert [envelope.event for envelope, _ in rest] == [Warned(code="c1", message="ü\u2028")]


@pytest.mark.parametrize(
    "line", [b'{"at": 1}', b"not json", b"", b"\xff\xfe", b'{"event":{"type":"of tomorrow"}}', b"x" * 2**19]
)
def test_unreadable_line_is_skipped(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "events.jsonl").write_bytes(line + b"\n" + lines(1))
    assert len(EventTail(tmp_path / "events.jsonl").read()) == 1


def test_endless_line_does_not_fill_the_memory(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_bytes(b"x" * (3 * 2**20) + b"\n" + lines(1))
    tail = EventTail(tmp_path / "events.jsonl")
    assert [len(tail.read()) for _ in range(5)] == [0, 0, 0, 1, 0]


class Flaky(Database):
    """A database that fails at random: before a transaction, or after its commit, whose answer is lost."""

    def __init__(self, url: str, seed: int) -> None:
        super().__init__(url)
        self._random = random.Random(seed)
        self._count = self.failures = 0

    @contextmanager
    def transaction(self, *, write: bool) -> Iterator[Session]:
        self._count += 1
        # A claim whose answer is lost is a lost worker, which the tests of the reaper cover.
        chance = self._random.random() if self._count > 4 else 1.0
        self._fail_if(chance < 0.25)
        with super().transaction(write=write) as session:
            yield session
        self._fail_if(chance < 0.5)

    def _fail_if(self, fails: bool) -> None:
        if fails:
            self.failures += 1
            raise DatabaseUnavailable(detail="away")


class AnswerLost(Database):
    """A database whose first commit takes place, but whose answer to it never arrives."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.lost = False

    @contextmanager
    def transaction(self, *, write: bool) -> Iterator[Session]:
        with super().transaction(write=write) as session:
            yield session
        if write and not self.lost:
            self.lost = True
            raise DatabaseUnavailable(detail="the answer is lost")


def test_events_after_a_commit_whose_answer_was_lost_do_not_repeat_those_before_it(
    harness: ServiceHarness, tmp_path: Path
) -> None:
    job = harness.submit()
    with harness.database.transaction(write=True) as session:
        claim = leases.claim_next(session, worker="w", lease_seconds=60)
    assert claim is not None
    directory, flaky = AttemptDir(tmp_path), AnswerLost(harness.database_url)
    lease = Lease(harness.database, claim, seconds=60, interval=10)
    sink = RowSink(
        flaky, harness.store, lease, claim, directory, read_log=lambda _: (), max_log_bytes=1000, flush_seconds=0
    )
    directory.workdir.mkdir()
    for count in (2, 3):
        (directory.workdir / EVENTS_FILE).write_bytes(lines(count))
        sink.pump()
    flaky.close()
    assert flaky.lost
    assert [event.data["code"] for event in harness.events(job, "warning")] == ["c0", "c1", "c2"]


@pytest.mark.system
@pytest.mark.parametrize("seed", range(3))
def test_each_event_is_written_once_while_the_database_comes_and_goes(harness: ServiceHarness, seed: int) -> None:
    job = harness.submit(checkpoints={"keep": 100})
    flaky = Flaky(harness.database_url, seed)
    quick = harness.supervisor()
    replace(quick, database=flaky).work_one()
    flaky.close()
    assert flaky.failures > 0
    assert harness.job(job).status is JobStatus.SUCCEEDED
    assert [event.seq for event in harness.events(job)] == list(range(1, harness.job(job).event_seq + 1))
    assert [len(harness.events(job, kind)) for kind in ("stage_started", "run_finished", "checkpoint")] == [2, 1, 8]
    with harness.database.transaction(write=False) as session:
        (loss,) = metric_series(session, job, points=100, names=["loss"])
    assert loss.steps == tuple(range(1, STEPS + 1))
