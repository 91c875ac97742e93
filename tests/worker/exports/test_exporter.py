"""The law of exports: one that was asked for ends with exactly its files below its checkpoint, or says why it cannot,
whatever is killed in between; and what an attempt leaves that was not the last is removed.
"""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import sqlalchemy as sa
from gguf import GGUFReader

from domain.checkpoints.models import Checkpoint
from domain.db import db_now
from domain.exports.models import CheckpointExport
from domain.jobs.export_requests import delete_export
from domain.process_secrets import SECRET_VARIABLES, TRACKER_SECRETS
from domain.process_stat import PARENT, read_stat
from domain.projects.models import Project
from pocl.storage.manifest import read_manifest
from tests.pocl.export.gguf_models import model_directory
from tests.support.harness import PROJECT, ServiceHarness, processes_mentioning
from tests.support.s3_server import S3Server
from tests.support.waiting import eventually
from tests.worker.exports.conftest import FILES, ExportedCheckpoints
from worker.garbage import remove_deleted_checkpoints
from worker.scratch_directory import ScratchDirectory

pytestmark = pytest.mark.system


@pytest.fixture
def sqlite_exported(sqlite_template: Path, tmp_path: Path) -> Iterator[ExportedCheckpoints]:
    # How files are made is the same on both databases.
    shutil.copyfile(sqlite_template, tmp_path / "test.db")
    harness = ServiceHarness(tmp_path / "home", f"sqlite:///{tmp_path / 'test.db'}")
    yield ExportedCheckpoints(harness, tmp_path)
    harness.close()


def code_of(row: CheckpointExport) -> str | None:
    return None if row.error is None else row.error["code"]


def test_a_tiny_model_is_written_by_the_real_process_and_read_back(
    sqlite_exported: ExportedCheckpoints, tmp_path: Path
) -> None:
    source = model_directory("qwen2", tmp_path / "model")
    checkpoint = sqlite_exported.store(source)
    sqlite_exported.ask(checkpoint)
    row = sqlite_exported.turn(sqlite_exported.exporter(None))
    assert (row.state, row.error) == ("complete", None)
    assert any("NFC" in note for note in row.notes or [])
    assert row.store_key is not None
    directory = sqlite_exported.harness.store.directory(row.store_key)
    assert {file.path for file in read_manifest(directory).files} == {"model-q8_0.gguf", "Modelfile"}
    reader = GGUFReader(directory / "model-q8_0.gguf")
    assert reader.fields["general.architecture"].contents() == "qwen2"
    assert {tensor.name for tensor in reader.tensors} >= {"token_embd.weight", "blk.0.attn_q.weight"}
    # A checkpoint of a family that cannot be written says so at its end, where the request did not know.
    (source / "config.json").write_text('{"model_type": "gpt2"}')
    (source / "manifest.json").unlink()
    sqlite_exported.ask(sqlite_exported.store(source), "f16")
    assert sqlite_exported.exporter(None).turn()
    with sqlite_exported.harness.database.transaction(write=False) as session:
        failed = session.scalars(sa.select(CheckpointExport).where(CheckpointExport.format == "f16")).one()
    assert (failed.state, code_of(failed), failed.attempts) == ("failed", "gguf_unsupported", 1)


def test_it_ends_with_exactly_its_files(exported: ExportedCheckpoints) -> None:
    checkpoint = exported.store()
    exported.ask(checkpoint)
    exporter = exported.exporter()
    row = exported.turn(exporter)
    assert (row.state, row.error, row.attempts, row.notes) == ("complete", None, 1, ["A note."])
    files = exported.stored(row)
    assert set(files) == {"model-q8_0.gguf", "Modelfile", "manifest.json"}
    assert files["model-q8_0.gguf"] == FILES["model.safetensors"]
    assert row.size_bytes == sum(map(len, files.values()))
    assert not exporter.turn()


