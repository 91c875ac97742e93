"""The journal of a ranking: what was written survives, what was not is measured again, in the same batches."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocl.curriculum.journal import DifficultyMeasurement, Journal
from pocl.curriculum.measurer import measure_batches

BATCHES = [[4, 1], [0, 5], [2, 3], [6]]
KEY = "k"


def measurement(row: int) -> DifficultyMeasurement:
    return DifficultyMeasurement(
        row=row, digest=f"{row:064x}", rouge_l=row / 7, cross_entropy=1 / (row + 3), response="é\u2028\n"
    )


def measure_all(path: Path, key: str = KEY) -> tuple[list[DifficultyMeasurement], list[list[int]]]:
    """All measurements, and the batches that had to be measured."""
    measured_batches: list[list[int]] = []

    def measure_batch(rows: Sequence[int]) -> list[DifficultyMeasurement]:
        measured_batches.append(list(rows))
        return [measurement(row) for row in rows]

    with Journal(path, key) as journal:
        return measure_batches(BATCHES, measure_batch, journal), measured_batches


@pytest.fixture(scope="module")
def complete_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "partial"
    measure_all(path)
    return path.read_bytes()


EXPECTED = [measurement(row) for batch in BATCHES for row in batch]


@given(data=st.data())
def test_journal_truncated_anywhere_is_completed_to_the_same_file(
    tmp_path_factory: pytest.TempPathFactory, complete_file: bytes, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("cut") / "partial"
    cut = data.draw(st.integers(0, len(complete_file)))
    path.write_bytes(complete_file[:cut])
    measurements, measured_batches = measure_all(path)
    assert measurements == EXPECTED
    assert measured_batches == BATCHES[complete_file[:cut].count(b"\n") :]
    assert path.read_bytes() == complete_file


@given(data=st.data())
def test_changed_byte_is_detected(
    tmp_path_factory: pytest.TempPathFactory, complete_file: bytes, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("changed") / "partial"
    at, by = data.draw(st.integers(0, len(complete_file) - 1)), data.draw(st.integers(1, 255))
    path.write_bytes(complete_file[:at] + bytes([complete_file[at] ^ by]) + complete_file[at + 1 :])
    assert measure_all(path)[0] == EXPECTED


def test_measurements_of_other_inputs_are_ignored(tmp_path: Path) -> None:
    measure_all(tmp_path / "partial")
    assert measure_all(tmp_path / "partial", "another")[1] == BATCHES
    assert measure_all(tmp_path / "partial", "another")[1] == []


def test_progress_counts_loaded_and_measured_samples(tmp_path: Path) -> None:
    reports: list[tuple[int, int]] = []
    with Journal(tmp_path / "partial", KEY) as journal:
        journal.append([measurement(4), measurement(1)])
        measure_batches(
            BATCHES,
            lambda rows: [measurement(row) for row in rows],
            journal,
            lambda done, total: reports.append((done, total)),
        )
    assert reports == [(2, 7), (4, 7), (6, 7), (7, 7)]


@pytest.mark.system
def test_killed_process_loses_no_finished_batch(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from pocl.curriculum.journal import Journal, DifficultyMeasurement\n"
        "with Journal(Path(sys.argv[1]), 'k') as journal:\n"
        "    for row in range(10**6):\n"
        "        journal.append([DifficultyMeasurement(row, 'd', 1.0, 2.0, 'r')])\n"
        "        print(row, flush=True)\n"
    )
    path = tmp_path / "partial"
    with subprocess.Popen([sys.executable, "-c", program, path], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        printed_rows = [int(process.stdout.readline()) for _ in range(20)]
        process.kill()
    with Journal(path, KEY) as journal:
        assert journal.get(printed_rows) == [DifficultyMeasurement(row, "d", 1.0, 2.0, "r") for row in printed_rows]
