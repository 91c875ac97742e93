"""The services of `docker-compose.yml` as processes: see tests/support/containers.py.

Against the servers of the distribution where they are installed (apt-get install redis-server postgresql), and
otherwise against those that the rest of the suite runs on.
"""

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import psycopg
import pytest
import redis

from tests.support.api_process import free_port
from tests.support.compose_file import ROOT, ComposeFile, example_variables
from tests.support.containers import Containers, HostPaths, lacks_engine_libraries
from tests.support.harness import processes_mentioning
from tests.support.requests import JSONL, jsonl, specification
from tests.support.servers import find_postgres, running_postgres_by_password
from tests.support.waiting import eventually
from worker import valkey

QUICK: dict[str, dict[str, Any]] = {
    "curriculum": {"stages": 2, "epochs_per_stage": 1, "ranking": {"max_new_tokens": 4}},
    "training": {"batch_size": 2},
    "evaluation": {"max_new_tokens": 4, "max_rows": 4},
    "resources": {"device": "cpu", "threads": 1},
}
LONG = {**QUICK, "curriculum": {**QUICK["curriculum"], "epochs_per_stage": 500}}


def redis_server() -> Path:
    """The Redis of the distribution, else the server of the test suite."""
    return Path(shutil.which("redis-server") or valkey.find().path)


def postgres_server() -> Path:
    """The PostgreSQL of the distribution, else the server of the test suite."""
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    binary = debian[-1] if debian else find_postgres({}).binary
    assert binary is not None
    return binary


@pytest.fixture
def containers(tmp_path: Path) -> Iterator[Containers]:
    """The services with PostgreSQL running, and no process left over at the end."""
    root, models = tmp_path / "root", tmp_path / "models"
    models.mkdir()
    ports = {"postgres_port": free_port(), "redis_port": free_port(), "api_port": free_port()}
    secrets = tmp_path / "secrets"
    subprocess.run([ROOT / "deploy" / "make-secrets.sh", secrets], check=True)
    # Compose takes any characters for a password, and so do the processes.
    (secrets / "redis-password").chmod(0o600)
    (secrets / "redis-password").write_text('p@ss "quoted" \\ #word\n')
    variables = example_variables(
        SECRETS_DIRECTORY=str(secrets),
        MODELS_DIRECTORY=str(models),
        POSTGRES_ADDRESS=f"127.0.0.1:{ports['postgres_port']}",
        REDIS_ADDRESS=f"127.0.0.1:{ports['redis_port']}",
    )
    compose = ComposeFile.load().with_variables(variables)
    postgres = compose.services["postgres"]
    with running_postgres_by_password(
        postgres_server(),
        port=ports["postgres_port"],
        user=postgres.environment["POSTGRES_USER"],
        password=(secrets / "postgres-password").read_text().strip(),
        database=postgres.environment["POSTGRES_DB"],
        stop_signal=signal.Signals[postgres.stop_signal],
    ) as cluster:
        host = HostPaths(root, models, redis_server(), cluster.binaries, cluster.socket, **ports)
        host.provision(compose)
        containers = Containers(compose, host)
        yield containers
        containers.kill()
    assert processes_mentioning(str(root)) == {}


@pytest.fixture
def http(containers: Containers) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=f"http://127.0.0.1:{containers.host.api_port}", timeout=60) as client:
        yield client


def sign_in(containers: Containers, http: httpx2.Client) -> None:
    """Make a key as docs/production.md says, and send it from now on."""
    key = containers.run("api", "python", "-m", "api", "keys", "create", "--name", "first").strip()
    http.headers["authorization"] = f"Bearer {key}"


def redis_password(containers: Containers) -> str:
    return (containers.host.root / "redis" / "secrets" / "redis-password").read_text().strip()


def submit(http: httpx2.Client, fields: dict[str, Any]) -> str:
    dataset = http.post("/v1/datasets", content=jsonl(8), headers=JSONL).json()["id"]
    answer = http.post("/v1/jobs", json={"spec": specification(dataset, method="forward_kl", **fields)})
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


def job(http: httpx2.Client, job_id: str) -> dict[str, Any]:
    answer = http.get(f"/v1/jobs/{job_id}")
    assert answer.status_code == 200, answer.text
    resource: dict[str, Any] = answer.json()
    return resource


def wait_for_success(http: httpx2.Client, job_id: str) -> None:
    ended = ("succeeded", "failed", "cancelled")
    eventually(lambda: job(http, job_id)["status"] in ended, within=180, every=0.2, what="the end of the job")
    log = http.get(f"/v1/jobs/{job_id}/logs").text
    assert job(http, job_id)["status"] == "succeeded", (job(http, job_id), log)


def assert_freeze_is_noticed(containers: Containers, name: str) -> None:
    """Freeze a process, and age its liveness file instead of waiting for a minute: the health check must fail."""
    process = containers.processes[name].process
    process.send_signal(signal.SIGSTOP)
    (containers.host.root / name / "liveness").write_text("-1000")
    assert not containers.is_healthy(name)
    process.send_signal(signal.SIGCONT)
    containers.wait_until_healthy(name)