def children() -> list[int]:
    """The ids of this process's children that write an export."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ValueError):
            is_ours = read_stat(entry.name, PARENT) == os.getpid()
            if is_ours and b"fake_export.py" in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return found


def test_a_process_that_is_killed_leaves_the_export_to_the_next(exported: ExportedCheckpoints) -> None:
    exported.ask(exported.store())

    def kill() -> bool:
        for child in children():
            os.kill(child, signal.SIGKILL)
        return False

    row = exported.turn(exported.exporter("hang", should_stop=kill))
    assert (row.state, code_of(row), row.error and row.error["fault"]) == ("pending", "export_killed", "capacity")
    assert exported.stored_attempts() == []
    assert exported.turn(exported.exporter()).state == "complete"


def test_what_is_killed_with_its_machine_is_made_by_another_worker(
    sqlite_exported: ExportedCheckpoints, tmp_path: Path
) -> None:
    harness = sqlite_exported.harness
    sqlite_exported.ask(sqlite_exported.store(model_directory("llama", tmp_path / "model")))
    with subprocess.Popen(
        [sys.executable, "-m", "worker.exports"], stdin=subprocess.PIPE, env=harness.environment()
    ) as process:
        assert process.stdin is not None
        process.stdin.write(b"{}\n")
        process.stdin.flush()
        eventually(lambda: sqlite_exported.row().state == "running", within=60, what="it is at it")
        process.kill()
    # What writes it ends with whoever asked it to; its files are removed by the next process of this machine.
    scratch = harness.settings.work_root / "exports"
    eventually(lambda: processes_mentioning(str(scratch)) == {}, within=60, what="nothing of it is left")
    assert not sqlite_exported.exporter(None).turn()
    row = sqlite_exported.turn(sqlite_exported.exporter(None))
    assert (row.state, row.error, row.lease_token) == ("complete", None, 2)
    ScratchDirectory.make(scratch).remove()
    assert list(scratch.iterdir()) == []


def test_the_end_of_a_worker_ends_its_process_and_costs_no_attempt(exported: ExportedCheckpoints) -> None:
    exported.ask(exported.store())
    row = exported.turn(exported.exporter("hang", should_stop=lambda: True))
    assert (row.state, row.attempts, row.error) == ("pending", 0, None)
    assert children() == []


def test_one_that_lost_its_lease_stores_nothing(exported: ExportedCheckpoints) -> None:
    checkpoint = exported.store()
    export = exported.ask(checkpoint)

    def take_away() -> bool:
        with exported.harness.database.transaction(write=True) as session:
            session.execute(sa.update(CheckpointExport).values(lease_token=7))
        return False

    row = exported.turn(exported.exporter("hang", should_stop=take_away, lease_seconds=0.3))
    assert (row.state, row.lease_token) == ("running", 7)
    assert exported.stored_attempts() == []
    assert children() == []
    with exported.harness.database.transaction(write=True) as session:
        delete_export(session, PROJECT, checkpoint, export)


def test_what_an_attempt_stored_that_no_row_names_is_removed_by_the_next(exported: ExportedCheckpoints) -> None:
    exported.ask(exported.store())
    row = exported.turn(exported.exporter())
    (earlier,) = exported.stored_attempts()
    # As after a worker that was killed between the files and the row.
    with exported.harness.database.transaction(write=True) as session:
        session.execute(
            sa.update(CheckpointExport).values(
                state="running", store_key=None, size_bytes=None, lease_expires_at=db_now(-1)
            )
        )
    row = exported.turn(exported.exporter())
    assert row.store_key != earlier
    assert exported.stored_attempts() == [row.store_key]


def test_files_of_an_export_that_was_deleted_are_removed_and_the_checkpoint_stays(
    sqlite_exported: ExportedCheckpoints,
) -> None:
    checkpoint = sqlite_exported.store()
    export = sqlite_exported.ask(checkpoint)
    sqlite_exported.turn(sqlite_exported.exporter())
    harness = sqlite_exported.harness
    # Whoever deleted it was killed before it removed the files.
    with harness.database.transaction(write=True) as session:
        delete_export(session, PROJECT, checkpoint, export)
        key = session.get_one(Checkpoint, checkpoint).store_key
    assert len(sqlite_exported.stored_attempts()) == 1
    remove_deleted_checkpoints(harness.database, harness.store)
    assert sqlite_exported.stored_attempts() == []
    assert {file.path for file in harness.store.manifest(key).files} == {*FILES, "manifest.json"}


def test_what_reads_the_files_gets_no_secret(sqlite_exported: ExportedCheckpoints) -> None:
    sqlite_exported.ask(sqlite_exported.store())
    secrets = dict.fromkeys((*SECRET_VARIABLES, *TRACKER_SECRETS, "HF_TOKEN"), "a-secret")
    row = sqlite_exported.turn(sqlite_exported.exporter("tell", conversion={"environ": {**os.environ, **secrets}}))
    (environment,) = row.notes or []
    assert "a-secret" not in environment
    assert "HF_HUB_OFFLINE" in environment


FAILURES: dict[str, tuple[str, str, str, str]] = {
    "user": ("user", "failed", "user_error", "user"),
    "capacity": ("capacity", "pending", "capacity_error", "capacity"),
    "silent": ("silent", "pending", "export_ended", "system"),
    "wrong": ("wrong", "pending", "export_ended", "system"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_failures_are_whose_fault_they_are_and_those_that_may_pass_are_tried_again(
    sqlite_exported: ExportedCheckpoints, name: str
) -> None:
    mode, state, code, fault = FAILURES[name]
    sqlite_exported.ask(sqlite_exported.store())
    row = sqlite_exported.turn(sqlite_exported.exporter(mode))
    assert (row.state, code_of(row), row.error and row.error["fault"]) == (state, code, fault)
    assert sqlite_exported.stored_attempts() == []


def test_time_and_the_size_of_files_are_bounded(sqlite_exported: ExportedCheckpoints) -> None:
    sqlite_exported.ask(sqlite_exported.store())
    clock = iter([0.0, *[1e6] * 1000])
    hanging = sqlite_exported.exporter("hang", conversion={"clock": lambda: next(clock)})
    assert code_of(sqlite_exported.turn(hanging)) == "export_timed_out"
    assert code_of(sqlite_exported.turn(sqlite_exported.exporter("large"))) == "export_ended"
    assert children() == []


def test_a_full_disk_is_a_fault_of_capacity_that_is_tried_again(
    sqlite_exported: ExportedCheckpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    sqlite_exported.ask(sqlite_exported.store())
    exporter = sqlite_exported.exporter()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        # A disk that is full is not to be had here; tests/faults has a small one for jobs.
        patch.setattr(exporter.store, "publish", full)
        row = sqlite_exported.turn(exporter)
    assert (row.state, row.error) == (
        "pending",
        {"code": "disk_full", "message": "There is no space left for the files of the export.", "fault": "capacity"},
    )
    assert sqlite_exported.turn(exporter).state == "complete"


def test_damaged_and_missing_checkpoints_are_not_exported(sqlite_exported: ExportedCheckpoints) -> None:
    sqlite_exported.ask(sqlite_exported.store())
    with sqlite_exported.harness.database.transaction(write=False) as session:
        key = session.connection().exec_driver_sql("SELECT store_key FROM checkpoints").scalar_one()
    stored = sqlite_exported.harness.store.locate(key, "model.safetensors")
    stored.unlink()  # It may share its blocks with the source.
    stored.write_bytes(FILES["model.safetensors"][:-1] + b" ")
    row = sqlite_exported.turn(sqlite_exported.exporter())
    assert (row.state, code_of(row)) == ("failed", "checkpoint_damaged")


def test_files_beyond_the_quota_of_the_project_are_not_kept(sqlite_exported: ExportedCheckpoints) -> None:
    sqlite_exported.ask(sqlite_exported.store())
    with sqlite_exported.harness.database.transaction(write=True) as session:
        session.execute(sa.update(Project).values(max_storage_bytes=1_100_000))
    row = sqlite_exported.turn(sqlite_exported.exporter())
    assert (row.state, code_of(row)) == ("failed", "quota_exceeded")
    assert sqlite_exported.stored_attempts() == []


def test_waits_grow(sqlite_exported: ExportedCheckpoints) -> None:
    sqlite_exported.ask(sqlite_exported.store())
    exporter, waits = sqlite_exported.exporter("capacity"), []
    for _ in range(3):
        row = sqlite_exported.turn(exporter)
        with sqlite_exported.harness.database.transaction(write=False) as session:
            now = session.scalars(sa.select(db_now())).one()
        waits.append((row.not_before - now).total_seconds())
    assert [10 < waits[0] <= 15, 20 < waits[1] <= 30, 40 < waits[2] <= 60] == [True] * 3


def test_a_checkpoint_of_a_bucket_is_fetched_and_its_export_stored_there(
    sqlite_template: Path, tmp_path: Path, bucket_address: str, s3_server: S3Server
) -> None:
    shutil.copyfile(sqlite_template, tmp_path / "test.db")
    harness = ServiceHarness(tmp_path / "home", f"sqlite:///{tmp_path / 'test.db'}", artifact_store=bucket_address)
    exported = ExportedCheckpoints(harness, tmp_path)
    exported.ask(exported.store())
    row = exported.turn(exported.exporter())
    assert (row.state, row.error) == ("complete", None)
    assert exported.stored(row)["model-q8_0.gguf"] == FILES["model.safetensors"]
    with harness.database.transaction(write=False) as session:
        key = session.connection().exec_driver_sql("SELECT store_key FROM checkpoints").scalar_one()
    assert {file.path for file in harness.store.manifest(key).files} == {*FILES, "manifest.json"}
    # What removes the checkpoint removes its exports.
    prefix = bucket_address.rpartition("/")[2]
    assert any("/exports/" in name for name in s3_server.list_names(prefix))
    harness.store.remove(key)
    assert [name for name in s3_server.list_names(prefix) if "/jobs/" in name] == []
    harness.close()
