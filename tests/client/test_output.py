"""What the command prints, and with which status it ends."""

import io
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError
from typing import Any

import pytest
import typer
from typer.main import get_command

from pocl_client import (
    ClientError,
    DatasetRefused,
    DownloadDamaged,
    ExportFailed,
    NotFound,
    RateLimited,
    RequestInvalid,
    ResponseInvalid,
    ServerFault,
    ServiceUnreachable,
    WaitTimedOut,
)
from pocl_client.cli import doctor, service
from pocl_client.cli.app import app
from pocl_client.cli.datasets import marked
from pocl_client.cli.exits import exit_status_of, exit_status_of_job
from pocl_client.cli.jobs import JOB_FIELDS
from pocl_client.cli.output import Format, StatusLine, show, show_table, size_text, text_of, transfer_progress
from pocl_client.cli.service import hand_over
from pocl_client.cli.watching import event_text, progress_text
from pocl_client.models import Event, Job
from tests.client.fakes import job


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (WaitTimedOut("late"), 124),
        (ServiceUnreachable("away"), 3),
        (ResponseInvalid("html"), 3),
        (ServerFault(503, {}), 3),
        (RateLimited(429, {}), 3),
        (NotFound(404, {}), 2),
        (RequestInvalid(422, {}), 2),
        (DatasetRefused("dataset_invalid", "no", ()), 2),
        (ExportFailed("gguf_unsupported", "no", "user"), 2),
        (ExportFailed("disk_full", "no", "capacity"), 3),
        (DownloadDamaged("damaged"), 3),
        (ClientError("other"), 2),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
def test_an_error_has_its_exit_status(error: ClientError, status: int) -> None:
    assert exit_status_of(error) == status


@pytest.mark.parametrize(("status", "code"), [("succeeded", 0), ("failed", 1), ("cancelled", 1)])
def test_a_job_has_its_exit_status(status: str, code: int) -> None:
    assert exit_status_of_job(status) == code


def commands(group: Any, name: str = "pocl") -> Iterator[tuple[str, Any]]:
    """Every command that does something, with its name."""
    for each in group.commands.values():
        if hasattr(each, "commands"):
            yield from commands(each, f"{name} {each.name}")
        else:
            yield f"{name} {each.name}", each


def test_every_command_prints_json_where_it_is_asked_to() -> None:
    found = dict(commands(get_command(app)))
    assert len(found) > 25
    formats = {
        name: set(option.type.choices)
        for name, command in found.items()
        for option in command.params
        if "--output" in option.opts
    }
    # These become another program.
    assert found.keys() - formats.keys() == {"pocl serve", "pocl worker", "pocl run"}
    assert [name for name, choices in formats.items() if not choices >= {"text", "json"}] == []


def test_columns_are_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    show_table(("id", "rows"), [("ds_1", 10_000), ("ds_long", None)])
    assert capsys.readouterr().out == "ID       ROWS\nds_1     10000\nds_long  -\n"


