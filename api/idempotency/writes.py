"""`Idempotency-Key`: a POST that may be sent again, and does its work once.

A route takes an `IdempotentWriteDep`, plans outside of any write transaction, and then writes in one:

    with write.transaction() as session:
        job = create_job(session, ...)
        return write.respond(present_job(session, job), status=201)

The key is claimed by the first statement of that transaction and the response is stored by the last one, so a crash
leaves either both, the work and its response, or nothing. Duplicates wait at the claim. Responses of 400 and above are
not stored: nothing was done, and the request may be sent again.

An upload holds its key from before the body on, in a transaction of its own (`HeldKey`): it may take an hour, and no
duplicate should send as much only to wait.
"""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Annotated, Any, Final

import anyio
import structlog
from anyio.to_thread import run_sync
from fastapi import Depends, Header, Request, Response
from pydantic import BaseModel
from sqlalchemy.orm import Session

from api.auth import Caller
from api.dependencies import DatabaseDep
from api.idempotency import keys
from api.idempotency.keys import REPLAYED_HEADER, KeyClaim, check_size, render_stored
from api.prefix import path_below_prefix
from api.sessions import PlanningSlot, TransactionSlot, transaction_slot
from api.strict_json import body_of
from domain.database_errors import DatabaseUnavailable
from domain.db import Database
from domain.errors import Unprocessable
from domain.idempotency.repository import StoredResponse
from pocl.errors import FieldError

KEY_HEADER: Final = "Idempotency-Key"

_log = structlog.get_logger(__name__)

Key = Annotated[
    str | None,
    Header(
        alias=KEY_HEADER,
        min_length=1,
        max_length=255,
        pattern=r"^[ -~]+$",
        description=(
            "Any text of the client's own, for instance a UUID. For a day the same request with the same key gets the"
            f" response that it got the first time, with `{REPLAYED_HEADER}: true`, and does nothing again."
        ),
    ),
]


def replayable_response(status: int, *, location: bool = False) -> dict[int | str, dict[str, Any]]:
    """The headers of a response that may be replayed, for the `responses` of its operation."""
    text = {"schema": {"type": "string"}}
    headers = {REPLAYED_HEADER: {**text, "description": "`true`: this is the stored response; nothing was done now."}}
    if location:
        headers["Location"] = {**text, "description": "The address of the new resource."}
    return {status: {"headers": headers}}


class IdempotentWrite:
    """The one write transaction of a request, done once for each key.

    Args:
        claim: null for a request without a key, which is never replayed.
        fingerprint: of the request, by which a duplicate is told from another request under the same key.
    """

    def __init__(self, database: Database, claim: KeyClaim | None = None, fingerprint: str = "") -> None:
        self._database = database
        self._claim = claim
        self._fingerprint = fingerprint
        self._response: StoredResponse | None = None

    @property
    def is_keyed(self) -> bool:
        """Whether the request has a key, so that its response is stored by the transaction that does its work."""
        return self._claim is not None

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        """Claim the key, do the work of the block, store the response that :meth:`respond` rendered, and commit.

        Raises:
            KeyInProgress, KeyReused, Replay: the request is a duplicate, or its key is taken.
        """
        with self._database.transaction(write=True) as session:
            if self._claim is not None:
                self._claim.take(session.connection(), self._fingerprint)
            yield session
            if self._claim is not None:
                assert self._response is not None, "the block of a write renders its response"
                self._claim.settle(session.connection(), self._fingerprint, self._response)

    def respond(self, content: BaseModel, *, status: int, location: str | None = None) -> Response:
        """Render the response of the request, for the route to return.

        Raises:
            ResponseTooLarge: the response cannot be stored under the key.
        """
        body = content.model_dump_json().encode()
        if self._claim is not None:
            check_size(body)
        self._response = StoredResponse(status, "application/json", location, body)
        return render_stored(self._response)


def fingerprint_request(request: Request, *content: bytes) -> str:
    """SHA-256, hexadecimal, of a request: its method, its address, and the content as the route reads it."""
    address = [request.method, path_below_prefix(request.scope), request.scope["query_string"].decode("latin-1")]
    digests = [hashlib.sha256(piece).hexdigest() for piece in content]
    return hashlib.sha256(json.dumps([address, digests]).encode()).hexdigest()


async def _claim_key(request: Request, caller: Caller, database: DatabaseDep, key: Key = None) -> KeyClaim | None:
    if key is None:
        return None
    if len(request.headers.getlist(KEY_HEADER)) > 1:
        raise Unprocessable(field_errors=[FieldError(f"/header/{KEY_HEADER}", "ambiguous", "Send one key.")])
    return KeyClaim(database, caller.project, key)


OptionalClaim = Annotated[KeyClaim | None, Depends(_claim_key, scope="function")]


async def _prepare_write(
    request: Request, database: DatabaseDep, _slot: TransactionSlot, claim: OptionalClaim
) -> IdempotentWrite:
    return await _prepare(request, database, claim)


async def _prepare_planned_write(
    request: Request, database: DatabaseDep, _slot: PlanningSlot, claim: OptionalClaim
) -> IdempotentWrite:
    return await _prepare(request, database, claim)


async def _prepare(request: Request, database: Database, claim: KeyClaim | None) -> IdempotentWrite:
    if claim is None:
        return IdempotentWrite(database)
    fingerprint = fingerprint_request(request, body_of(request))
    await run_sync(claim.check_duplicate, fingerprint)
    return IdempotentWrite(database, claim, fingerprint)


IdempotentWriteDep = Annotated[IdempotentWrite, Depends(_prepare_write, scope="function")]
"""For a route with a JSON body, or with none."""
PlannedWriteDep = Annotated[IdempotentWrite, Depends(_prepare_planned_write, scope="function")]
"""The same for a route that looks at models or samples before it writes."""


async def _hold_key(claim: OptionalClaim) -> AsyncIterator[KeyClaim | None]:
    if claim is None:
        yield None
        return
    try:
        async with transaction_slot():
            await run_sync(claim.hold)
        async with _heartbeat(claim):
            yield claim
    except BaseException:
        # Where the database is unavailable the key expires by itself.
        with anyio.CancelScope(shield=True), suppress(DatabaseUnavailable):
            async with transaction_slot():
                await run_sync(claim.release)
        raise


HeldKey = Annotated[KeyClaim | None, Depends(_hold_key, scope="function")]
"""For a route with a long body: the key is held before the body is read."""


@asynccontextmanager
async def _heartbeat(claim: KeyClaim) -> AsyncIterator[None]:
    task = asyncio.create_task(_extend_periodically(claim))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})


async def _extend_periodically(claim: KeyClaim) -> None:
    while True:
        await anyio.sleep(keys.HOLD_SECONDS / 3)
        try:
            async with transaction_slot():
                await run_sync(claim.extend)
        except DatabaseUnavailable as error:
            _log.warning("idempotency_key_not_extended", exc_info=error)