def test_job_succeeds_and_a_stopped_worker_releases_its_job(containers: Containers, http: httpx2.Client) -> None:
    containers.up("api", "scheduler", "worker")
    for name in ("postgres", "redis", "api", "scheduler", "worker"):
        containers.wait_until_healthy(name)
    assert http.get("/v1/jobs").status_code == 401
    first_key = containers.run("api", "cat", "api-key").strip()
    assert http.get("/v1/jobs", headers={"authorization": f"Bearer {first_key}"}).status_code == 200
    sign_in(containers, http)

    wait_for_success(http, submit(http, QUICK))

    job_id = submit(http, LONG)
    assert_freeze_is_noticed(containers, "worker")
    eventually(lambda: (job(http, job_id)["progress"] or {}).get("step"), within=120, every=0.1, what="a step")
    assert containers.stop("worker") == 0
    released = job(http, job_id)
    assert released["status"] == "queued"
    assert http.get(f"/v1/jobs/{job_id}/checkpoints").json()["data"] != []
    assert containers.stop("scheduler") == 0
    # Once it has shut down, Uvicorn ends itself by the signal that it got.
    assert containers.stop("api") in (0, -signal.SIGTERM)
    assert containers.stop("redis") == 0
    for name in ("migrate", "api", "scheduler", "worker"):
        assert '"level": "error"' not in containers.processes[name].log, containers.processes[name].log


def test_broker_persists_messages_and_does_not_evict(containers: Containers) -> None:
    containers.up("redis")
    containers.wait_until_healthy("redis")
    port, password = containers.host.redis_port, redis_password(containers)
    with redis.Redis(port=port) as stranger, pytest.raises(redis.AuthenticationError):
        stranger.ping()
    with redis.Redis(port=port, password=password, decode_responses=True) as client:
        settings = client.config_get("appendonly", "appendfsync", "maxmemory-policy", "save", "maxmemory")
        client.rpush("bell", "ring")
    assert settings == {
        "appendonly": "yes",
        "appendfsync": "everysec",
        "maxmemory-policy": "noeviction",
        "save": "",
        "maxmemory": str(256 * 2**20),
    }
    assert containers.stop("redis") == 0
    containers.up("redis")
    containers.wait_until_healthy("redis")
    with redis.Redis(port=port, password=password, decode_responses=True) as client:
        assert client.lrange("bell", 0, -1) == ["ring"]


def test_database_refuses_a_wrong_password(containers: Containers) -> None:
    address = f"postgresql://pocl:wrong@127.0.0.1:{containers.host.postgres_port}/pocl"
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(address)


def test_images_of_the_api_have_no_torch(containers: Containers) -> None:
    services, host = containers.compose.services, containers.host
    lacking = {
        name: lacks_engine_libraries(host.environment(services[name])) for name in ("migrate", "api", "scheduler")
    }
    assert lacking == {"migrate": True, "api": True, "scheduler": True}
    assert not lacks_engine_libraries(host.environment(services["worker"]))


def test_backup_is_restored(containers: Containers, http: httpx2.Client, tmp_path: Path) -> None:
    """Runs the commands that docs/production.md gives."""
    containers.up("api")
    containers.wait_until_healthy("api")
    sign_in(containers, http)
    artifacts = containers.host.root / "artifacts"
    before = submit(http, QUICK)
    stored = files(artifacts)
    run_documented("postgres", "pg_dump", containers, tmp_path)
    run_documented("scheduler", "tar .* -c", containers, tmp_path)
    after = submit(http, QUICK)
    containers.stop("api")
    shutil.rmtree(artifacts)
    artifacts.mkdir()
    for service, program in (
        ("postgres", "dropdb"),
        ("postgres", "createdb"),
        ("postgres", "pg_restore"),
        ("scheduler", "tar .* -x"),
    ):
        run_documented(service, program, containers, tmp_path)
    containers.up("migrate", "api")
    containers.wait_until_healthy("api")
    assert job(http, before)["status"] == "queued"
    assert http.get(f"/v1/jobs/{after}").status_code == 404
    assert stored != {}
    assert files(artifacts) == stored


def files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def run_documented(name: str, program: str, containers: Containers, directory: Path) -> None:
    """Run the command that docs/production.md gives for a program in the container of a service."""
    manual = (ROOT / "docs" / "production.md").read_text(encoding="utf-8")
    (command,) = set(re.findall(rf"^docker compose (?:exec|run) .*-T {name} ({program}\b.*)$", manual, re.MULTILINE))
    host = containers.host
    environment = {
        "PATH": f"{host.postgres}{os.pathsep}{os.environ['PATH']}",
        # In the container the socket has its default path, and needs no password.
        "PGHOST": str(host.socket),
        "PGPORT": str(host.postgres_port),
    }
    command = host.translate(command, containers.compose.services[name])
    subprocess.run(["/bin/sh", "-c", command], env=environment, cwd=directory, check=True)
