"""The unmodified `openai` package moves in: files, jobs, events, checkpoints, models and chat, on both databases."""

import io
import json
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import torch
from fastapi import FastAPI
from openai.types.fine_tuning import FineTuningJob
from starlette.testclient import TestClient

from domain.db import Database
from domain.jobs import repository
from domain.jobs.models import Job
from domain.jobs.states import JobStatus
from domain.keys.repository import create_key
from domain.projects.repository import create_project
from domain.settings import Settings
from pocl.export.model_directory import save_model
from pocl.models.loading import load_teacher
from pocl.spec import ModelRef, RandomModel
from pocl.storage.manifest import write_manifest
from tests.support.chat_worker import ANSWER, answering
from tests.support.requests import KEY, LOOPBACK, jsonl
from tests.support.rows import claim_job, save_checkpoint, set_status

BASE_URL = f"{LOOPBACK}/openai/v1"
MESSAGES: list[dict[str, str]] = [{"role": "user", "content": "Why?"}]


class Unreliable(httpx2.BaseTransport):
    """Loses the first responses to creates: the service has done the work, and the client waits in vain."""

    def __init__(self, inner: httpx2.BaseTransport, lost: int) -> None:
        self.inner = inner
        self.lost = lost
        self.sent: list[httpx2.Response] = []

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        response = self.inner.handle_request(request)
        self.sent.append(response)
        if request.method == "POST" and self.lost:
            self.lost -= 1
            response.read()
            raise httpx2.ReadTimeout("lost", request=request)
        return response


@pytest.fixture
def service(app: FastAPI) -> Iterator[TestClient]:
    with TestClient(app, base_url=LOOPBACK, raise_server_exceptions=False) as client:
        yield client


def package(service: TestClient, *, key: str = KEY, lost: int = 0, **options: Any) -> tuple[openai.OpenAI, Unreliable]:
    """The package over the application, and what passes between them."""
    transport = Unreliable(service._transport, lost)
    http = httpx2.Client(transport=transport, base_url=BASE_URL)
    return openai.OpenAI(api_key=key, base_url=BASE_URL, http_client=http, **options), transport


@pytest.fixture
def client(service: TestClient) -> openai.OpenAI:
    return package(service)[0]


@pytest.fixture
def training_file(client: openai.OpenAI) -> str:
    return client.files.create(file=("train.jsonl", jsonl(8)), purpose="fine-tune").id


