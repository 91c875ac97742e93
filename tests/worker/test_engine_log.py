"""What clients see of an engine's log: each line once, whole, without what they must not see."""

import random
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain.jobs.engine_logs import MAX_CHUNK_BYTES, LogChunk
from worker.bounded_log import BoundedLog
from worker.engine_log import MAX_READ_BYTES, EngineLogReader

SECRET = b"hf_secret"


def join(chunks: list[LogChunk]) -> bytes:
    """The text of chunks that follow one another."""
    assert all(one.end == other.start for one, other in pairwise(chunks))
    assert all(0 < len(chunk.content) <= MAX_CHUNK_BYTES for chunk in chunks)
    return b"".join(chunk.content for chunk in chunks)


@given(
    lines=st.lists(st.sampled_from(["a", "käse \U0001f9c0", "token hf_secret", "12 %\r13 %", ""]), max_size=12),
    seed=st.integers(0, 1000),
)
def test_each_line_is_passed_on_once_and_redacted(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], seed: int
) -> None:
    chosen = random.Random(seed)
    content = "\n".join(lines).encode()
    cuts = sorted(chosen.randrange(len(content) + 1) for _ in range(4))
    path = tmp_path_factory.mktemp("log") / "engine.log"
    log = BoundedLog(path, limit=1 << 20)
    reader = EngineLogReader(log, lambda text: text.replace(SECRET, b"<secret>"))
    chunks: list[LogChunk] = []
    with log.open() as engine:
        for begin, end in zip([0, *cuts], [*cuts, len(content)], strict=True):
            engine.write(content[begin:end])
            engine.flush()
            chunks += reader.read(final=False)
            log.trim()
    chunks += reader.read(final=True)
    assert join(chunks) == content.replace(SECRET, b"<secret>")
    assert not reader.has_more


def test_an_engine_that_writes_too_much_is_told_about(tmp_path: Path) -> None:
    log = BoundedLog(tmp_path / "engine.log", limit=1 << 20)
    reader = EngineLogReader(log, lambda text: text)
    with log.open() as engine:
        engine.write(b"first\n")
        engine.flush()
        first = reader.read(final=False)
        engine.write(b"x" * 99 + b"\n")
        engine.write((b"y" * 99 + b"\n") * 5000)
        engine.flush()
        second = reader.read(final=False)
        log.trim()
        engine.write(b"last")
        engine.flush()
        third = reader.read(final=True)
    assert join([*first, *second, *third]).startswith(b"first\n")
    text = join(second)
    left_out = 100 * 5001 - MAX_READ_BYTES
    assert text.startswith(b"\n[%d bytes of the log were not kept]\n" % left_out)
    assert len(text) < MAX_READ_BYTES + 100
    assert join(third) == b"last"


def test_what_a_trim_drops_unread_is_counted(tmp_path: Path) -> None:
    log = BoundedLog(tmp_path / "engine.log", limit=1000)
    reader = EngineLogReader(log, lambda text: text)
    with log.open() as engine:
        for number in range(200):
            engine.write(b"line %03d\n" % number)
            engine.flush()
        log.trim()
        text = join(reader.read(final=False))
        assert text.endswith(b"line 198\nline 199\n")
        assert b"older lines" not in text
        dropped = int(text.split(b"[", 1)[1].split(b" ", 1)[0])
        assert dropped + text.count(b"line") * 9 == 200 * 9
        engine.write(b"more\n")
        engine.flush()
        assert join(reader.read(final=False)) == b"more\n"


def test_a_line_without_an_end_is_not_held_back_for_ever(tmp_path: Path) -> None:
    log = BoundedLog(tmp_path / "engine.log", limit=1 << 20)
    reader = EngineLogReader(log, lambda text: text)
    with log.open() as engine:
        engine.write("ä".encode() * 20_000)
        engine.flush()
        assert join(reader.read(final=False)) == "ä".encode() * 20_000
        engine.write(b"rest")
        engine.flush()
        assert reader.read(final=False) == []
    assert join(reader.read(final=True)) == b"rest"
