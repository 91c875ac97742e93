"""The log of a child process stays small and keeps its end."""

from pathlib import Path

from worker.bounded_log import BoundedLog


def test_full_log_keeps_its_newer_half_and_the_writer_goes_on(tmp_path: Path) -> None:
    log = BoundedLog(tmp_path / "logs" / "x.log", limit=1000)
    with log.open() as writer:
        for number in range(500):
            writer.write(b"line %d\n" % number)
            writer.flush()
            log.trim()
            assert log.path.stat().st_size <= 1100
    assert log.tail(10_000).endswith(b"line 498\nline 499\n")
    assert log.path.read_bytes().startswith(b"[older lines dropped]\n")


def test_tail_starts_with_a_complete_line(tmp_path: Path) -> None:
    log = BoundedLog(tmp_path / "x.log", limit=1000)
    with log.open() as writer:
        writer.write(b"first\nsecond\nthird\n")
    assert log.tail(9) == b"third\n"
    assert log.tail(1000) == b"first\nsecond\nthird\n"


def test_missing_log_reads_as_empty(tmp_path: Path) -> None:
    log = BoundedLog(tmp_path / "x.log", limit=1000)
    log.trim()
    assert log.tail(10) == b""
