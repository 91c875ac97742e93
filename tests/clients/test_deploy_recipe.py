"""The program of docs/recipes.md that puts a student where it is served, against the service."""

import re
from pathlib import Path
from typing import Any

import pytest

from pocl_client import Client
from tests.clients.conftest import Service
from tests.support.compose_file import ROOT
from tests.support.requests import jsonl, specification

pytestmark = pytest.mark.system


def recipe() -> dict[str, Any]:
    """The functions of the page."""
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    (source,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {"__name__": "deploy"}
    exec(compile(source, "deploy.py", "exec"), names)
    return names


def test_a_student_is_put_in_its_place_and_a_repeated_message_changes_nothing(service: Service, tmp_path: Path) -> None:
    releases, rows = tmp_path / "releases", tmp_path / "rows.jsonl"
    releases.mkdir()
    rows.write_bytes(jsonl(8))
    subscribe, deploy = recipe()["subscribe"], recipe()["deploy"]

    def run() -> None:
        with Client(service.address, service.key) as client:
            assert subscribe(client, "https://hooks.example.com/pocl").startswith("whsec_")
            dataset = client.datasets.upload(rows)
            for _ in range(2):
                job = client.jobs.create(specification(dataset.id), labels={"deploy": "yes"})
                assert client.jobs.wait(job.id, timeout=100).status == "succeeded"
                placed = deploy(client, job.id, releases)
                assert deploy(client, job.id, releases) == placed
                assert (releases / "current").resolve() == placed
                assert (placed / "model.safetensors").is_file()
                assert client.checkpoints.get(placed.name).pinned
            assert len(list(client.jobs.list(status=["succeeded"], labels={"deploy": "yes"}))) == 2

    service.serve(run)
    assert len([each for each in releases.iterdir() if not each.is_symlink()]) == 2
