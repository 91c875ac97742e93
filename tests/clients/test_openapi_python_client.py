"""A client that `openapi-python-client` generates: it has every operation, sends nothing of its own, and runs a job."""

import hashlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pocl.spec import PRESETS, KDMethod, resolve
from tests.clients.conftest import Service
from tests.clients.generated_client import GeneratedClient, generate_client, imported, operation_ids
from tests.support.requests import jsonl

pytestmark = pytest.mark.system

MINIMAL: dict[str, Any] = {
    "teacher": {"path": "t"},
    "student": {"path": "s"},
    "data": {"train": {"dataset": "ds_33ntwd1jb3fq35ykbkvw0qcdz8"}},
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("python")
    assert generate_client(directory) == []
    return directory


@pytest.fixture(scope="module")
def generated(directory: Path) -> Iterator[GeneratedClient]:
    with imported(directory) as client:
        yield client


def test_it_has_every_operation(directory: Path) -> None:
    assert set(operation_ids()) <= {path.stem for path in directory.glob("*/api/*/*.py")}


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_it_sends_nothing_of_its_own_that_the_preset_decides(generated: GeneratedClient, preset: str) -> None:
    # Empty objects, each of which the client fills with the defaults that it knows.
    parts: dict[str, Any] = {name: {} for name in ("training", "evaluation", "checkpoints", "export", "resources")}
    parts |= {"curriculum": {"ranking": {}, "temperature": {}, "kd_weight": {}}}
    for method in map(str, KDMethod):
        posted = {**MINIMAL, "preset": preset, "method": {"name": method}, **parts}
        sent = generated.model("DistillationSpec").from_dict(posted).to_dict()
        assert resolve(sent) == resolve({**MINIMAL, "preset": preset, "method": method}), method


def test_it_runs_a_job(generated: GeneratedClient, service: Service) -> None:
    client = generated.module("client").AuthenticatedClient(
        base_url=service.address, token=service.key, raise_on_unexpected_status=True
    )
    with client:
        seen = service.serve(lambda: run_job(generated, client))
    assert seen["status"] == "succeeded"
    assert seen["transitions"] == ["queued", "preparing", "running", "succeeded"]
    assert seen["kinds"] >= {"stage", "final"}
    assert seen["digests"]
    assert all(sent == announced for sent, announced in seen["digests"])
    assert "/name: " in seen["refusal"]


def run_job(generated: GeneratedClient, client: Any) -> dict[str, Any]:
    """Upload, submit, follow and download with the generated functions; what came of it."""

    def call(name: str, *path: str, **arguments: Any) -> Any:
        return generated.module(f"api.{name}").sync(*path, client=client, **arguments)

    model = generated.model
    file = generated.module("types").File(payload=io.BytesIO(jsonl(8)), file_name="rows.jsonl")
    dataset = call("datasets.upload_dataset", body=model("DatasetUpload")(file=file))
    spec = {
        "preset": "quick",
        "teacher": {"random": {"layers": 4}},
        "student": {"from_teacher": {"layers": [0, 3]}},
        "data": {"train": {"dataset": dataset.id}},
        "curriculum": {"stages": 2},
    }
    body = model("JobCreate")(spec=model("DistillationSpec").from_dict(spec), name="generated")
    job = call("jobs.create_job", body=body, idempotency_key="python")
    assert call("jobs.create_job", body=body, idempotency_key="python").id == job.id
    refusal = call("jobs.create_job", body=model("JobCreate")(spec=body.spec, name="x" * 300))
    while job.finished_at is None:
        job = call("jobs.get_job", job.id, wait=20)
    events = call("jobs.list_job_events", job.id).data
    checkpoints = call("jobs.list_job_checkpoints", job.id).data
    final = next(each for each in checkpoints if each.kind == "final")
    manifest = call("checkpoints.get_checkpoint_manifest", final.id)
    digests = [
        (digest_of(generated, client, final.id, file.path), file.sha256)
        for file in manifest.files
        if file.path.endswith(".safetensors")
    ]
    return {
        "status": job.status,
        "transitions": [each.data.additional_properties["to"] for each in events if each.type_ == "status"],
        "kinds": {str(each.kind) for each in checkpoints},
        "digests": digests,
        "refusal": refusal.message,
    }


def digest_of(generated: GeneratedClient, client: Any, checkpoint: str, path: str) -> str:
    download = generated.module("api.checkpoints.download_checkpoint_file").sync_detailed(
        checkpoint, path, client=client
    )
    return hashlib.sha256(download.content).hexdigest()
