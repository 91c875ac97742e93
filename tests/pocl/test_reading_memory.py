"""What the reading of a data file takes of the memory, whatever is in it."""

import subprocess
import sys
from pathlib import Path

import pytest

GOOD = b'{"instruction": "Count to three.", "output": "One, two, three."}\n'
BAD = b'{"output": "One, two, three."}\n'
# In a process of its own, since a peak is never taken back.
PROGRAM = """
import resource, sys
from pathlib import Path
from pocl.errors import DatasetInvalid
from pocl.samples.reading import store_samples
from pocl.spec import ReadOptions
source, target = Path(sys.argv[1]), Path(sys.argv[2])
source.with_name("small").write_bytes(source.open("rb").readline(100) + b"\\n")
outcome = ""
for file in (source.with_name("small"), source):
    try:
        outcome = f"{store_samples(file, target, ReadOptions()).rows} samples"
    except DatasetInvalid as error:
        outcome = f"{len(error.field_errors)} {error.message[:70]}"
    if file != source:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024, outcome)
"""


def read(source: Path) -> tuple[int, str]:
    """By how many MiB the peak grows, after a file of one short line was read; and the outcome."""
    command = [sys.executable, "-c", PROGRAM, str(source), str(source.with_name("stored"))]
    growth, _, outcome = subprocess.run(command, check=True, capture_output=True, text=True).stdout.partition(" ")
    return int(growth), outcome.strip()


def write(path: Path, piece: bytes, times: int) -> Path:
    with path.open("wb") as file:
        for _ in range(times // 1000):
            file.write(piece * 1000)
    return path


@pytest.mark.system
@pytest.mark.parametrize(
    ("line", "outcome"),
    [(GOOD, "{count} samples"), (BAD, "20 {count} of {count} rows of the data file are invalid")],
    ids=["good", "bad"],
)
@pytest.mark.parametrize("count", [10**5, pytest.param(4 * 10**5, marks=pytest.mark.slow)])
def test_lines_are_read_one_at_a_time(tmp_path: Path, line: bytes, outcome: str, count: int) -> None:
    growth, said = read(write(tmp_path / "rows", line, count))
    assert said.startswith(outcome.format(count=count))
    assert growth < 16


@pytest.mark.system
@pytest.mark.parametrize("character", [b"x", b"[", b'"', b"\0", b" "], ids=repr)
def test_huge_line_is_never_held_in_memory(tmp_path: Path, character: bytes) -> None:
    growth, said = read(write(tmp_path / "rows", character * 1024, 128 * 1024))
    # An array that nests without end is no row that could be named.
    assert ("nest" in said) if character == b"[" else said.startswith("1 1 of 1 rows")
    assert growth < 16
