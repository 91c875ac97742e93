"""A TypeScript client that `openapi-typescript` generates: it compiles without exception, and runs a job."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.clients.conftest import Service
from tests.clients.generated_client import DOCUMENT
from tests.support.requests import jsonl

PROJECT = Path(__file__).with_name("typescript")
NODE = shutil.which("node")
pytestmark = [
    pytest.mark.system,
    # The compiler takes several seconds.
    pytest.mark.slow,
    pytest.mark.skipif(
        NODE is None or not (PROJECT / "node_modules").is_dir(),
        reason="Node.js and the packages of tests/clients/typescript are needed: make npm",
    ),
]


def run(directory: Path, *command: str, **environment: str) -> str:
    """What a program of Node.js prints; it must succeed."""
    done = subprocess.run(
        [str(NODE), *command], cwd=directory, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A project with the generated types, compiled."""
    directory = tmp_path / "typescript"
    directory.mkdir()
    (directory / "node_modules").symlink_to(PROJECT / "node_modules")
    for name in ("package.json", "tsconfig.json", "run_job.ts"):
        shutil.copyfile(PROJECT / name, directory / name)
    run(directory, "node_modules/openapi-typescript/bin/cli.js", str(DOCUMENT), "-o", "schema.d.ts")
    run(directory, "node_modules/typescript/bin/tsc", "-p", ".")
    return directory


def test_it_compiles_strictly_and_runs_a_job(directory: Path, service: Service) -> None:
    environment = {"ADDRESS": service.address, "KEY": service.key, "ROWS": jsonl(8).decode()}
    seen: dict[str, Any] = json.loads(service.serve(lambda: run(directory, "built/run_job.js", **environment)))
    assert (seen["status"], seen["again"]) == ("succeeded", 304)
    # Asked for `quick`, it sent no epochs of another preset.
    assert (seen["preset"], seen["epochs"]) == ("quick", 1)
    assert seen["transitions"] == ["queued", "preparing", "running", "succeeded"]
    assert len(seen["samples"]) == 2
    assert {"stage", "final"} <= set(seen["kinds"])
    assert "did you mean `name`?" in seen["refusal"]
