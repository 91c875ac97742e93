"""The command `pocl` against the service on a real socket: what it prints, and with which status it ends."""

import json
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fastapi import FastAPI
from structlog.testing import capture_logs
from typer.testing import CliRunner, Result

from api.http_limits import ConnectionLimits
from domain.artifacts import ArtifactStore
from domain.db import Database
from domain.jobs.engine_logs import MAX_CHUNK_BYTES, LogChunk, append_log
from domain.jobs.event_recorder import add_checkpoint
from domain.jobs.export_feed import claim_export, record_exported
from domain.jobs.export_requests import request_export
from domain.jobs.states import AttemptOutcome, EndReason
from pocl.events import PhaseChanged
from pocl.storage.manifest import MANIFEST, sha256_of, write_manifest
from pocl_client.cli.app import app as command
from tests.support.http_server import http_server
from tests.support.requests import KEY, jsonl, specification
from tests.support.rows import envelopes, evaluated, step_logged
from tests.support.worker_actions import claim_queued_job, settle_attempt, succeed_job, write_events

pytestmark = pytest.mark.system
Pocl = Callable[..., Result]

DIVERGED = EndReason("loss_diverged", "The loss is not finite.", "user", False, "Lower it.")


@pytest.fixture
def pocl(app: FastAPI, tmp_path: Path) -> Iterator[Pocl]:
    """Runs `pocl` with arguments, logged in to the service."""
    # The service is in this process: what it logs is not what the command prints.
    with capture_logs(), http_server(app, ConnectionLimits(max_connections=64)) as server:
        environment = {
            "POCL_URL": f"http://127.0.0.1:{server.port}",
            "POCL_API_KEY": KEY,
            "POCL_API_KEY_FILE": "",
            "POCL_CONFIG_DIR": str(tmp_path / "config"),
        }

        def run(*arguments: object, status: int = 0, key: str | None = KEY, stdin: str | None = None) -> Result:
            texts = [str(each) for each in arguments]
            result = CliRunner().invoke(command, texts, env={**environment, "POCL_API_KEY": key or ""}, input=stdin)
            assert result.exit_code == status, (result.stdout, result.stderr, result.exception)
            return result

        yield run


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    path = tmp_path / "train.jsonl"
    path.write_bytes(jsonl(8))
    return path


@pytest.fixture
def spec(pocl: Pocl, samples: Path, tmp_path: Path) -> Path:
    """A specification whose data set is uploaded."""
    dataset = pocl("datasets", "upload", samples, "-o", "id").stdout.strip()
    path = tmp_path / "spec.json"
    path.write_text(json.dumps(specification(dataset)))
    return path


def test_data_sets_are_uploaded_listed_and_deleted(pocl: Pocl, samples: Path) -> None:
    text = pocl("datasets", "upload", samples, "--name", "mine").stdout
    assert "mine" in text
    assert "8 instruction" in text
    (listed,) = json.loads(pocl("datasets", "list", "-o", "json").stdout)
    assert (listed["name"], listed["rows"]) == ("mine", 8)
    assert pocl("datasets", "list", "-o", "id").stdout.split() == [listed["id"]]
    assert pocl("datasets", "delete", listed["id"]).stdout == ""
    assert json.loads(pocl("datasets", "list", "-o", "json").stdout) == []
    assert "dataset_not_found" in pocl("datasets", "delete", listed["id"], status=2).stderr


def test_wrong_rows_are_refused_with_their_lines(pocl: Pocl, samples: Path) -> None:
    samples.write_text('{"instruction": "a", "output": "b"}\n{"no": 1}\n')
    refused = pocl("datasets", "upload", samples, status=2)
    assert "dataset_invalid" in refused.stderr
    assert "2" in refused.stderr
    assert refused.stdout == ""
    assert "skipped" in pocl("datasets", "upload", samples, "--skip-bad-rows").stdout


def test_a_job_is_validated_submitted_and_steered(pocl: Pocl, spec: Path) -> None:
    plan = pocl("validate", spec)
    assert "TEMPERATURE" in plan.stdout
    assert json.loads(pocl("validate", spec, "--set", "seed=7", "-o", "json").stdout)["spec"]["seed"] == 7
    submitted = pocl("submit", spec, "--set", "seed=7", "--name", "first", "--label", "team=search", "-o", "json")
    job = json.loads(submitted.stdout)
    assert (job["name"], job["labels"], job["spec"]["seed"]) == ("first", {"team": "search"}, 7)
    assert pocl("jobs", "list", "--label", "team=search", "-o", "id").stdout.split() == [job["id"]]
    assert "first" in pocl("jobs", "get", job["id"]).stdout
    assert "it has none yet" in pocl("jobs", "branch", job["id"], "--stage", 1, "--set", "method=js", status=2).stderr
    assert "illegal_transition" in pocl("jobs", "pause", job["id"], status=2).stderr
    assert "cancelled" in pocl("jobs", "cancel", job["id"]).stdout
    again = json.loads(pocl("jobs", "retry", job["id"], "--from-start", "-o", "json").stdout)
    assert again["retry_of"] == job["id"]
    assert "cancelled" in pocl("jobs", "cancel", again["id"]).stdout
    deleted = json.loads(pocl("jobs", "delete", job["id"], again["id"], "-o", "json").stdout)
    assert deleted == [{"id": each, "deleted": True} for each in (job["id"], again["id"])]


