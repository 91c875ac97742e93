"""Chat completions: the shapes of OpenAI's API, on both databases, with a worker that a thread of the test plays."""

import asyncio
import json
import threading
from typing import Any

import pytest
import sqlalchemy as sa
from fastapi import FastAPI
from starlette.testclient import TestClient
from starlette.types import Message

from api.chat.completions import ChatResponse, PendingAnswer
from domain.chat.models import ChatRequest, ChatStatus
from domain.chat.repository import ChatFailure, add_request, claim_next, renew, settle, snapshots
from domain.chat.submission import limits_of
from domain.checkpoints.models import Checkpoint
from domain.db import Database, db_now
from domain.settings import Settings
from pocl.chat.protocol import ChatMessage, ChatQuestion
from pocl.spec import ModelRef
from tests.support.chat_worker import answering
from tests.support.rows import SPEC, claim_job, save_checkpoint
from tests.support.waiting import eventually

MESSAGES = [{"role": "user", "content": "Why?"}]
FAILED = ChatFailure("model_unsupported", "No such model.", "user")


@pytest.fixture
def checkpoint(database: Database) -> Checkpoint:
    """A checkpoint of a job with a system message."""
    spec = {**SPEC, "data": {**SPEC["data"], "system": "Be brief."}, "training": {"precision": "fp32"}}
    return save_checkpoint(database, claim_job(database, posted_spec=spec), "final", 20)


def address(checkpoint: Checkpoint) -> str:
    return f"/v1/checkpoints/{checkpoint.id}/chat/completions"


def body(**fields: Any) -> dict[str, Any]:
    return {"messages": MESSAGES, "temperature": 0, **fields}


def messages_of(text: str) -> list[dict[str, Any]]:
    """The messages of a stream, which must end as OpenAI's do."""
    *messages, done, rest = text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(message.removeprefix("data: ")) for message in messages if not message.startswith(":")]


def test_answer_has_the_shape_of_openai(client: TestClient, database: Database, checkpoint: Checkpoint) -> None:
    with answering(database) as asked:
        response = client.post(address(checkpoint), json=body(user="me", stop="x", max_tokens=7))
    assert response.status_code == 200, response.text
    answer = response.json()
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Because it is.", "refusal": None},
            "finish_reason": "stop",
            "logprobs": None,
        }
    ]
    assert answer["usage"] == {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}
    assert (answer["object"], answer["model"]) == ("chat.completion", checkpoint.id)
    assert (answer["warnings"], answer["ignored"]) == (["Careful."], ["user"])
    (question,) = asked
    assert (question.stop, question.max_new_tokens, question.temperature) == (("x",), 7, 0)


def test_checkpoint_is_asked_as_its_job_evaluates_it(
    client: TestClient, database: Database, checkpoint: Checkpoint
) -> None:
    with answering(database) as asked:
        client.post(address(checkpoint), json=body())
    (question,) = asked
    assert (question.template.system, question.precision) == ("Be brief.", "fp32")
    assert question.model == ModelRef(checkpoint=checkpoint.id)


def test_stream_adds_up_to_the_answer(client: TestClient, database: Database, checkpoint: Checkpoint) -> None:
    asked = body(stream=True, stream_options={"include_usage": True}, store=True)
    with answering(database, "Be", "Because"):
        response = client.post(address(checkpoint), json=asked)
    assert response.headers["content-type"] == "text/event-stream"
    first, *parts, last, usage = messages_of(response.text)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(part["choices"][0]["delta"]["content"] for part in parts) == "Because it is."
    assert last["choices"][0]["finish_reason"] == "stop"
    assert (last["warnings"], last["ignored"]) == (["Careful."], ["store"])
    assert (usage["choices"], usage["usage"]["total_tokens"]) == ([], 12)
    assert {part["object"] for part in parts} == {"chat.completion.chunk"}


def test_stream_without_usage_has_none(client: TestClient, database: Database, checkpoint: Checkpoint) -> None:
    with answering(database, "Be"):
        response = client.post(address(checkpoint), json=body(stream=True))
    assert not [message for message in messages_of(response.text) if "usage" in message]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("failure", "status"),
    [
        (FAILED, 422),
        (ChatFailure("context_length_exceeded", "Too long.", "user"), 422),
        (ChatFailure("worker_lost", "It is lost.", "system"), 503),
        (ChatFailure("out_of_memory", "It does not fit.", "capacity"), 503),
    ],
    ids=["model_unsupported", "context_length_exceeded", "worker_lost", "out_of_memory"],
)
def test_failure_before_the_first_word_is_a_problem(
    client: TestClient, database: Database, checkpoint: Checkpoint, failure: ChatFailure, status: int, stream: bool
) -> None:
    with answering(database, outcome=failure):
        response = client.post(address(checkpoint), json=body(stream=stream))
    assert response.status_code == status
    problem = response.json()
    assert (problem["code"], problem["detail"]) == (failure.code, failure.message)
    assert ("retry-after" in response.headers) is (status == 503)