@pytest.mark.parametrize(
    ("size", "text"),
    [(None, None), (0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (343_000_000, "343.0 MB"), (10**15, "1000.0 TB")],
)
def test_sizes_are_for_people(size: int | None, text: str | None) -> None:
    assert size_text(size) == text


def test_nothing_that_is_printed_steers_the_terminal() -> None:
    assert text_of("\x1b[2Jgone\r\n") == " [2Jgone  "


def test_progress_is_for_terminals_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    monkeypatch.setattr(sys, "stderr", written)
    with transfer_progress("uploading") as on_progress:
        assert on_progress is None
    line = StatusLine()
    line.update("half")
    line.clear()
    assert written.getvalue() == ""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_line_on_a_terminal_is_written_over_and_taken_away(monkeypatch: pytest.MonkeyPatch) -> None:
    written = Terminal()
    monkeypatch.setattr(sys, "stderr", written)
    line = StatusLine()
    for text in ("half", "half", "whole"):
        line.update(text)
    line.clear()
    assert written.getvalue() == "\r\x1b[2Khalf\r\x1b[2Kwhole\r\x1b[2K"


def event(type_: str, **data: object) -> Event:
    return Event.model_validate({"id": 1, "at": datetime(2026, 11, 24, tzinfo=UTC), "type": type_, "data": data})


@pytest.mark.parametrize(
    ("type_", "data", "text"),
    [
        ("status", {"to": "running"}, "running"),
        (
            "status",
            {"to": "failed", "reason": {"code": "diverged", "message": "The loss is no number.", "hint": "Lower it."}},
            "failed: diverged: The loss is no number. Lower it.",
        ),
        ("status", {"to": "cancelled", "reason": {"code": "cancelled", "message": "Done."}}, "cancelled: Done."),
        ("phase", {"phase": "ranking"}, "ranking"),
        (
            "stage_started",
            {"stage": 1, "samples": 40, "temperature": 1.5, "steps": 9},
            "stage 2: 40 samples, temperature 1.5, 9 steps",
        ),
        (
            "evaluated",
            {"subject": "stage", "stage": 0, "rows": 8, "split": "validation", "rouge_l": 12.345, "cross_entropy": 2},
            "stage 1 on 8 validation samples: ROUGE-L 12.35, cross-entropy 2.000",
        ),
        (
            "evaluated",
            {"subject": "initial", "rows": 8, "split": "test", "rouge_l": 1.5, "cross_entropy": 3},
            "untrained student on 8 test samples: ROUGE-L 1.50, cross-entropy 3.000",
        ),
        ("checkpoint", {"id": "ckpt_1", "kind": "best", "step": 9}, "checkpoint ckpt_1 (best, step 9)"),
        ("warning", {"message": "Slow."}, "warning: Slow."),
        ("of a newer service", {}, None),
        ("evaluated", {}, "None on None None samples: ROUGE-L 0.00, cross-entropy 0.000"),
    ],
)
def test_events_are_lines(type_: str, data: dict[str, object], text: str | None) -> None:
    line = event_text(event(type_, **data))
    assert (line if line is None else line[10:]) == text


def test_a_push_to_the_hub_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    push: dict[str, Any] = {
        "state": "failed", "repo": "acme/student", "branch": "main", "checkpoint": "ckpt_1", "attempts": 1,
        "not_before": None, "error": {"code": "hub_refused", "message": "No."}, "url": None, "commit": None,
        "published_at": None,
    }  # fmt: skip
    done = {**push, "state": "published", "error": None, "url": "https://hub.example/acme/student"}
    for publication in (push, done, None):
        show(Job.model_validate(job("succeeded", publication=publication)), Format.TEXT, JOB_FIELDS)
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("on the Hub")]
    assert [line.split(maxsplit=3)[3] for line in shown] == [
        "acme/student: failed (hub_refused: No.)",
        "https://hub.example/acme/student",
    ]


def test_progress_is_one_line() -> None:
    progress = {
        "percent": 49.6, "step": 4, "total_steps": 8, "stage": 0, "stages": 2, "tokens_seen": 9,
        "tokens_per_second": 456.2, "updated_at": None,
    }  # fmt: skip
    phase = {"name": "training", "done": 4, "total": 8, "unit": "steps"}
    shown = Job.model_validate(job("running", progress=progress, phase=phase))
    assert progress_text(shown) == " 50 %  training 4/8 steps  step 4/8  stage 1/2  456 tokens/s"
    assert progress_text(Job.model_validate(job("queued"))) == "  0 %  queued"


def test_the_doctor_speaks_in_sentences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POCL_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("POCL_API_KEY", "key")
    checks = list(doctor.examine())
    assert {each.name for each in checks} >= {"python", "service", "gpu", "disk", "reached"}
    assert all(each.sentence.endswith(".") for each in checks)


def test_a_missing_service_is_said_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(name: str) -> None:
        raise PackageNotFoundError(name)

    # It is installed wherever these tests run.
    monkeypatch.setattr(service, "distribution", missing)
    with pytest.raises(typer.Exit) as ended:
        hand_over("worker", ["serve"], lambda *_: pytest.fail("nothing is to be started"))
    assert ended.value.exit_code == 2
    assert "pip install 'pocl-service[" in capsys.readouterr().err


def test_what_is_trained_stands_in_brackets() -> None:
    tokens = [("Say", False), (" hi", True), ("</s>", True), ("Bye", False), ("!", True)]
    assert marked(tokens) == "Say[ hi</s>]Bye[!]"


def test_a_program_of_the_service_takes_the_place_of_the_command() -> None:
    started: list[list[str]] = []

    def execute(program: str, arguments: list[str]) -> None:
        started.append([program, *arguments])

    hand_over("worker", ["serve", "--port", "0"], execute)
    # -P: no module of the working directory is taken for one of the service.
    assert started == [[sys.executable, sys.executable, "-P", "-m", "worker", "serve", "--port", "0"]]
