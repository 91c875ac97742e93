"""What stands at the head of a report: which run it is of, when that was, and its models."""

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from pocl.layout import ABOUT_FILE

_MAX_FILE_BYTES: Final = 64 << 10


class RunName(BaseModel):
    """How whoever started a run calls it; the content of `about.json`."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    name: Annotated[str, Field(min_length=1, max_length=200)]
    """What people call it."""
    job: str | None = None
    """The id of the job, where it has another name."""
    began_at: AwareDatetime
    """When it began; the report says how long it took from then on."""


def read_run_name(workdir: Path) -> RunName | None:
    """The name in the directory of a run; null where nobody left one that can be read."""
    try:
        with (workdir / ABOUT_FILE).open("rb") as file:
            return RunName.model_validate_json(file.read(_MAX_FILE_BYTES))
    except (OSError, ValidationError):
        return None


def describe_time(run: RunName, ended_at: datetime) -> str:
    """When a run began and ended, and how long it took, as one sentence."""
    began_at, ended_at = run.began_at.astimezone(UTC), ended_at.astimezone(UTC)
    seconds = max(0.0, (ended_at - began_at).total_seconds())
    ended = f"{ended_at:%H:%M}" if ended_at.date() == began_at.date() else _day_and_time(ended_at)
    job = f"{run.job}, " if run.job is not None else ""
    return f"{job}{_day_and_time(began_at)} to {ended} UTC ({_duration(seconds)})."


def describe_models(
    teacher: Mapping[str, str | None] | None,
    student: Mapping[str, str | None],
    parameters: Mapping[Literal["teacher", "student"], int],
) -> str:
    """The names and sizes of the models of a run, as sentences.

    Args:
        teacher: where it came from, as a result has it; null for a run without one.
        student: likewise, before training.
        parameters: the number of parameters of `teacher` and `student`, as far as it is known.
    """
    named = [("Student", _student_name(student), parameters.get("student"))]
    if teacher is not None:
        named.insert(0, ("Teacher", _model_name(teacher), parameters.get("teacher")))
    return " ".join(
        f"{role}: {name}{'' if count is None else f', {count_text(count)} parameters'}." for role, name, count in named
    )


def count_text(count: int) -> str:
    """A large number for people, in three or four digits."""
    for size, name in ((10**9, "billion"), (10**6, "million")):
        if count >= size:
            return f"{count / size:.{1 if count < 1000 * size else 0}f} {name}"
    return f"{count:,}"


def _student_name(origin: Mapping[str, str | None]) -> str:
    if origin["kind"] != "from_teacher":
        return _model_name(origin)
    layers = len((origin.get("layers") or "").split(","))
    return f"{layers} layer{'s' if layers != 1 else ''} of the teacher"


def _model_name(origin: Mapping[str, str | None]) -> str:
    name = origin["name"] or "a model"
    return f"{name} with random weights" if origin["kind"] == "random" else name


def _day_and_time(at: datetime) -> str:
    return f"{at.day} {at:%B %Y, %H:%M}"


def _duration(seconds: float) -> str:
    for size, unit in ((3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"