def test_submitting_again_with_the_same_key_makes_no_second_job(pocl: Pocl, spec: Path) -> None:
    first, second = (pocl("submit", spec, "--idempotency-key", "nightly", "-o", "id").stdout for _ in range(2))
    assert first == second


def test_wrong_fields_are_refused_with_their_pointers(pocl: Pocl, spec: Path) -> None:
    assert "/spec/seed" in pocl("submit", spec, "--set", "seed=seven", status=2).stderr
    assert "--set" in pocl("submit", spec, "--set", "seed", status=2).stderr
    assert "No such file" in pocl("submit", "none.yaml", status=2).stderr


def test_a_wait_ends_with_the_status_of_the_job(pocl: Pocl, spec: Path, database: Database) -> None:
    job = pocl("submit", spec, "-o", "id").stdout.strip()
    late = pocl("jobs", "wait", job, "--timeout", 0, status=124)
    assert "it goes on" in late.stderr
    claim = claim_queued_job(database)
    steps = [step_logged(step, loss=2.0) for step in (1, 2)]
    write_events(database, claim, envelopes(PhaseChanged(phase="training"), *steps, evaluated()), offset=1)
    metrics = pocl("jobs", "metrics", job, "--name", "loss").stdout.splitlines()
    assert [line.split() for line in metrics[:3]] == [["STEP", "LOSS"], ["1", "2"], ["2", "2"]]
    succeed_job(database, claim)
    assert "succeeded" in pocl("jobs", "wait", job).stdout
    watched = pocl("jobs", "watch", job, "-o", "json")
    assert json.loads(watched.stdout)["status"] == "succeeded"
    assert "succeeded" in watched.stderr
    assert "\r" not in watched.stderr
    assert json.loads(pocl("jobs", "logs", job, "-o", "json").stdout) == {"job": job, "text": ""}
    assert pocl("jobs", "logs", job, "-f").stdout == ""

    other = pocl("submit", spec, "-o", "id").stdout.strip()
    pocl("jobs", "cancel", other)
    pocl("jobs", "wait", other, status=1)
    pocl("jobs", "wait", job, other, status=1)
    pocl("jobs", "wait", other, "--until", "cancelled")
    pocl("jobs", "watch", other, status=1)
    assert "job_not_found" in pocl("jobs", "wait", "job_00000000", status=2).stderr


def test_the_log_is_printed_whole_or_its_last_lines(pocl: Pocl, spec: Path, database: Database) -> None:
    job = pocl("submit", spec, "-o", "id").stdout.strip()
    assert pocl("jobs", "logs", job).stdout == ""
    claim = claim_queued_job(database)
    # More than the service sends at once.
    lines = [f"step {number}, käse\n" for number in range(12_000)]
    log = "".join(lines).encode()
    chunks = [LogChunk(start, log[start : start + MAX_CHUNK_BYTES]) for start in range(0, len(log), MAX_CHUNK_BYTES)]
    with database.transaction(write=True) as session:
        append_log(session, claim, chunks, max_bytes=2**20)
    assert pocl("jobs", "logs", job).stdout == "".join(lines)
    assert json.loads(pocl("jobs", "logs", job, "-o", "json").stdout)["text"] == "".join(lines)
    for count in (0, 1, 3):
        assert pocl("jobs", "logs", job, "--attempt", 1, "--tail", count).stdout == "".join(lines[12_000 - count :])
    assert "attempt_not_found" in pocl("jobs", "logs", job, "--attempt", 2, status=2).stderr


