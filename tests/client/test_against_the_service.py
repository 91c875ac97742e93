"""`pocl_client` against the service: every resource is read as its model, and nothing is done twice."""

from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from fastapi import FastAPI
from pydantic import BaseModel
from starlette.testclient import TestClient

from domain.artifacts import ArtifactStore
from domain.db import Database
from domain.jobs.event_recorder import add_checkpoint
from pocl.events import PhaseChanged
from pocl.storage.manifest import MANIFEST, sha256_of, write_manifest
from pocl_client import AsyncClient, AuthenticationFailed, Client, DatasetRefused, RequestInvalid, RetryPolicy, models
from pocl_client.responses import StreamMessage
from tests.client.fakes import FakeClock
from tests.support.requests import KEY, LOOPBACK, TINY_MODEL, jsonl, specification
from tests.support.rows import envelopes, evaluated, step_logged
from tests.support.worker_actions import claim_queued_job, succeed_job, write_events

pytestmark = pytest.mark.system


class LossyTransport(httpx2.BaseTransport):
    """Carries each POST to the service, and loses the first response to it."""

    def __init__(self, inner: httpx2.BaseTransport) -> None:
        self._inner = inner
        self._seen: set[str] = set()

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        response = self._inner.handle_request(request)
        key = request.headers.get("idempotency-key")
        if key is not None and key not in self._seen:
            self._seen.add(key)
            response.read()
            raise httpx2.ReadError("the response was lost")
        return response


@pytest.fixture
def service(client: TestClient) -> Iterator[Client]:
    """The package's client, connected to the service in this process."""
    with Client(LOOPBACK, KEY, transport=client._transport, clock=FakeClock()) as connected:
        yield connected


@pytest.fixture
def lossy(client: TestClient) -> Client:
    retries = RetryPolicy(random=lambda: 1.0)
    return Client(LOOPBACK, KEY, transport=LossyTransport(client._transport), clock=FakeClock(), retries=retries)


def unknown_fields(model: BaseModel) -> set[str]:
    """Fields that the service sends and the models do not have, at any depth."""
    found = {f"{type(model).__name__}.{name}" for name in model.model_extra or {}}
    for value in dict(model).values():
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, BaseModel):
                found |= unknown_fields(each)
    return found


def test_a_job_lives_from_upload_to_deletion(service: Client, tmp_path: Path) -> None:
    samples = tmp_path / "train.jsonl"
    samples.write_bytes(jsonl(8))
    dataset = service.datasets.upload(samples)
    assert (dataset.name, dataset.status, dataset.rows) == ("train.jsonl", "ready", 8)
    assert [each.id for each in service.datasets.list()] == [dataset.id]
    spec = specification(dataset.id)

    plan = service.jobs.validate(spec)
    job = service.jobs.create(spec, name="first", labels={"team": "search"}, priority=3)
    assert (job.name, job.priority, job.progress.total_steps) == ("first", 3, plan.total_steps)
    assert [each.id for each in service.jobs.list(labels={"team": "search"}, status=["queued"])] == [job.id]
    assert list(service.jobs.list(labels={"team": "other"})) == []
    assert service.jobs.update(job.id, priority=7).priority == 7
    assert len(service.jobs.stages(job.id)) == len(plan.stages)
    cancelled = service.jobs.cancel(job.id)
    assert service.jobs.wait(job.id).status == cancelled.status == "cancelled"
    again = service.jobs.retry(job.id, start="start")
    assert again.retry_of == job.id
    service.jobs.cancel(again.id)
    for each in (again.id, job.id):
        service.jobs.delete(each)
    assert list(service.jobs.list()) == []
    service.datasets.delete(dataset.id)


def test_every_resource_is_read_as_its_model(service: Client, database: Database, dataset: str) -> None:
    service.jobs.create(specification(dataset))
    service.jobs.create(specification(dataset))
    claim = claim_queued_job(database)
    steps = [step_logged(step, loss=2.0) for step in (1, 2)]
    write_events(database, claim, envelopes(PhaseChanged(phase="training"), *steps, evaluated()), offset=1)
    job = claim.job_id
    read: list[BaseModel] = [
        service.jobs.get(job),
        *service.jobs.list(),
        *service.jobs.stages(job),
        *service.jobs.events(job),
        *service.jobs.attempts(job),
        service.jobs.metrics(job, names=["loss"], resolution=10),
        service.jobs.validate(specification(dataset)),
        service.datasets.get(dataset),
        *service.queue(),
        *service.workers(),
        *service.models(),
        *service.presets(),
        *service.methods(),
        service.usage(),
        service.quota(),
        service.version(),
        *service.items("/v1/keys", models.Key),
        *service.items("/v1/projects", models.Project),
        service.request("POST", "/v1/webhooks", models.WebhookWithSecret, json={"url": "https://example.com/hook"}),
        *service.items("/v1/webhooks", models.Webhook),
        service.request("GET", "/v1/retention", models.ProjectRetention),
    ]
    kinds = {type(each).__name__ for each in read}
    assert {"Job", "JobSummary", "Event", "Attempt", "Metrics", "QueuedJob", "Preset", "Method"} <= kinds
    assert set().union(*map(unknown_fields, read)) == set()


