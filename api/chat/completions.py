"""Responses that wait for the answer of a worker: as a whole, or as server-sent events while it is generated.

The rows are the way from the worker to the client: a response reads its row again and again, so any API process can
give it, and holds neither a connection nor a thread meanwhile. The status of a stream is decided once there is
something to send: a request that no worker takes is a plain 503. Whoever stops reading cancels the request.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any, Final

import orjson
from anyio.to_thread import run_sync
from fastapi import Depends, Request, Response
from starlette.types import Receive, Scope, Send

from api.chat.schemas import (
    ChatAnswerMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    ChatDelta,
    ChatUsage,
    seconds_since_1970,
)
from api.sessions import transaction_slot
from api.single_flight import SingleFlightCache
from domain.chat.models import ChatRequest, ChatStatus
from domain.chat.repository import NO_WORKER_FREE, WORKER_LOST, ChatFailure, ChatSnapshot, cancel, expire, snapshots
from domain.database_errors import DatabaseUnavailable
from domain.db import Database
from domain.errors import ApiError, NotFound, Unavailable, Unprocessable

_KEEP_ALIVE: Final = b": keep-alive\n\n"
_DONE: Final = b"data: [DONE]\n\n"
_OPTIONAL_FIELDS: Final = ("usage", "warnings", "ignored")
"""Fields of a message that only the last ones have."""


class ChatRequestLost(NotFound):
    """The conversation was deleted while it was being answered."""

    code = "chat_not_found"


class NoWorkerFree(Unavailable):
    """No worker was free to answer within the time that a conversation may wait."""

    code = NO_WORKER_FREE


class AnsweringWorkerLost(Unavailable):
    """The worker that was answering is lost, or stops: ask again."""

    code = WORKER_LOST


class AnswerTimedOut(Unavailable):
    """The answer took longer than a worker may take for one: ask for fewer tokens."""

    code = "answer_timed_out"


class AnswerFailed(Unavailable):
    """The worker could not answer, through no fault of the request."""

    code = "answer_failed"


class QuestionRefused(Unprocessable):
    """The model cannot answer this conversation; the code says why."""

    code = "context_length_exceeded"


ANSWER_ERRORS: Final = (NoWorkerFree, AnsweringWorkerLost, AnswerTimedOut, AnswerFailed, QuestionRefused)
"""The errors that come of a request once it is queued."""
_FAULTS: Final[dict[str, type[ApiError]]] = {
    error.code: error for error in (NoWorkerFree, AnsweringWorkerLost, AnswerTimedOut)
}


def error_of(failure: ChatFailure) -> ApiError:
    """The error of a failed request, under its own code."""
    error_type = _FAULTS.get(failure.code, QuestionRefused if failure.fault == "user" else AnswerFailed)
    error = error_type(failure.message)
    error.code = failure.code
    return error


class ChatWatcher:
    """Reads requests, and ends those that are overdue: requests for the same row share a read."""

    def __init__(self, database: Database, *, poll_seconds: float, worker_seconds: float) -> None:
        self._database = database
        self._worker_seconds = worker_seconds
        self._poll_seconds = poll_seconds
        self._reads: SingleFlightCache[str, ChatSnapshot | None] = SingleFlightCache(self._read, lambda *_: False, 0)

    async def follow(self, chat_id: str, *, keep_alive_seconds: float) -> AsyncIterator[ChatSnapshot | None]:
        """The states of a request as they change, up to its end; null after so many seconds without a change.

        Raises:
            ChatRequestLost: the request was deleted.
            DatabaseUnavailable: the database is at fault.
        """
        latest: ChatSnapshot | None = None
        silence = 0.0
        while latest is None or not latest.ended:
            snapshot = await self._reads.get(chat_id)
            if snapshot is None:
                raise ChatRequestLost
            if snapshot != latest:
                latest, silence = snapshot, 0.0
                yield snapshot
            elif silence >= keep_alive_seconds:
                silence = 0.0
                yield None
            else:
                silence += self._poll_seconds
                await asyncio.sleep(self._poll_seconds)

    async def cancel(self, chat_id: str) -> None:
        """Cancel a request whose client is gone; one that has ended stays as it is."""
        # Where the database is away the deadlines of the request end it.
        with suppress(DatabaseUnavailable):
            async with transaction_slot():
                await run_sync(self._cancel, chat_id)

    def _cancel(self, chat_id: str) -> None:
        with self._database.transaction(write=True) as session:
            cancel(session, chat_id)

    def _read(self, chat_id: str) -> ChatSnapshot | None:
        with self._database.transaction(write=False) as session:
            snapshot = snapshots(session, [chat_id]).get(chat_id)
            is_overdue = snapshot is not None and snapshot.overdue
        if is_overdue:
            # No scheduler need run for a client to hear that nobody answers.
            with self._database.transaction(write=True) as session:
                expire(session, worker_seconds=self._worker_seconds, chat_ids=[chat_id])
                return snapshots(session, [chat_id]).get(chat_id)
        return snapshot


async def _get_chat_watcher(request: Request) -> ChatWatcher:
    watcher: ChatWatcher = request.app.state.chat_watcher
    return watcher


ChatWatcherDep = Annotated[ChatWatcher, Depends(_get_chat_watcher)]


@dataclass(frozen=True)
class PendingAnswer:
    """A request that was queued, and how its answer is to be sent."""

    id: str
    created: int
    model: str
    """What the response calls the model."""
    stream: bool
    include_usage: bool
    ignored: list[str]

    @classmethod
    def of(cls, row: ChatRequest, body: ChatCompletionRequest, *, model: str) -> "PendingAnswer":
        """The answer to a request whose row was made of a body."""
        return cls(row.id, seconds_since_1970(row.created_at), model, body.stream, body.include_usage, body.ignored)

    def completion(self, snapshot: ChatSnapshot) -> ChatCompletion:
        """The whole answer."""
        message = ChatAnswerMessage(content=snapshot.text)
        return ChatCompletion(
            id=self.id,
            created=self.created,
            model=self.model,
            choices=[ChatChoice(message=message, finish_reason=snapshot.finish_reason or "stop")],
            usage=ChatUsage.of(snapshot),
            warnings=list(snapshot.warnings),
            ignored=self.ignored,
        )


class ChatResponse(Response):
    """Sends the answer to a request once there is one. Before anything is sent it raises the error of a failed request,
    an :class:`~domain.errors.ApiError`, which is then answered as any other.
    """

    def __init__(self, watcher: ChatWatcher, answer: PendingAnswer, *, keep_alive_seconds: float) -> None:
        super().__init__()
        self._watcher = watcher
        self._answer = answer
        self._keep_alive_seconds = keep_alive_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        respond = self._stream if self._answer.stream else self._respond
        responder = asyncio.create_task(respond(str(scope.get("state", {}).get("request_id", "")), send))
        listener = asyncio.create_task(_disconnect(receive))
        try:
            await asyncio.wait([responder, listener], return_when=asyncio.FIRST_COMPLETED)
            if responder.done():
                responder.result()
        finally:
            listener.cancel()
            if not responder.done():
                responder.cancel()
                await asyncio.shield(self._watcher.cancel(self._answer.id))

    async def _respond(self, _request_id: str, send: Send) -> None:
        async for snapshot in self._watcher.follow(self._answer.id, keep_alive_seconds=self._keep_alive_seconds):
            if snapshot is not None and snapshot.ended:
                _raise_failure(snapshot)
                content = self._answer.completion(snapshot).model_dump_json().encode()
                await send(_start(b"application/json", length=len(content)))
                await send({"type": "http.response.body", "body": content})

    async def _stream(self, request_id: str, send: Send) -> None:
        stream = _ChunkStream(self._answer, send)
        try:
            async for snapshot in self._watcher.follow(self._answer.id, keep_alive_seconds=self._keep_alive_seconds):
                await stream.show(snapshot)
        except (ApiError, DatabaseUnavailable) as error:
            if not stream.is_started:
                raise
            await stream.fail(error if isinstance(error, ApiError) else Unavailable(), request_id)


class _ChunkStream:
    """One answer as server-sent events, from its first text on."""

    def __init__(self, answer: PendingAnswer, send: Send) -> None:
        self.is_started = False
        """Whether the head of the response was sent."""
        self._answer = answer
        self._send = send
        self._sent = ""

    async def show(self, snapshot: ChatSnapshot | None) -> None:
        """Send what is new; null is a sign of life.

        Raises:
            ApiError: the request failed.
        """
        if snapshot is None:
            await self._send_body(_KEEP_ALIVE if self.is_started else b"")
            return
        if snapshot.ended:
            _raise_failure(snapshot)
        if not (snapshot.ended or snapshot.text):
            return
        if not self.is_started:
            await self._send(_start(b"text/event-stream"))
            self.is_started = True
            await self._send_chunk(ChatChunkChoice(delta=ChatDelta(role="assistant", content="")))
        if snapshot.text.startswith(self._sent) and len(snapshot.text) > len(self._sent):
            delta = ChatDelta(content=snapshot.text[len(self._sent) :])
            self._sent = snapshot.text
            await self._send_chunk(ChatChunkChoice(delta=delta))
        if snapshot.ended:
            await self._finish(snapshot)

    async def fail(self, error: ApiError, request_id: str) -> None:
        """End the stream with an error, as clients of OpenAI's API read it."""
        content = {"message": error.detail, "type": "server_error", "param": None, "code": error.code}
        await self._send_body(b"data: %s\n\n" % orjson.dumps({"error": {**content, "request_id": request_id}}))
        await self._send({"type": "http.response.body", "body": b""})

    async def _finish(self, snapshot: ChatSnapshot) -> None:
        last = ChatChunkChoice(delta=ChatDelta(), finish_reason=snapshot.finish_reason or "stop")
        await self._send_chunk(last, warnings=list(snapshot.warnings), ignored=self._answer.ignored)
        if self._answer.include_usage:
            await self._send_chunk(usage=ChatUsage.of(snapshot))
        await self._send({"type": "http.response.body", "body": _DONE})

    async def _send_chunk(self, *choices: ChatChunkChoice, **fields: Any) -> None:
        answer = self._answer
        chunk = ChatCompletionChunk(
            id=answer.id, created=answer.created, model=answer.model, choices=list(choices), **fields
        )
        content = chunk.model_dump_json(exclude={name for name in _OPTIONAL_FIELDS if name not in fields})
        await self._send_body(b"data: %s\n\n" % content.encode())

    async def _send_body(self, content: bytes) -> None:
        if content:
            await self._send({"type": "http.response.body", "body": content, "more_body": True})


def _start(media_type: bytes, *, length: int | None = None) -> dict[str, Any]:
    """The head of a response. No proxy may store or buffer it."""
    headers = [(b"content-type", media_type), (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
    if length is not None:
        headers.append((b"content-length", str(length).encode()))
    return {"type": "http.response.start", "status": 200, "headers": headers}


def _raise_failure(snapshot: ChatSnapshot) -> None:
    """
    Raises:
        ApiError: the request failed, or was cancelled from elsewhere.
    """
    if snapshot.failure is not None:
        raise error_of(snapshot.failure)
    if snapshot.status is ChatStatus.CANCELLED:
        raise ChatRequestLost


async def _disconnect(receive: Receive) -> None:
    """Wait until the client is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