def test_a_checkpoint_of_a_job_is_downloaded(
    pocl: Pocl, spec: Path, app: FastAPI, database: Database, tmp_path: Path
) -> None:
    job = pocl("submit", spec, "-o", "id").stdout.strip()
    claim = claim_queued_job(database)
    made = tmp_path / "made"
    made.mkdir()
    (made / "model.safetensors").write_bytes(bytes(1000))
    write_manifest(made)
    store: ArtifactStore = app.state.store
    key = f"jobs/{job}/checkpoints/final"
    size = store.publish(made, key).size_bytes
    with database.transaction(write=True) as session:
        digest = sha256_of(made / MANIFEST)
        add_checkpoint(
            session, claim, kind="final", step=9, stage=1, store_key=key, size_bytes=size, manifest_sha256=digest
        )
    succeed_job(database, claim)
    assert "no checkpoint of the kind best" in pocl("checkpoints", "download", job, tmp_path / "m", status=2).stderr
    checkpoint = pocl("checkpoints", "list", job, "-o", "id").stdout.strip()
    for named in ((job, "--kind", "final"), (checkpoint,)):
        target = tmp_path / f"model-{len(named)}"
        pocl("checkpoints", "download", named[0], target, *named[1:])
        assert (target / "model.safetensors").read_bytes() == bytes(1000)
    # As a worker would have made it.
    with database.transaction(write=True) as session:
        request_export(session, app.state.settings, claim.project, checkpoint, "f16")
        due = claim_export(session, lease_seconds=60)
        assert due is not None
    written = tmp_path / "written"
    written.mkdir()
    (written / "model-f16.gguf").write_bytes(b"GGUF" * 100)
    write_manifest(written)
    size = store.publish(written, due.store_key).size_bytes
    with database.transaction(write=True) as session:
        record_exported(session, due, size_bytes=size, manifest_sha256="0" * 64, notes=["Give it NFC."])
    for _ in range(2):
        told = pocl("checkpoints", "export", job, "--kind", "final", "--format", "f16", tmp_path / "gguf")
        assert "Give it NFC." in told.stderr
        assert (tmp_path / "gguf" / "model-f16.gguf").read_bytes() == b"GGUF" * 100
    assert "something else" in pocl("checkpoints", "export", checkpoint, made, "--format", "f16", status=2).stderr
    (made / "notes").write_text("mine")
    assert "something else" in pocl("checkpoints", "download", checkpoint, made, status=2).stderr
    assert "pinned" in pocl("checkpoints", "pin", checkpoint).stdout
    pocl("checkpoints", "unpin", checkpoint)
    assert pocl("checkpoints", "delete", checkpoint, "-o", "id").stdout == f"{checkpoint}\n"


def test_a_branch_begins_at_the_stage_that_people_call_by_its_number(
    pocl: Pocl, spec: Path, database: Database
) -> None:
    job = pocl("submit", spec, "--name", "parent", "-o", "id").stdout.strip()
    claim = claim_queued_job(database)
    write_events(database, claim, envelopes(PhaseChanged(phase="training"), step_logged(2)), offset=1)
    with database.transaction(write=True) as session:
        add_checkpoint(
            session, claim, kind="stage", step=2, stage=0, store_key=f"jobs/{job}/stage-00000002", size_bytes=1,
            manifest_sha256="0" * 64,
        )  # fmt: skip
    settle_attempt(database, claim, AttemptOutcome.failed(DIVERGED))
    (row,) = pocl("checkpoints", "list", job).stdout.splitlines()[1:]
    assert row.split()[1:4] == ["stage", job, "1"]
    for action in (("branch", job, "--stage", 1), ("retry", job, "--from-stage", 1)):
        made = json.loads(pocl("jobs", *action, "-o", "json").stdout)
        assert (made["name"], made["progress"]["step"], made["progress"]["stage"]) == ("parent", 2, 0)
    assert "it has those of the stages 0" in pocl("jobs", "branch", job, "--stage", 2, status=2).stderr
    for wrong in (("branch", job, "--stage", 0), ("retry", job, "--from-stage", 0)):
        assert "Usage" in pocl("jobs", *wrong, status=2).stderr


def test_a_login_is_tried_and_kept(pocl: Pocl, tmp_path: Path) -> None:
    file = tmp_path / "config" / "credentials.json"
    pocl("login", key=None, stdin="pocl_wrong\n", status=2)
    assert not file.exists()
    logged_in = pocl("login", "-o", "json", key=None, stdin=f"{KEY}\n")
    assert KEY not in logged_in.output
    assert json.loads(logged_in.stdout)["file"] == str(file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    pocl("jobs", "list", key=None)
    pocl("logout", key=None)
    pocl("jobs", "list", key=None, status=2)
    key_file = tmp_path / "key"
    key_file.write_text(f"{KEY}\n")
    pocl("login", "--key-file", key_file, key=None)
    pocl("jobs", "list", key=None)


def test_the_doctor_finds_the_service(pocl: Pocl) -> None:
    checks = {each["name"]: each for each in json.loads(pocl("doctor", "-o", "json").stdout)}
    assert checks["reached"]["level"] == "ok"
    assert "default" in checks["key"]["sentence"]
    assert "pocl login" in pocl("doctor", key="pocl_wrong", status=1).stdout
    assert "lack  The key is no key" in pocl("doctor", key="two words", status=1).stdout


def test_an_unreachable_service_has_a_status_of_its_own(pocl: Pocl, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pocl_client.retries.RetryPolicy.wait_after", lambda *_: None)
    assert "127.0.0.1:9" in pocl("--url", "http://127.0.0.1:9", "jobs", "list", status=3).stderr


def test_models_are_listed(pocl: Pocl) -> None:
    assert pocl("models", "list").stdout.startswith("ID")
    assert json.loads(pocl("models", "list", "-o", "json").stdout) == []