def create(client: openai.OpenAI, training_file: str, **fields: Any) -> FineTuningJob:
    return client.fine_tuning.jobs.create(training_file=training_file, **{"model": "student", **fields})


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher and a student with its tokenizer."""
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("teacher", "student")):
        size = RandomModel(layers=2, hidden_size=16, heads=2, seed=seed)
        loaded = load_teacher(ModelRef(random=size), device=torch.device("cpu"), dtype=torch.float32)
        save_model(loaded.model, loaded.tokenizer, root / name)
    return root


@pytest.fixture(autouse=True)
def _model_roots(settings: Settings, models: Path) -> None:
    settings.model_roots[0].parent.mkdir(exist_ok=True)
    shutil.copytree(models, settings.model_roots[0])


def stored(database: Database, job_id: str) -> Job:
    with database.transaction(write=False) as session:
        return repository.get_job(session, "default", job_id)


def count_jobs(client: openai.OpenAI) -> int:
    return len(list(client.fine_tuning.jobs.list()))


def test_file_is_uploaded_listed_downloaded_and_deleted(client: openai.OpenAI) -> None:
    content = jsonl(3)
    made = client.files.create(file=("train.jsonl", content), purpose="fine-tune")
    assert (made.object, made.purpose, made.status, made.filename) == ("file", "fine-tune", "processed", "train.jsonl")
    assert client.files.wait_for_processing(made.id).id == made.id
    assert client.files.retrieve(made.id).bytes == len(client.files.content(made.id).content)
    rows = [json.loads(line) for line in client.files.content(made.id).text.splitlines()]
    assert len(rows) == 3
    others = [client.files.create(file=("more.jsonl", jsonl(n)), purpose="fine-tune").id for n in (4, 5)]
    assert [each.id for each in client.files.list(limit=1)] == [*reversed(others), made.id]
    assert client.files.delete(made.id).deleted
    with pytest.raises(openai.NotFoundError) as error:
        client.files.retrieve(made.id)
    assert error.value.code == "dataset_not_found"


@pytest.mark.parametrize("purpose", ["batch", "assistants"])
def test_file_for_another_purpose_is_refused(client: openai.OpenAI, purpose: Any) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        client.files.create(file=("train.jsonl", jsonl(3)), purpose=purpose)
    assert error.value.param == "purpose"
    assert list(client.files.list()) == []


def test_file_with_bad_rows_is_refused_with_their_lines(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        client.files.create(file=("train.jsonl", b'{"messages": []}\n'), purpose="fine-tune")
    assert error.value.code == "dataset_invalid"
    assert "lines.1" in error.value.message


def test_job_is_trained_on_the_answers_unless_it_says_how_to_distil(
    client: openai.OpenAI, database: Database, training_file: str
) -> None:
    job = create(
        client,
        training_file,
        suffix="first",
        seed=7,
        hyperparameters={"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": "auto"},
        metadata={"team": "search"},
        validation_file=training_file,
    )
    assert (job.status, job.model, job.training_file, job.validation_file) == (
        *("queued", "student", training_file, training_file),
    )
    assert (job.seed, job.hyperparameters.n_epochs, job.hyperparameters.batch_size) == (7, 2, 4)
    row = stored(database, job.id)
    assert (row.name, row.labels, row.spec["method"]["name"], row.spec["teacher"]) == (
        *("first", {"team": "search"}, "sft", None),
    )
    assert (row.spec["curriculum"]["epochs_per_stage"], row.spec["training"]["batch_size"], row.spec["seed"]) == (
        2,
        4,
        7,
    )


@pytest.mark.parametrize("place", ["method", "extra_body"])
def test_distillation_is_a_specification_beside_the_student(
    client: openai.OpenAI, database: Database, training_file: str, place: str
) -> None:
    distillation = {"preset": "quick", "teacher": "teacher", "method": "js", "curriculum": {"stages": 2}}
    method: Any = {"type": "distillation", "distillation": distillation}
    fields: dict[str, Any] = {"method": method} if place == "method" else {"extra_body": {"distillation": distillation}}
    job = create(client, training_file, **fields)
    spec = stored(database, job.id).spec
    assert (spec["teacher"]["path"], spec["student"]["path"], spec["method"]["name"]) == ("teacher", "student", "js")
    assert spec["curriculum"]["stages"] == 2
    assert job.method is not None
    assert job.method.model_dump()["type"] == "distillation"


def test_student_may_be_cut_out_of_the_teacher(client: openai.OpenAI, database: Database, training_file: str) -> None:
    distillation = {"preset": "quick", "teacher": "teacher", "student": {"from_teacher": {"layers": [1]}}}
    job = create(client, training_file, model="teacher", extra_body={"distillation": distillation})
    assert stored(database, job.id).spec["student"]["from_teacher"] == {"layers": [1]}
    with pytest.raises(openai.BadRequestError) as error:
        create(client, training_file, model="student", extra_body={"distillation": distillation})
    assert error.value.param == "model"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"training_file": "file-abc"}, "training_file"),
        ({"training_file": "ds_00000000000000000000000000"}, "training_file"),
        ({"model": "nothing"}, "model"),
        ({"model": "gpt-4o-mini-2024-07-18"}, "model"),
        ({"method": {"type": "dpo"}}, "method.type"),
        ({"hyperparameters": {"learning_rate_multiplier": 2.0}}, "hyperparameters.learning_rate_multiplier"),
        ({"extra_body": {"distillation": {"teacher": "nothing"}}}, "distillation.teacher.path"),
        ({"extra_body": {"distillation": {"teacher": "teacher", "stages": 3}}}, "distillation.stages"),
        ({"extra_body": {"distillation": {"teacher": "teacher", "data": {"train": {}}}}}, "distillation.data.train"),
        ({"metadata": {"a b": "x"}}, "metadata"),
        ({"extra_body": {"suffixes": "x"}}, "suffixes"),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "a/b"}}]}, "integrations"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_mapped_is_refused_with_its_name_and_once(
    service: TestClient, training_file: str, fields: dict[str, Any], param: str
) -> None:
    client, transport = package(service)
    with pytest.raises(openai.BadRequestError) as error:
        create(client, **{"training_file": training_file, **fields})
    assert (error.value.param or "").startswith(param)
    assert error.value.message
    # The package was told not to try again.
    assert [response.status_code for response in transport.sent] == [400]


@pytest.mark.parametrize("lost", [1, 2])
def test_create_that_the_package_sends_again_makes_one_job(service: TestClient, training_file: str, lost: int) -> None:
    client, transport = package(service, lost=lost)
    made = create(client, training_file)
    assert [response.headers.get("idempotent-replayed") for response in transport.sent] == [None, *["true"] * lost]
    assert [job.id for job in client.fine_tuning.jobs.list()] == [made.id]
    # A call of its own is a job of its own, however equal it is.
    again = create(client, training_file)
    assert [job.id for job in client.fine_tuning.jobs.list()] == [again.id, made.id]


def test_create_with_a_key_of_the_client_is_replayed_for_a_day(client: openai.OpenAI, training_file: str) -> None:
    key = {"Idempotency-Key": "mine"}
    assert create(client, training_file, extra_headers=key).id == create(client, training_file, extra_headers=key).id
    assert count_jobs(client) == 1


def test_jobs_are_listed_in_pages_and_filtered_by_metadata(client: openai.OpenAI, training_file: str) -> None:
    made = [create(client, training_file, metadata={"team": f"t{n % 2}"}).id for n in range(3)]
    assert [job.id for job in client.fine_tuning.jobs.list(limit=1)] == made[::-1]
    filtered = client.fine_tuning.jobs.list(metadata={"team": "t0"})
    assert [job.id for job in filtered] == [made[2], made[0]]


def test_job_is_paused_resumed_and_cancelled(
    service: TestClient, client: openai.OpenAI, database: Database, training_file: str
) -> None:
    job = create(client, training_file)
    with database.transaction(write=True) as session:
        set_status(session, job.id, JobStatus.PAUSED)
    assert str(client.fine_tuning.jobs.retrieve(job.id).status) == "paused"
    assert client.fine_tuning.jobs.resume(job.id).status == "queued"
    # Nothing holds it: it cannot be paused, and the package does not ask again.
    counted, transport = package(service)
    with pytest.raises(openai.ConflictError) as error:
        counted.fine_tuning.jobs.pause(job.id)
    assert (error.value.code, len(transport.sent)) == ("illegal_transition", 1)
    assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    assert client.fine_tuning.jobs.retrieve(job.id).finished_at is not None


def test_events_come_from_the_newest_on(client: openai.OpenAI, training_file: str) -> None:
    job = create(client, training_file)
    client.fine_tuning.jobs.cancel(job.id)
    events = list(client.fine_tuning.jobs.list_events(job.id, limit=1))
    assert [event.message for event in events] == [
        "The job was cancelled.",
        "The job was created.",
    ]
    assert len({event.id for event in events}) == 2


@pytest.fixture
def succeeded(database: Database, settings: Settings) -> tuple[str, str]:
    """The ids of a job that has succeeded and of its final checkpoint."""
    claim = claim_job(database)
    row = save_checkpoint(database, claim, "final", 20, stage=1)
    directory = settings.artifact_root / row.store_key
    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    write_manifest(directory)
    with database.transaction(write=True) as session:
        set_status(session, claim.job_id, JobStatus.SUCCEEDED)
    return claim.job_id, row.id


def test_result_is_named_and_downloaded_as_a_file(client: openai.OpenAI, succeeded: tuple[str, str]) -> None:
    job_id, checkpoint = succeeded
    job = client.fine_tuning.jobs.retrieve(job_id)
    assert (job.status, job.fine_tuned_model, job.result_files) == ("succeeded", checkpoint, [checkpoint])
    (listed,) = client.fine_tuning.jobs.checkpoints.list(job_id)
    assert (listed.fine_tuned_model_checkpoint, listed.step_number) == (checkpoint, 20)
    file = client.files.retrieve(checkpoint)
    content = client.files.content(checkpoint).content
    assert (file.purpose, file.bytes) == ("fine-tune-results", len(content))
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        assert f"{checkpoint}/config.json" in archive.getnames()


def test_models_and_students_are_listed(client: openai.OpenAI, succeeded: tuple[str, str]) -> None:
    _, checkpoint = succeeded
    assert [model.id for model in client.models.list()] == [checkpoint, "student", "teacher"]
    assert client.models.retrieve(checkpoint).owned_by == "default"
    assert client.models.retrieve("teacher").id == "teacher"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4o")


def test_student_answers_the_package(client: openai.OpenAI, database: Database, succeeded: tuple[str, str]) -> None:
    _, checkpoint = succeeded
    messages: Any = MESSAGES
    with answering(database):
        answer = client.chat.completions.create(model=checkpoint, messages=messages, temperature=0)
    assert answer.choices[0].message.content == ANSWER.text
    assert answer.usage is not None
    assert answer.usage.completion_tokens == ANSWER.completion_tokens
    with answering(database, "Because"):
        stream = client.chat.completions.create(
            model=checkpoint, messages=messages, stream=True, stream_options={"include_usage": True}
        )
        chunks = list(stream)
    said = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(said) == ANSWER.text
    assert chunks[-1].usage is not None
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-4o", messages=messages)


def test_wrong_key_is_an_authentication_error(service: TestClient) -> None:
    client, _ = package(service, key="wrong")
    with pytest.raises(openai.AuthenticationError) as error:
        client.models.list()
    assert error.value.code == "unauthenticated"


def test_unknown_address_has_the_shape_too(service: TestClient) -> None:
    response = service.get("/openai/v1/assistants", headers={"authorization": f"Bearer {KEY}"})
    assert response.status_code == 404
    assert set(response.json()["error"]) == {"message", "type", "param", "code", "request_id"}


def test_native_errors_keep_their_shape(service: TestClient) -> None:
    response = service.get("/v1/jobs/job_00000000000000000000000000", headers={"authorization": f"Bearer {KEY}"})
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["code"] == "job_not_found"


def test_another_project_finds_nothing(
    service: TestClient, database: Database, training_file: str, succeeded: tuple[str, str]
) -> None:
    with database.transaction(write=True) as session:
        create_project(session, "beta")
        _, token = create_key(session, project="beta", name="visitor", scopes=["submit"])
        _, reader = create_key(session, project="default", name="reader", scopes=["read"])
    stranger, _ = package(service, key=str(token))
    job_id, checkpoint = succeeded
    visits: list[Any] = [
        lambda: stranger.files.retrieve(training_file),
        lambda: stranger.files.content(training_file),
        lambda: stranger.files.delete(training_file),
        lambda: stranger.files.retrieve(checkpoint),
        lambda: stranger.files.content(checkpoint),
        lambda: stranger.fine_tuning.jobs.retrieve(job_id),
        lambda: stranger.fine_tuning.jobs.cancel(job_id),
        lambda: stranger.fine_tuning.jobs.pause(job_id),
        lambda: stranger.fine_tuning.jobs.resume(job_id),
        lambda: stranger.fine_tuning.jobs.list_events(job_id),
        lambda: stranger.fine_tuning.jobs.checkpoints.list(job_id),
        lambda: stranger.models.retrieve(checkpoint),
        lambda: stranger.chat.completions.create(model=checkpoint, messages=MESSAGES),  # type: ignore[arg-type] # Plain dictionaries, which the package takes.
    ]
    for visit in visits:
        with pytest.raises(openai.NotFoundError):
            visit()
    assert len(list(stranger.files.list())) == len(list(stranger.fine_tuning.jobs.list())) == 0
    assert checkpoint not in [model.id for model in stranger.models.list()]
    # What changes something needs more than a key that reads.
    reading, _ = package(service, key=str(reader))
    assert reading.fine_tuning.jobs.retrieve(job_id).id == job_id
    for change in (reading.fine_tuning.jobs.cancel, reading.files.delete):
        with pytest.raises(openai.PermissionDeniedError):
            change(job_id)
