"""Counters of several processes: any of them knows the totals, whoever has ended and however."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from api.metrics.process_values import PrivateValues, SharedValues, open_values

COUNT, GAUGE = ("requests_total", "GET"), ("open",)


class Processes:
    """Processes of a directory, as it were: each with a file of its own, until it ends."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.live: list[SharedValues] = []

    def start(self) -> SharedValues:
        values = SharedValues(self.directory)
        self.live.append(values)
        return values

    def end(self, values: SharedValues) -> None:
        self.live.remove(values)
        values.close()

    def end_all(self) -> None:
        for values in list(self.live):
            self.end(values)


@pytest.fixture
def processes_of(tmp_path: Path) -> Iterator[Processes]:
    processes = Processes(tmp_path)
    yield processes
    processes.end_all()


def totals(values: SharedValues) -> tuple[float, float]:
    known = values.totals()
    return known.get(COUNT, 0.0), known.get(GAUGE, 0.0)


def test_any_process_knows_the_totals(processes_of: Processes) -> None:
    first, second = processes_of.start(), processes_of.start()
    first.write(COUNT, 2)
    second.write(COUNT, 3)
    first.write(GAUGE, 1, is_gauge=True)
    second.write(GAUGE, 4, is_gauge=True)
    assert totals(first) == totals(second) == (5, 5)


@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from(["count", "end"])), max_size=20))
@settings(max_examples=20, deadline=None)
def test_counters_never_fall_and_gauges_end_with_their_process(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, str]]
) -> None:
    processes = Processes(tmp_path_factory.mktemp("values"))
    observer = processes.start()
    live: dict[str, SharedValues] = {}
    counts: dict[str, int] = {}
    total = 0
    for name, step in steps:
        if step == "count":
            if name not in live:
                live[name], counts[name] = processes.start(), 0
            counts[name] += 1
            total += 1
            live[name].write(COUNT, counts[name])
            live[name].write(GAUGE, 1, is_gauge=True)
        elif name in live:
            processes.end(live.pop(name))
        assert totals(observer) == (total, len(live))
    # One file for each process that lives, whatever came before.
    assert len(list(processes.directory.glob("*.db"))) == 1 + len(live)
    processes.end_all()


@pytest.mark.system
def test_what_a_killed_process_counted_stays(processes_of: Processes, tmp_path: Path) -> None:
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom api.metrics.process_values import SharedValues\n"
        f"values = SharedValues(Path(sys.argv[1]))\nvalues.write({COUNT!r}, 7)\n"
        f"values.write({GAUGE!r}, 1, is_gauge=True)\nprint('ready', flush=True)\ntime.sleep(60)"
    )
    observer = processes_of.start()
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        assert totals(observer) == (7, 1)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert totals(observer) == (7, 0)
    assert totals(processes_of.start()) == (7, 0)


def test_a_file_that_was_folded_in_and_not_yet_removed_counts_once(processes_of: Processes, tmp_path: Path) -> None:
    observer, ended = processes_of.start(), processes_of.start()
    ended.write(COUNT, 3)
    (file,) = [path for path in tmp_path.glob("*.db") if path != observer._path]
    content = file.read_bytes()
    processes_of.end(ended)
    assert totals(observer) == (3, 0)
    # As if the process that folded it in had been killed before it removed the file.
    file.write_bytes(content)
    assert totals(observer) == (3, 0)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", json.dumps({"files": 1}).encode()])
def test_a_damaged_file_ends_no_scrape(processes_of: Processes, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "ended.json").write_bytes(content)
    (tmp_path / "1-damaged.db").write_bytes(content)
    values = processes_of.start()
    values.write(COUNT, 1)
    assert totals(values) == (1, 0)


def test_without_a_directory_a_process_knows_its_own(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    values = open_values(tmp_path / "file" / "metrics")
    assert isinstance(values, PrivateValues)
    values.write(COUNT, 2)
    assert values.totals() == {COUNT: 2}


def test_the_space_of_a_process_is_taken_beforehand(processes_of: Processes, tmp_path: Path) -> None:
    values = processes_of.start()
    for number in range(20_000):
        values.write(("metric", f"a-route-with-a-long-name/{number:05}", "200", "14"), 1)
    (file,) = tmp_path.glob("*.db")
    # A file that grew beyond what was reserved could end the process on a full disk.
    assert file.stat().st_size == 4 * 2**20
    assert os.stat(file).st_blocks * 512 >= 4 * 2**20
