"""Metrics of jobs by the real clients of trackers, read back and compared with the rows."""

import http.client
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from domain.jobs.models import METRICS, JobArtifact
from domain.jobs.states import AttemptOutcome
from domain.jobs.tracker_feed import read_points
from tests.support.rows import evaluated
from tests.support.waiting import eventually
from tests.support.worker_actions import settle_attempt, succeed_job
from tests.worker.trackers.conftest import TrackedJobs

pytestmark = pytest.mark.system

Record: Any = import_module("wandb.proto.wandb_internal_pb2").Record
"""Generated, without types."""
Values = dict[tuple[str, int], float]


@pytest.fixture
def tracked(tracked_jobs: Callable[[str], TrackedJobs], sqlite_template: Path, tmp_path: Path) -> TrackedJobs:
    # What is sent is the same on both databases, as test_forwarder.py has it.
    shutil.copyfile(sqlite_template, tmp_path / "test.db")
    return tracked_jobs(f"sqlite:///{tmp_path / 'test.db'}")


def expected(tracked: TrackedJobs, job_id: str) -> Values:
    """All values of a job, out of its rows."""
    with tracked.harness.database.transaction(write=False) as session:
        points, has_more = read_points(session, job_id, {})
    assert not has_more
    values = {(name, point.step): value for point in points for name, value in point.values.items()}
    assert {name for name, _ in values} >= {*METRICS, "stage", "evaluation/final/validation/rouge_l"}
    return values


def approximately(values: Values) -> Values:
    """Event files of TensorBoard have single precision."""
    return {key: struct.unpack("f", struct.pack("f", value))[0] for key, value in values.items()}


def train_in_two_attempts(tracked: TrackedJobs, between: Callable[[], object]) -> None:
    """A job that is released and resumes two steps before the last that it had recorded."""
    claim = tracked.claim()
    tracked.train(claim, 1, 8)
    between()
    settle_attempt(tracked.harness.database, claim, AttemptOutcome.released())
    claim = tracked.claim()
    tracked.train(claim, 7, 12, evaluated(step=10), evaluated(subject="final", stage=None, step=12, rouge_l=44.0))
    succeed_job(tracked.harness.database, claim)


def file_of(tracked: TrackedJobs, job_id: str) -> Path:
    (artifact,) = tracked.harness.artifacts(job_id).values()
    assert isinstance(artifact, JobArtifact)
    assert tracked.harness.job(job_id).stored_bytes == artifact.size_bytes
    return tracked.harness.store.locate(artifact.store_key)


def test_tensorboard_reads_the_metrics_of_the_job(tracked: TrackedJobs) -> None:
    job = tracked.submit({"kind": "tensorboard"})
    forwarder = tracked.forwarder("tensorboard")
    train_in_two_attempts(tracked, lambda: tracked.turn(forwarder))
    early = file_of(tracked, job)
    tracked.turn(forwarder)
    assert tracked.row(job).state == "closed"
    file = file_of(tracked, job)
    assert not early.exists()
    assert file.name.startswith("events.out.tfevents.")
    events = EventAccumulator(str(file.parent), size_guidance={"scalars": 0})
    events.Reload()
    read = {(name, each.step): each.value for name in events.Tags()["scalars"] for each in events.Scalars(name)}
    assert read == approximately(expected(tracked, job))
    text = events.Tensors("specification/text_summary")[0].tensor_proto.string_val[0].decode()
    assert '"seed": 10' in text


def test_wandb_offline_has_the_metrics_of_the_job(tracked: TrackedJobs) -> None:
    job = tracked.submit({"kind": "wandb", "project": "kd", "mode": "offline", "tags": ["nlp"]})
    forwarder = tracked.forwarder("wandb_offline")
    train_in_two_attempts(tracked, lambda: None)
    tracked.turn(forwarder)
    row = tracked.row(job)
    assert (row.state, row.problem) == ("closed", None)
    records = list(read_records(file_of(tracked, job)))
    values: Values = {}
    for record in records:
        if record.WhichOneof("record_type") == "history":
            logged = {
                item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
            }
            step = logged.pop("step")
            values |= {(name, step): value for name, value in logged.items() if not name.startswith("_")}
    assert values == expected(tracked, job)
    (run,) = [record.run for record in records if record.WhichOneof("record_type") == "run"][:1]
    assert (run.run_id, run.project, run.display_name, list(run.tags)) == (job, "kd", "tracked", ["nlp"])
    # Nothing of the machine.
    assert not any(record.WhichOneof("record_type") in ("stats", "environment") for record in records)
    forwarder.stop()


