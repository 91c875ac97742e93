"""No reader of events forgets one: a new event is treated by its group, or the type check complains where it is not."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EVENTS = "pocl/events.py"
RECORDER, SINK, COMMAND = "domain/jobs/event_recorder.py", "worker/sink.py", "pocl/__main__.py"
EMITTER = "emitter.py"
"""Stands for the part of the engine that reports the new event."""

# Nothing is read but the files in question and pydantic: a class with a base that is not known passes for any other.
CONFIGURATION = """
[mypy]
follow_imports = skip
ignore_missing_imports = True
[mypy-pydantic.*]
follow_imports = silent
"""


def with_planted_event(source: str, group: str) -> str:
    """The module of the events with one more event in `Event`."""
    planted = f'class Planted({group}):\n    type: Literal["planted"] = "planted"\n\n\n'
    before, union, after = source.partition("Event = Annotated[\n    ")
    assert union, "the union of the events is not where it was"
    return f"{before}{planted}{union}Planted\n    | {after}"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mypy")


def complaints(source: str, directory: Path, cache: Path) -> set[str]:
    """The files in which mypy finds an event that is not treated, where the events are those of `source`."""
    (directory / "events.py").write_text(source)
    (directory / "mypy.ini").write_text(CONFIGURATION)
    (directory / EMITTER).write_text("from pocl.events import Planted, Sink\n\nsink: Sink = print\nsink(Planted())\n")
    out = subprocess.run(
        [
            *(sys.executable, "-m", "mypy", "--config-file", directory / "mypy.ini", "--cache-dir", cache),
            *("--shadow-file", EVENTS, directory / "events.py"),
            *(EVENTS, RECORDER, SINK, COMMAND, directory / EMITTER),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert out.stderr == ""
    found = re.findall(r'^(\S+?):\d+: error: Argument 1 (?:to "assert_never" )?has .*"Planted"', out.stdout, re.M)
    return {EMITTER if path.endswith(EMITTER) else path for path in found}


@pytest.mark.system
@pytest.mark.parametrize(
    ("group", "expected"),
    [
        ("HistoryEvent", set()),
        ("ProgressEvent", {RECORDER, SINK}),
        ("FileEvent", {SINK}),
        ("_Value", {RECORDER, SINK, COMMAND}),
    ],
)
def test_new_event_is_complained_about_where_its_group_is_not_enough(
    group: str, expected: set[str], tmp_path: Path, cache: Path
) -> None:
    source = (ROOT / EVENTS).read_text(encoding="utf-8")
    assert complaints(with_planted_event(source, group), tmp_path, cache) == expected


@pytest.mark.system
def test_event_that_is_missing_from_the_union_is_complained_about_where_it_is_reported(
    tmp_path: Path, cache: Path
) -> None:
    source = with_planted_event((ROOT / EVENTS).read_text(encoding="utf-8"), "HistoryEvent")
    without = source.replace("Planted\n    | ", "")
    assert without != source
    assert complaints(without, tmp_path, cache) == {EMITTER}
