"""Lines of the log: JSON, of bounded length, whatever is logged."""

import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import structlog
from hypothesis import given, settings
from hypothesis import strategies as st

from domain import logs


@pytest.fixture
def written() -> Iterator[io.StringIO]:
    """What a process writes after :func:`domain.logs.configure`."""
    before = structlog.get_config()
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    stream = io.StringIO()
    logs.configure()
    (handler,) = root.handlers
    assert isinstance(handler, logging.StreamHandler)
    handler.setStream(stream)
    yield stream
    structlog.configure(**before)
    root.handlers[:], root.level = handlers, level


def test_a_line_has_the_context_in_which_it_was_logged(written: io.StringIO) -> None:
    with structlog.contextvars.bound_contextvars(request_id="r1", job_id="job_1", attempt=2):
        structlog.get_logger("ours").warning("something", number=1)
        logging.getLogger("theirs").warning("something %s", "else")
    ours, theirs = map(json.loads, written.getvalue().splitlines())
    for line in (ours, theirs):
        assert (line["request_id"], line["job_id"], line["attempt"]) == ("r1", "job_1", 2)
        assert line["level"] == "warning"
        assert line["timestamp"]
    assert (ours["event"], ours["number"], ours["logger"]) == ("something", 1, "ours")
    assert (theirs["event"], theirs["logger"]) == ("something else", "theirs")


def test_a_long_traceback_keeps_its_beginning_and_its_end(written: io.StringIO) -> None:
    def fail(depth: int) -> None:
        if depth == 0:
            raise ValueError("x" * 100_000 + "the end")
        fail(depth - 1)

    try:
        fail(3)
    except ValueError:
        structlog.get_logger().exception("failed", job_id="job_1")
    (line,) = written.getvalue().splitlines()
    assert len(line) <= logs.MAX_LINE_LENGTH
    parsed = json.loads(line)
    assert parsed["shortened"] is True
    assert parsed["job_id"] == "job_1"
    assert parsed["exception"].startswith("Traceback")
    assert parsed["exception"].endswith("the end")


_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner, max_size=5),
    max_leaves=10,
)


@given(
    fields=st.dictionaries(st.text("abcdefgh", min_size=1, max_size=200), _values, max_size=60),
    repeat=st.integers(1, 3000),
)
@settings(max_examples=12, deadline=None)
def test_every_line_is_json_of_bounded_length(fields: dict[str, Any], repeat: int) -> None:
    long = {name: value * repeat if isinstance(value, str) else value for name, value in fields.items()}
    line = logs._render(None, "info", {**long, "event": "e" * repeat, "level": "info", "timestamp": "now"})
    assert len(line) <= logs.MAX_LINE_LENGTH
    parsed = json.loads(line)
    assert parsed["level"] == "info"
    assert parsed["event"].startswith("e")