def test_failure_within_a_stream_ends_it_with_an_error(
    client: TestClient, database: Database, checkpoint: Checkpoint
) -> None:
    seen = threading.Event()
    follow = client.app.state.chat_watcher.follow  # type: ignore[attr-defined] # The application is FastAPI's.

    async def follow_and_tell(chat_id: str, **options: Any) -> Any:
        async for snapshot in follow(chat_id, **options):
            yield snapshot
            if snapshot is not None and snapshot.text:
                seen.set()

    def play() -> None:
        claims: list[Any] = []

        def claimed() -> bool:
            with database.transaction(write=True) as session:
                claims.append(claim_next(session, worker="worker-1", lease_seconds=60))
            return claims[-1] is not None

        eventually(claimed, what="a conversation")
        with database.transaction(write=True) as session:
            renew(session, claims[-1], text="Be", tokens=1, lease_seconds=60)
        assert seen.wait(30)
        with database.transaction(write=True) as session:
            settle(session, claims[-1], ChatFailure("worker_lost", "It is lost.", "system"))

    client.app.state.chat_watcher.follow = follow_and_tell  # type: ignore[attr-defined] # As above.
    thread = threading.Thread(target=play)
    thread.start()
    response = client.post(address(checkpoint), json=body(stream=True))
    thread.join()
    last = response.text.removesuffix("\n\n").split("\n\n")[-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "worker_lost"
    assert "[DONE]" not in response.text


def test_request_that_no_worker_takes_is_a_503_with_the_reason(
    client: TestClient, database: Database, checkpoint: Checkpoint
) -> None:
    def come_late() -> bool:
        with database.transaction(write=True) as session:
            found = session.execute(sa.update(ChatRequest).values(waits_until=db_now(-1)).returning(ChatRequest.id))
            return bool(found.all())

    thread = threading.Thread(target=lambda: eventually(come_late, what="a conversation"))
    thread.start()
    response = client.post(address(checkpoint), json=body())
    thread.join()
    assert (response.status_code, response.json()["code"]) == (503, "no_worker_free")
    assert "none is running" in response.json()["detail"]
    assert int(response.headers["retry-after"]) > 0


@pytest.mark.parametrize("stream", [False, True])
def test_client_that_disconnects_cancels_its_request(
    app: FastAPI, settings: Settings, database: Database, stream: bool
) -> None:
    question = ChatQuestion(
        id="",
        model=ModelRef(path="tiny"),
        messages=(ChatMessage(role="user", content="Why?"),),
        max_new_tokens=8,
        temperature=0,
        top_p=1,
        seed=0,
    )
    with database.transaction(write=True) as session:
        row = add_request(session, "default", question, limits_of(settings))
    answer = PendingAnswer(row.id, 0, "tiny", stream, False, [])
    sent: list[Any] = []

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    response = ChatResponse(app.state.chat_watcher, answer, keep_alive_seconds=15)
    asyncio.run(response({"type": "http", "state": {}}, receive, send))
    assert sent == []
    with database.transaction(write=False) as session:
        assert snapshots(session, [row.id])[row.id].status is ChatStatus.CANCELLED


@pytest.mark.parametrize(
    ("fields", "pointer"),
    [
        ({"messages": []}, "/messages"),
        ({"messages": [*MESSAGES, {"role": "assistant", "content": "So."}]}, ""),
        ({"messages": [{"role": "tool", "content": "4"}]}, "/messages/0/role"),
        ({"messages": [{"role": "user", "content": "a" * 70_000}] * 2}, ""),
        ({"n": 2}, "/n"),
        ({"logprobs": True}, "/logprobs"),
        ({"tools": []}, "/tools"),
        ({"frequency_penalty": 0.5}, "/frequency_penalty"),
        ({"max_tokens": 1_000_000}, "/max_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, ""),
        ({"stream_options": {"include_usage": True}}, ""),
        ({"model": "gpt-4o"}, "/model"),
        ({"temperature": 3}, "/temperature"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else value or "body",
)
def test_what_is_not_supported_is_refused_with_its_place(
    client: TestClient, checkpoint: Checkpoint, fields: dict[str, Any], pointer: str
) -> None:
    response = client.post(address(checkpoint), json=body(**fields))
    assert response.status_code == 422
    assert pointer in [error["pointer"] for error in response.json()["errors"]]


def test_model_below_the_roots_answers_by_its_path(client: TestClient, database: Database, settings: Settings) -> None:
    (settings.model_roots[0] / "family" / "tiny").mkdir(parents=True)
    with answering(database) as asked:
        response = client.post("/v1/models/family/tiny/chat/completions", json=body(model="family/tiny"))
    assert (response.status_code, response.json()["model"]) == (200, "family/tiny")
    assert asked[0].model == ModelRef(path="family/tiny")


@pytest.mark.parametrize("path", ["nothing", "../../etc", "/etc"])
def test_model_that_is_not_below_the_roots_is_not_found(client: TestClient, path: str) -> None:
    response = client.post(f"/v1/models/{path.replace('..', '%2e%2e')}/chat/completions", json=body())
    assert response.status_code == 404


def test_project_that_waits_for_too_many_answers_is_told_so(
    client: TestClient, database: Database, checkpoint: Checkpoint, settings: Settings
) -> None:
    question = ChatQuestion(
        id="",
        model=ModelRef(path="tiny"),
        messages=(ChatMessage(role="user", content="Why?"),),
        max_new_tokens=8,
        temperature=0,
        top_p=1,
        seed=0,
    )
    with database.transaction(write=True) as session:
        for _ in range(settings.max_chats_per_project):
            add_request(session, "default", question, limits_of(settings))
    response = client.post(address(checkpoint), json=body())
    assert (response.status_code, response.json()["code"]) == (429, "too_many_chats")
    assert "retry-after" in response.headers
