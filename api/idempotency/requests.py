"""`Idempotency-Key`: a POST that may be sent again, and does its work once.

A route takes part by a parameter `_once: IdempotentRequest` and the router by `route_class=IdempotentRoute`. The key is
claimed by the first statement of the route's transaction and the answer is kept by the last one, so a crash leaves
either both, what was made and its answer, or nothing. Duplicates wait at the claim. Answers of 400 and above are not
kept: nothing was done, and the request may be sent again.

An upload holds its key from before the body on, in a transaction of its own (`HeldKey`): it may take an hour, and no
duplicate should send as much only to wait.
"""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Annotated, Any, Final, NoReturn
from uuid import uuid4

import anyio
import structlog
from anyio.to_thread import run_sync
from fastapi import Depends, FastAPI, Header, Request, Response
from sqlalchemy import Connection, event
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from api.auth import Caller, Principal
from api.problems import HttpError
from api.sessions import WriteSession, transaction_slot
from api.strict_json import StrictJsonRoute, body_of
from domain.db import Database
from domain.errors import Conflict, Unprocessable
from domain.idempotency import repository
from domain.idempotency.models import MAX_BODY_BYTES
from domain.idempotency.repository import KeyHolder, StoredKey, StoredResponse
from pocl.errors import FieldError

HEADER: Final = "Idempotency-Key"
REPLAYED_HEADER: Final = "Idempotent-Replayed"
_UPLOAD_SECONDS: Final = 60.0
"""How long the key of an upload stays taken once its process has died."""
_RETRY_SECONDS: Final = 5

_log = structlog.get_logger(__name__)

Key = Annotated[
    str | None,
    Header(
        alias=HEADER,
        min_length=1,
        max_length=255,
        pattern=r"^[ -~]+$",
        description=(
            "Any text of your own, for instance a UUID. The same request with the same key is answered for a day as it"
            f" was the first time, with `{REPLAYED_HEADER}: true`, and does nothing again."
        ),
    ),
]


class KeyReused(Unprocessable):
    """This Idempotency-Key came with another request within the last day: make a new key for a new request."""

    code = "idempotency_key_reused"


class KeyInProgress(Conflict, HttpError):
    """The first request with this Idempotency-Key is still at work: ask again for its answer."""

    code = "idempotency_in_progress"
    retryable = True

    def __init__(self) -> None:
        super().__init__(headers={"Retry-After": str(_RETRY_SECONDS)})


class ResponseTooLarge(Unprocessable):
    """The answer is too large to be kept, so nothing was done: send the request without Idempotency-Key."""

    code = "idempotency_answer_too_large"


KEY_ERRORS: Final = (KeyReused, KeyInProgress, ResponseTooLarge)
"""What a route with a key may answer besides its own refusals."""


def replayable_response(status: int, *, location: bool = False) -> dict[int | str, dict[str, Any]]:
    """The headers of an answer that may be shown again, for the `responses` of its operation."""
    text = {"schema": {"type": "string"}}
    headers = {REPLAYED_HEADER: {**text, "description": "`true`: this was answered before, and nothing was done now."}}
    if location:
        headers["Location"] = {**text, "description": "The address of what was made."}
    return {status: {"headers": headers}}


class _Replay(Exception):
    """The request was answered before."""

    def __init__(self, answer: StoredResponse) -> None:
        super().__init__("answered before")
        self.answer = answer


