"""Data sets are tried within their time, the outcome is cached, and no more processes run than may."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread

import pytest

from domain.encoding_checks import EncodingBusy, EncodingCheck, EncodingChecker, check_key
from pocl.encoding_counts import EncodingCounts
from pocl.errors import DatasetInvalid, PoclError
from pocl.preview.encoder import CountedRows, EncodingAborted, EncodingInputs, PreviewPage
from pocl.spec import Data, RandomModel

ROWS = 100
SLICE = 30


def inputs(**settings: object) -> EncodingInputs:
    data = Data.model_validate({"train": {"path": "rows.jsonl"}, **settings})
    return EncodingInputs(data, RandomModel())


@dataclass
class FakeEncoder:
    """Encodes `SLICE` rows in a second of a clock of its own."""

    now: float = 0.0
    opened: int = 0
    calls: list[int] = field(default_factory=list)
    error: PoclError | None = None
    before_count: Callable[[], object] = lambda: None

    @contextmanager
    def open(self, _inputs: EncodingInputs) -> Iterator["FakeEncoder"]:
        self.opened += 1
        yield self

    def count(self, *, skip: int, parts: Mapping[str, int], seconds: float) -> CountedRows:
        # What was counted before comes back, in whatever process it is gone on.
        assert parts == ({"whole": skip} if skip else {})
        self.before_count()
        self.calls.append(skip)
        self.now += seconds
        if self.error is not None:
            raise self.error
        rows = min(SLICE, ROWS - skip)
        counts = EncodingCounts(rows=rows, tokens=2 * rows)
        return CountedRows(
            template="chat",
            counts=counts,
            rows=rows,
            done=skip + rows == ROWS,
            training_samples=None,
            parts={"whole": skip + rows},
            warnings=[],
        )

    def preview(self, *, skip: int, rows: int) -> PreviewPage:
        return PreviewPage(template="chat", end=f"{skip} {rows}", rows=[], warnings=[])

    def checker(self, seconds: float = 10, **limits: int) -> EncodingChecker:
        return EncodingChecker(seconds=seconds, open_encoder=self.open, clock=lambda: self.now, **limits)


def test_all_rows_are_tried_once_and_the_outcome_is_cached() -> None:
    encoder = FakeEncoder()
    checker = encoder.checker()
    check = checker.check(inputs(), digest="a")
    counts = EncodingCounts(rows=ROWS, tokens=2 * ROWS)
    assert check == EncodingCheck("chat", ROWS, True, counts, parts={"whole": ROWS})
    assert encoder.calls == [0, 30, 60, 90]
    assert checker.check(inputs(), digest="a") is check
    assert encoder.opened == 1


def test_check_goes_on_where_the_time_of_the_last_one_ended() -> None:
    encoder = FakeEncoder()
    checker = encoder.checker(seconds=2)
    first = checker.check(inputs(), digest="a")
    assert (first.tried, first.done) == (60, False)
    second = checker.check(inputs(), digest="a")
    assert (second.tried, second.done, second.counts.rows) == (ROWS, True, ROWS)
    assert encoder.calls == [0, 30, 60, 90]


@pytest.mark.parametrize(
    ("other", "digest"),
    [(inputs(), "b"), (inputs(max_length=300), "a"), (inputs(template="alpaca"), "a")],
)
def test_other_rows_or_settings_are_tried_anew(other: EncodingInputs, digest: str) -> None:
    encoder = FakeEncoder()
    checker = encoder.checker()
    checker.check(inputs(), digest="a")
    checker.check(other, digest=digest)
    assert encoder.opened == 2


def test_equal_rows_under_another_path_are_not_tried_again() -> None:
    encoder = FakeEncoder()
    checker = encoder.checker()
    checker.check(inputs(), digest="a")
    checker.check(inputs(train={"path": "elsewhere.jsonl"}), digest="a")
    assert encoder.opened == 1


def test_changed_file_of_the_tokenizer_is_another_key(tmp_path: Path) -> None:
    config = tmp_path / "tokenizer_config.json"
    config.write_text("{}")
    model = EncodingInputs(inputs().data, tmp_path)
    before = check_key(model, "a")
    assert check_key(model, "a") == before
    (tmp_path / "model.safetensors").write_bytes(b"weights say nothing about tokens")
    assert check_key(model, "a") == before
    config.write_text('{"chat_template": "another"}')
    assert check_key(model, "a") != before


def test_refusal_is_cached_and_a_hit_limit_is_not() -> None:
    refused = FakeEncoder(error=DatasetInvalid("row 3"))
    checker = refused.checker()
    for _ in range(2):
        assert checker.check(inputs(), digest="a").refusal is refused.error
    assert refused.opened == 1
    aborted = FakeEncoder(error=EncodingAborted("takes too long"))
    checker = aborted.checker()
    for _ in range(2):
        assert checker.check(inputs(), digest="a") == EncodingCheck()
    assert aborted.opened == 2


def test_nothing_is_tried_without_time() -> None:
    encoder = FakeEncoder()
    assert encoder.checker(seconds=0).check(inputs(), digest="a") == EncodingCheck()
    assert encoder.opened == 0


def hold(started: Event, go_on: Event) -> Callable[[], object]:
    """Says that it has started, and waits until it may go on."""

    def wait() -> None:
        started.set()
        go_on.wait(60)

    return wait


def test_concurrent_checks_of_the_same_rows_share_one() -> None:
    encoder = FakeEncoder()
    checker = encoder.checker()
    started, go_on = Event(), Event()
    encoder.before_count = hold(started, go_on)
    checks: list[EncodingCheck] = []
    threads = [Thread(target=lambda: checks.append(checker.check(inputs(), digest="a"))) for _ in range(2)]
    threads[0].start()
    assert started.wait(60)
    threads[1].start()
    go_on.set()
    for thread in threads:
        thread.join(60)
    assert [check.tried for check in checks] == [ROWS, ROWS]
    assert encoder.opened == 1


def test_more_than_may_wait_are_turned_away() -> None:
    encoder = FakeEncoder()
    checker = encoder.checker(processes=1, waiting=0)
    started, go_on = Event(), Event()
    encoder.before_count = hold(started, go_on)
    working = Thread(target=checker.check, args=(inputs(),), kwargs={"digest": "a"})
    working.start()
    assert started.wait(60)
    with pytest.raises(EncodingBusy):
        checker.preview(inputs(), skip=0, rows=1)
    # The dry run says that no row was tried.
    assert checker.check(inputs(), digest="b") == EncodingCheck()
    go_on.set()
    working.join(60)
    assert checker.preview(inputs(), skip=3, rows=2).end == "3 2"
