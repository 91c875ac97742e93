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


def sample(row: int) -> DifficultyMeasurement:
    return DifficultyMeasurement(
        row=row, digest=f"{row:064x}", rouge_l=row / 7, cross_entropy=1 / (row + 3), response="é\u2028\n"
    )


def measured(path: Path, key: str = KEY) -> tuple[list[DifficultyMeasurement], list[list[int]]]:
    """All measurements, and the batches that had to be made."""
    made: list[list[int]] = []

    def of_batch(rows: Sequence[int]) -> list[DifficultyMeasurement]:
        made.append(list(rows))
        return [sample(row) for row in rows]

    with Journal(path, key) as journal:
        return measure_batches(BATCHES, of_batch, journal), made


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "partial"
    measured(path)
    return path.read_bytes()


EXPECTED = [sample(row) for batch in BATCHES for row in batch]


@given(data=st.data())
def test_cut_anywhere_it_goes_on_to_the_same_file(
    tmp_path_factory: pytest.TempPathFactory, whole: bytes, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("cut") / "partial"
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    found, made = measured(path)
    assert found == EXPECTED
    assert made == BATCHES[whole[:cut].count(b"\n") :]
    assert path.read_bytes() == whole


@given(data=st.data())
def test_a_changed_byte_is_never_believed(
    tmp_path_factory: pytest.TempPathFactory, whole: bytes, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("changed") / "partial"
    at, by = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(1, 255))
    path.write_bytes(whole[:at] + bytes([whole[at] ^ by]) + whole[at + 1 :])
    assert measured(path)[0] == EXPECTED


def test_measurements_of_other_inputs_are_not_used(tmp_path: Path) -> None:
    measured(tmp_path / "partial")
    assert measured(tmp_path / "partial", "another")[1] == BATCHES
    assert measured(tmp_path / "partial", "another")[1] == []


def test_progress_counts_samples_found_and_made(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    with Journal(tmp_path / "partial", KEY) as journal:
        journal.append([sample(4), sample(1)])
        measure_batches(
            BATCHES, lambda rows: [sample(row) for row in rows], journal, lambda done, total: seen.append((done, total))
        )
    assert seen == [(2, 7), (4, 7), (6, 7), (7, 7)]


def test_a_killed_process_loses_no_finished_batch(tmp_path: Path) -> None:
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
        told = [int(process.stdout.readline()) for _ in range(20)]
        process.kill()
    with Journal(path, KEY) as journal:
        assert journal.get(told) == [DifficultyMeasurement(row, "d", 1.0, 2.0, "r") for row in told]