class IdempotentRoute(StrictJsonRoute):
    """Shows the answer as it was rendered to :data:`IdempotentRequest`, which ends after this and before the commit."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_and_show(request: Request) -> Response:
            response = await handle(request)
            request.state.rendered = response
            return response

        return handle_and_show


class KeyClaim:
    """One request with a key."""

    def __init__(self, database: Database, project: str, key: str) -> None:
        self._database = database
        self._holder = KeyHolder(project, key, uuid4().hex)
        self._found: StoredKey | None = None
        self._held = False

    def look(self, fingerprint: str) -> None:
        """Answer a duplicate before anything is done for it; raises as :meth:`kept` does."""
        with self._database.transaction(write=False) as session:
            found = repository.find(session.connection(), self._holder)
        if found is not None:
            _raise_for_duplicate(found, fingerprint)

    def hold(self) -> None:
        """Take the key in a transaction of its own, although it is not known yet what will be asked for.

        Raises:
            KeyInProgress: another request holds it.
        """
        with self._database.transaction(write=True) as session:
            self._found = repository.claim(
                session.connection(), self._holder, fingerprint=None, seconds=_UPLOAD_SECONDS
            )
        if self._found is not None and self._found.answer is None:
            raise KeyInProgress
        self._held = self._found is None

    def compare(self, fingerprint: str) -> None:
        """What :meth:`hold` had to leave open: whether the answer that it met is that of the same request."""
        if self._found is not None:
            _raise_for_duplicate(self._found, fingerprint)

    def extend(self) -> None:
        """Go on holding the key."""
        with self._database.transaction(write=True) as session:
            repository.extend(session.connection(), self._holder, seconds=_UPLOAD_SECONDS)

    def release(self) -> None:
        """Free the key, where it is still held."""
        if self._held:
            with self._database.transaction(write=True) as session:
                repository.release(session.connection(), self._holder)

    @contextmanager
    def kept(self, session: Session, request: Request, fingerprint: str) -> Iterator[None]:
        """Claim the key when the transaction of `session` begins, and keep the answer before it ends.

        Raises:
            KeyInProgress, KeyReused: and an exception that is answered by what was answered before.
        """

        def claim(_session: Session, _transaction: object, connection: Connection) -> None:
            if self._held and repository.extend(connection, self._holder, seconds=_UPLOAD_SECONDS):
                return
            found = repository.claim(connection, self._holder, fingerprint=fingerprint, seconds=_UPLOAD_SECONDS)
            if found is not None:
                _raise_for_duplicate(found, fingerprint)

        event.listen(session, "after_begin", claim, once=True)
        yield
        answer = _answer(request.state.rendered)
        if not repository.settle(session.connection(), self._holder, fingerprint=fingerprint, answer=answer):
            raise KeyInProgress


def fingerprint(request: Request, *content: bytes) -> str:
    """SHA-256, hexadecimal, of what is asked for: method, address, and the content as the route reads it."""
    address = [request.method, request.scope["path"], request.scope["query_string"].decode("latin-1")]
    digests = [hashlib.sha256(piece).hexdigest() for piece in content]
    return hashlib.sha256(json.dumps([address, digests]).encode()).hexdigest()


def install(app: FastAPI) -> None:
    """Answer a duplicate as the first request was."""
    app.add_exception_handler(_Replay, _replay_response)


def _once(request: Request, caller: Caller, session: WriteSession, key: Key = None) -> Iterator[None]:
    if key is None:
        yield
        return
    ticket = _ticket(request, caller, key)
    asked = fingerprint(request, body_of(request))
    ticket.look(asked)
    with ticket.kept(session, request, asked):
        yield


async def _held(request: Request, caller: Caller, key: Key = None) -> AsyncIterator[KeyClaim | None]:
    if key is None:
        yield None
        return
    ticket = _ticket(request, caller, key)
    try:
        async with transaction_slot():
            await run_sync(ticket.hold)
        async with _heartbeat(ticket):
            yield ticket
    except BaseException:
        # Where the database is away the key becomes free by itself.
        with anyio.CancelScope(shield=True), suppress(DBAPIError):
            async with transaction_slot():
                await run_sync(ticket.release)
        raise


IdempotentRequest = Annotated[None, Depends(_once, scope="function")]
"""For a route with a `WriteSession` session: done once for each key."""
HeldKey = Annotated[KeyClaim | None, Depends(_held, scope="function")]
"""For a route with a long body: the key is taken before it is read."""


def _ticket(request: Request, caller: Principal, key: str) -> KeyClaim:
    if len(request.headers.getlist(HEADER)) > 1:
        raise Unprocessable(field_errors=[FieldError(f"/header/{HEADER}", "ambiguous", "Send one key.")])
    return KeyClaim(request.app.state.database, caller.project, key)


@asynccontextmanager
async def _heartbeat(ticket: KeyClaim) -> AsyncIterator[None]:
    beat = asyncio.create_task(_extend_periodically(ticket))
    try:
        yield
    finally:
        beat.cancel()
        await asyncio.wait({beat})


async def _extend_periodically(ticket: KeyClaim) -> None:
    while True:
        await anyio.sleep(_UPLOAD_SECONDS / 3)
        try:
            async with transaction_slot():
                await run_sync(ticket.extend)
        except DBAPIError as error:
            _log.warning("idempotency_key_not_extended", exc_info=error)


def _raise_for_duplicate(found: StoredKey, asked: str) -> NoReturn:
    if found.fingerprint is not None and found.fingerprint != asked:
        raise KeyReused
    if found.answer is None:
        raise KeyInProgress
    raise _Replay(found.answer)


def _answer(rendered: Response) -> StoredResponse:
    body = bytes(rendered.body)
    if len(body) > MAX_BODY_BYTES:
        raise ResponseTooLarge
    headers = rendered.headers
    return StoredResponse(rendered.status_code, headers["content-type"], headers.get("location"), body)


def _replay_response(_request: Request, error: Exception) -> Response:
    assert isinstance(error, _Replay)
    answer = error.answer
    headers = {"content-type": answer.media_type, REPLAYED_HEADER: "true"}
    if answer.location is not None:
        headers["location"] = answer.location
    return Response(answer.body, status_code=answer.status, headers=headers)
