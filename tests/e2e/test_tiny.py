"""The whole service with the real engine: `examples/tiny.yaml` over HTTP, without faults and with a killed worker."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml
from safetensors import safe_open

from domain.local_key import FILE_NAME
from tests.support.harness import kill, processes_mentioning
from tests.support.processes import Processes, ProcessHandle
from tests.support.waiting import eventually

ROOT = Path(__file__).parents[2]
TERMINAL = ("succeeded", "failed", "cancelled")


class Service:
    """The embedded set-up with a home of its own, and a client of it."""

    def __init__(self, launcher: ProcessHandle, home: Path, http: httpx2.Client) -> None:
        self.launcher = launcher
        self.home = home
        self.http = http

    def submit_tiny(self, **changes: Any) -> str:
        """Upload the samples of the example and post its specification with `changes`; the id of the job."""
        spec = {**yaml.safe_load((ROOT / "examples" / "tiny.yaml").read_text()), **changes}
        for part in ("train", "validation"):
            samples = (ROOT / spec["data"][part]["path"]).read_bytes()
            headers = {"content-type": "application/jsonl"}
            answer = self.http.post("/v1/datasets", params={"name": part}, content=samples, headers=headers)
            assert answer.status_code == 201, answer.text
            spec["data"][part] = {"dataset": answer.json()["id"]}
        answer = self.http.post("/v1/jobs", json={"spec": spec})
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    def get(self, path: str) -> Any:
        answer = self.http.get(path)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def job(self, job: str) -> Any:
        return self.get(f"/v1/jobs/{job}")

    def wait_for_success(self, job: str) -> Any:
        """Wait until the job has ended; it must have succeeded."""
        eventually(lambda: self.job(job)["status"] in TERMINAL, within=240, every=0.2, what="the end of the job")
        ended = self.job(job)
        assert ended["status"] == "succeeded", (ended, self.http.get(f"/v1/jobs/{job}/logs").text)
        return ended

    def events(self, job: str, kind: str) -> list[Any]:
        events = [event for event in self.get(f"/v1/jobs/{job}/events?limit=100")["data"] if event["type"] == kind]
        assert events or kind != "run_finished"
        return events

    def final_checkpoint(self, job: str) -> Any:
        """The checkpoint of the finished student."""
        checkpoints = self.get(f"/v1/jobs/{job}/checkpoints?limit=100")["data"]
        (final,) = (one for one in checkpoints if one["kind"] == "final")
        return final

    def weights(self, job: str) -> str:
        """SHA-256 of the finished student's weights."""
        files = self.get(f"/v1/checkpoints/{self.final_checkpoint(job)['id']}/manifest")["files"]
        return str(next(file["sha256"] for file in files if file["path"] == "model.safetensors"))

    def worker_pid(self) -> int:
        """The id of the worker process that the launcher started."""
        workers = (pid for pid, line in processes_mentioning(str(self.home)).items() if "-m worker run" in line)
        children = Path(f"/proc/{self.launcher.pid}/task/{self.launcher.pid}/children").read_text().split()
        (worker,) = (pid for pid in workers if str(pid) in children)
        return worker


@contextmanager
def serving(processes: Processes, home: Path) -> Iterator[Service]:
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("POCL_")},
        "POCL_HOME": str(home),
        # Short enough to notice a killed worker within the test, long enough for a busy machine.
        "POCL_LEASE_SECONDS": "12",
        "POCL_HEARTBEAT_SECONDS": "2",
        "POCL_REAPER_SECONDS": "1",
        "OMP_NUM_THREADS": "1",
    }
    launcher = processes.start("serve", environment, "--port", "0")
    url = launcher.wait_for_log("READY").removeprefix("READY ")
    headers = {"authorization": f"Bearer {(home / FILE_NAME).read_text().strip()}"}
    with httpx2.Client(base_url=url, headers=headers, timeout=30) as http:
        yield Service(launcher, home, http)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    directory = tmp_path_factory.mktemp("service")
    processes = Processes(directory / "processes")
    try:
        with serving(processes, directory / "home") as service:
            yield service
    finally:
        processes.kill_all()


@pytest.fixture(scope="module")
def finished_job(service: Service) -> str:
    """The id of a job that ran without a fault."""
    job = service.submit_tiny()
    service.wait_for_success(job)
    return job


def test_example_runs_over_http_and_reports_all_its_stages(service: Service, finished_job: str) -> None:
    job = service.job(finished_job)
    assert (job["progress"]["percent"], job["progress"]["step"]) == (100.0, job["progress"]["total_steps"])
    stages = service.get(f"/v1/jobs/{finished_job}/stages")["data"]
    assert [stage["status"] for stage in stages] == ["succeeded"] * 4
    assert [round(stage["temperature"], 3) for stage in stages] == [1.0, 1.333, 1.667, 2.0]
    assert [stage["samples"] for stage in stages] == sorted(stage["samples"] for stage in stages)
    assert len(service.get(f"/v1/jobs/{finished_job}/attempts")["data"]) == 1


def test_ranking_covers_each_sample_once(service: Service, finished_job: str) -> None:
    lines = service.http.get(f"/v1/jobs/{finished_job}/ranking").text.splitlines()
    rows = [json.loads(line)["row"] for line in lines]
    samples = service.get(f"/v1/jobs/{finished_job}/stages")["data"][-1]["samples"]
    assert sorted(rows) == list(range(samples))


def test_student_downloads_as_readable_safetensors(service: Service, finished_job: str, tmp_path: Path) -> None:
    content = service.http.get(
        f"/v1/checkpoints/{service.final_checkpoint(finished_job)['id']}/files/model.safetensors"
    ).content
    (tmp_path / "model.safetensors").write_bytes(content)
    with safe_open(tmp_path / "model.safetensors", framework="numpy") as file:
        layers = {name.split(".")[2] for name in file.keys() if name.startswith("model.layers.")}  # noqa: SIM118
    assert layers == {"0", "1"}


def test_job_of_a_worker_killed_in_stage_2_ends_once_with_the_same_weights(service: Service, finished_job: str) -> None:
    job = service.submit_tiny()
    worker = service.worker_pid()
    eventually(lambda: service.job(job)["progress"]["stage"] == 1, within=120, what="stage 2")
    kill(worker)
    service.wait_for_success(job)
    lost, last = service.get(f"/v1/jobs/{job}/attempts")["data"]
    assert (lost["end"], last["end"]) == ("lost", "succeeded")
    assert last["resumed_from_step"] > 0
    assert len(service.events(job, "run_finished")) == 1
    assert service.weights(job) == service.weights(finished_job)


def test_student_teaches_the_next_job(service: Service, finished_job: str) -> None:
    job = service.submit_tiny(
        teacher={"checkpoint": service.final_checkpoint(finished_job)["id"]},
        student={"from_teacher": {"layers": [1]}},
        curriculum={"stages": 1, "epochs_per_stage": 1, "ranking": {"max_new_tokens": 1}},
        evaluation={"max_new_tokens": 1, "max_rows": 2},
    )
    assert service.wait_for_success(job)["progress"]["stages"] == 1


def test_running_job_is_cancelled_over_http_and_leaves_no_engine(service: Service) -> None:
    job = service.submit_tiny()
    eventually(lambda: service.job(job)["status"] == "running", within=120, what="running")
    assert service.http.post(f"/v1/jobs/{job}/cancel").status_code == 202
    eventually(lambda: service.job(job)["status"] == "cancelled", within=60, what="cancelled")
    assert not processes_mentioning(job)
