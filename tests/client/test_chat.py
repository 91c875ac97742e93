"""Conversations with a checkpoint: streamed in OpenAI's shape."""

import json
from typing import Any

import httpx2
import pytest

from pocl_client import ApiError, ResponseInvalid, ServerFault, ServiceUnreachable
from tests.client.fakes import BrokenStream, FakeService, answering, connect, problem

QUESTION = [{"role": "user", "content": "Name a fruit."}]


def chunk(**delta: Any) -> bytes:
    piece = {"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
    return f"data: {json.dumps(piece)}\n\n".encode()


def answer(*pieces: bytes) -> httpx2.Response:
    return httpx2.Response(200, headers={"content-type": "text/event-stream"}, content=b"".join(pieces))


DONE = b"data: [DONE]\n\n"
LAST = b'data: {"choices": [], "usage": {"total_tokens": 3}}\n\n'


def test_an_answer_comes_in_pieces() -> None:
    service = answering(answer(chunk(role="assistant"), chunk(content="A ban"), chunk(content="ana."), LAST, DONE))
    pieces = list(connect(service).checkpoints.chat("ckpt_1", QUESTION, temperature=0, seed=None))
    assert pieces == ["A ban", "ana."]
    assert json.loads(service.requests[0].content) == {"messages": QUESTION, "stream": True, "temperature": 0}
    assert service.requests[0].url.path == "/v1/checkpoints/ckpt_1/chat/completions"


def test_an_answer_that_fails_on_its_way_says_why() -> None:
    failure = b'data: {"error": {"code": "chat_failed", "message": "The worker has stopped."}}\n\n'
    service = answering(answer(chunk(content="A"), failure, DONE))
    with pytest.raises(ApiError, match="The worker has stopped"):
        list(connect(service).checkpoints.chat("ckpt_1", QUESTION))


def test_an_answer_that_breaks_off_is_no_answer() -> None:
    with pytest.raises(ResponseInvalid, match="broke off"):
        list(connect(answering(answer(chunk(content="A")))).checkpoints.chat("ckpt_1", QUESTION))
    broken = httpx2.Response(
        200, headers={"content-type": "text/event-stream"}, stream=BrokenStream([chunk(content="A")])
    )
    with pytest.raises(ServiceUnreachable):
        list(connect(answering(broken)).checkpoints.chat("ckpt_1", QUESTION))


def test_a_busy_service_is_told_at_once() -> None:
    service = FakeService(lambda _: problem(503, "no_worker_free"))
    with pytest.raises(ServerFault):
        list(connect(service).checkpoints.chat("ckpt_1", QUESTION))
    # Each try would wait for a worker anew.
    assert len(service.requests) == 1


def test_a_question_is_led_nowhere_else() -> None:
    service = answering(httpx2.Response(307, headers={"location": "https://elsewhere.test/"}))
    with pytest.raises(ResponseInvalid, match="POCL_URL"):
        list(connect(service).checkpoints.chat("ckpt_1", QUESTION))