def test_no_work_is_done_twice_where_responses_are_lost(lossy: Client, service: Client) -> None:
    dataset = lossy.datasets.upload(jsonl(8), name="rows")
    job = lossy.jobs.create(specification(dataset.id))
    lossy.jobs.cancel(job.id)
    lossy.jobs.retry(job.id, start="start")
    assert len(list(service.datasets.list())) == 1
    assert len(list(service.jobs.list())) == 2


def test_a_large_file_is_waited_for(service: Client) -> None:
    assert service.datasets.upload(jsonl(800), name="large").rows == 800


def test_wrong_rows_are_named_with_their_pointers(service: Client) -> None:
    with pytest.raises(RequestInvalid) as small:
        service.datasets.upload(b'{"no": 1}\n' * 3, name="bad")
    assert small.value.code == "dataset_invalid"
    with pytest.raises(DatasetRefused) as large:
        service.datasets.upload(b'{"no": 1}\n' * 5000, name="bad")
    assert large.value.errors
    assert all(each.pointer for each in (*small.value.errors, *large.value.errors))


def test_a_wrong_field_is_named_with_its_pointer(service: Client, dataset: str) -> None:
    with pytest.raises(RequestInvalid) as caught:
        service.jobs.create(specification(dataset, seed="seven"))
    assert [each.pointer for each in caught.value.errors] == ["/spec/seed"]
    assert caught.value.request_id


def test_a_wrong_key_is_told_apart(client: TestClient) -> None:
    with pytest.raises(AuthenticationFailed):
        Client(LOOPBACK, "pocl_wrong", transport=client._transport).jobs.get("job_00000000")


def test_a_stream_ends_with_the_job(service: Client, database: Database, dataset: str) -> None:
    service.jobs.create(specification(dataset))
    claim = claim_queued_job(database)
    write_events(database, claim, envelopes(PhaseChanged(phase="training"), step_logged(1)), offset=1)
    succeed_job(database, claim)
    messages = list(service.jobs.stream(claim.job_id))
    assert messages[-1].type == "end"
    numbers = [content_of(each).id for each in messages]
    assert numbers == [each.id for each in service.jobs.events(claim.job_id)]
    assert [content_of(each).id for each in service.jobs.stream(claim.job_id, last_event_id=messages[1].id)] == numbers[
        2:
    ]
    assert list(service.jobs.stream(claim.job_id, last_event_id=messages[-1].id)) == []


def content_of(message: StreamMessage) -> models.Event:
    assert isinstance(message.content, models.Event)
    return message.content


def test_a_checkpoint_and_a_report_are_downloaded(
    app: FastAPI, service: Client, database: Database, dataset: str, tmp_path: Path
) -> None:
    service.jobs.create(specification(dataset))
    claim = claim_queued_job(database)
    directory = tmp_path / "made"
    files = {"model.safetensors": bytes(range(256)) * 400, "folder/käse-1.txt": b"cheese", "empty": b""}
    for name, content in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)
    write_manifest(directory)
    store: ArtifactStore = app.state.store
    key = f"jobs/{claim.job_id}/checkpoints/best"
    size = store.publish(directory, key).size_bytes
    with database.transaction(write=True) as session:
        add_checkpoint(
            session, claim, kind="best", step=9, stage=1, store_key=key, size_bytes=size,
            manifest_sha256=sha256_of(directory / MANIFEST),
        )  # fmt: skip
    best = service.checkpoints.newest(claim.job_id, "best")
    assert best is not None
    assert service.checkpoints.newest(claim.job_id, "final") is None
    target = service.checkpoints.download(best.id, tmp_path / "here")
    assert {str(each.relative_to(target)): each.read_bytes() for each in target.rglob("*") if each.is_file()} == {
        **files,
        MANIFEST: (directory / MANIFEST).read_bytes(),
    }
    one = service.checkpoints.download_file(best.id, "folder/käse-1.txt", tmp_path / "one")
    assert one.read_bytes() == b"cheese"
    assert service.checkpoints.pin(best.id).pinned
    assert not service.checkpoints.unpin(best.id).pinned
    service.jobs.cancel(claim.job_id)


def test_the_same_with_await(app: FastAPI, client: TestClient) -> None:
    del client  # It has started the service.

    async def run() -> list[str]:
        async with AsyncClient(LOOPBACK, KEY, transport=httpx2.ASGITransport(app=app)) as connected:
            dataset = await connected.datasets.upload(jsonl(8), name="rows")
            job = await connected.jobs.create(specification(dataset.id, teacher=TINY_MODEL))
            await connected.jobs.cancel(job.id)
            ended = await connected.jobs.wait(job.id)
            messages = [each.type async for each in connected.jobs.stream(job.id)]
            return [ended.status, *[each.id async for each in connected.jobs.list()], messages[-1], job.id]

    import anyio

    status, listed, last, job_id = anyio.run(run)
    assert (status, listed, last) == ("cancelled", job_id, "end")