def read_records(file: Path) -> Iterator[Any]:
    """The records of a file of Weights & Biases: a log of LevelDB, of blocks of 32 KiB, after a header of 7 bytes."""
    content, offset, record = file.read_bytes(), 7, b""
    while offset < len(content):
        left = 32768 - offset % 32768
        if left < 7:
            offset += left
            continue
        _, length, kind = struct.unpack("<IHB", content[offset : offset + 7])
        record += content[offset + 7 : offset + 7 + length]
        offset += 7 + length
        if kind in (1, 4):
            yield Record.FromString(record)
            record = b""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_mlflow_has_the_metrics_of_the_job_whatever_is_killed(tracked: TrackedJobs, tmp_path: Path) -> None:
    # The client opens such a store without a server.
    check_mlflow(tracked, f"sqlite:///{tmp_path}/mlflow.db")


READ_MLFLOW = """
import json, sys
from mlflow import MlflowClient
address, run_id, job_id = sys.argv[1:]
client = MlflowClient(address)
run = client.get_run(run_id)
found = client.search_runs([run.info.experiment_id], f"tags.`pocl.job` = '{job_id}'")
json.dump({
    "runs": len(found), "experiment": client.get_experiment(run.info.experiment_id).name,
    "status": run.info.status, "name": run.info.run_name, "tags": run.data.tags, "params": run.data.params,
    "values": [[m.key, m.step, m.value] for key in run.data.metrics for m in client.get_metric_history(run_id, key)],
}, sys.stdout)
"""
"""Read in a process of its own, by a client that has no part in ours."""


def check_mlflow(tracked: TrackedJobs, address: str) -> None:
    job = tracked.submit({"kind": "mlflow", "experiment": "kd", "tags": {"team": "nlp"}})
    forwarder = tracked.forwarder("mlflow", MLFLOW_TRACKING_URI=address)

    def kill_before_anything_is_recorded() -> None:
        tracked.turn(forwarder)
        forwarder.stop()
        row = tracked.row(job)
        assert row.run_id is not None, row.problem
        with tracked.harness.database.transaction(write=True) as session:
            stored = session.merge(row)
            stored.run_id, stored.last_steps = None, {}

    train_in_two_attempts(tracked, kill_before_anything_is_recorded)
    tracked.turn(forwarder)
    forwarder.stop()
    row = tracked.row(job)
    assert (row.state, row.problem) == ("closed", None)
    command = [sys.executable, "-c", READ_MLFLOW, address, str(row.run_id), job]
    run: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    read = {(name, step): value for name, step, value in run["values"]}
    assert len(run["values"]) == len(read)
    assert read == expected(tracked, job)
    assert (run["runs"], run["experiment"], run["status"], run["name"]) == (1, "kd", "FINISHED", "tracked")
    tags = run["tags"]
    assert (tags["team"], tags["pocl.attempt"], tags["pocl.status"]) == ("nlp", "2", "succeeded")
    assert (run["params"]["seed"], run["params"]["curriculum.stages"]) == ("10", "2")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_mlflow_server_has_the_metrics_of_the_job(tracked: TrackedJobs, tmp_path: Path) -> None:
    for package in ("flask", "flask_cors", "graphene", "aiohttp"):
        pytest.importorskip(package, reason="mlflow-skinny has no server: pip install mlflow")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    with (tmp_path / "server.log").open("wb") as log:
        server = subprocess.Popen(
            [*command, "--backend-store-uri", f"sqlite:///{tmp_path}/mlflow.db"],
            cwd=tmp_path,
            stdout=log,
            stderr=log,
            env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        )

    def is_ready() -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == http.client.OK
        except OSError:
            return False
        finally:
            connection.close()

    try:
        eventually(is_ready, within=300, what="the server")
        check_mlflow(tracked, f"http://127.0.0.1:{port}")
    finally:
        server.terminate()
        server.wait()
