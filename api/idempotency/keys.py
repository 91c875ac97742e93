"""The claim of one request on its `Idempotency-Key`, and the replay of a stored response to a duplicate."""

from typing import Final, NoReturn
from uuid import uuid4

from fastapi import FastAPI, Request, Response
from sqlalchemy import Connection

from api.problems import HttpError
from domain.db import Database
from domain.errors import Conflict, Unprocessable
from domain.idempotency import repository
from domain.idempotency.models import MAX_BODY_BYTES
from domain.idempotency.repository import KeyHolder, StoredKey, StoredResponse

REPLAYED_HEADER: Final = "Idempotent-Replayed"
HOLD_SECONDS: Final = 60.0
"""How long a key stays taken once the process that held it has died."""
_RETRY_SECONDS: Final = 5


class KeyReused(Unprocessable):
    """This Idempotency-Key came with another request within the last day: make a new key for a new request."""

    code = "idempotency_key_reused"


class KeyInProgress(Conflict, HttpError):
    """The first request with this Idempotency-Key is still in progress: send this one again for its response."""

    code = "idempotency_in_progress"
    retryable = True

    def __init__(self) -> None:
        super().__init__(headers={"Retry-After": str(_RETRY_SECONDS)})


class ResponseTooLarge(Unprocessable):
    """The response is too large to be stored, so nothing was done: send the request without Idempotency-Key."""

    code = "idempotency_answer_too_large"


KEY_ERRORS: Final = (KeyReused, KeyInProgress, ResponseTooLarge)
"""What a route that takes a key may raise besides its own errors."""


class Replay(Exception):
    """The request is a duplicate: its response is the stored one."""

    def __init__(self, response: StoredResponse) -> None:
        super().__init__("duplicate of a request that was answered")
        self.response = response


class KeyClaim:
    """The claim of one request on its key.

    Args:
        seconds: how long the response is replayed.
    """

    def __init__(
        self, database: Database, project: str, key: str, *, seconds: float = repository.RESPONSE_TTL_SECONDS
    ) -> None:
        self._database = database
        self._seconds = seconds
        self._holder = KeyHolder(project, key, uuid4().hex)
        self._stored: StoredKey | None = None
        """What :meth:`hold` found instead of a free key."""
        self._held = False

    def check_duplicate(self, fingerprint: str) -> None:
        """Recognise a duplicate before any work is done; raises as :meth:`take` does."""
        with self._database.transaction(write=False) as session:
            stored = repository.find(session.connection(), self._holder)
        if stored is not None:
            _raise_for_duplicate(stored, fingerprint)

    def forget(self) -> None:
        """Drop the response that is stored under the key, if any: what comes now is a new request."""
        with self._database.transaction(write=True) as session:
            repository.forget(session.connection(), self._holder)

    def take(self, connection: Connection, fingerprint: str) -> None:
        """Claim the key by the first statement of the transaction that does the work.

        A duplicate waits here until the transaction of the first request has ended.

        Raises:
            KeyInProgress: another request holds the key.
            KeyReused: the key belongs to another request.
            Replay: the request was answered already.
        """
        if self._held and repository.extend(connection, self._holder, seconds=HOLD_SECONDS):
            return
        stored = repository.claim(connection, self._holder, fingerprint=fingerprint, seconds=HOLD_SECONDS)
        if stored is not None:
            _raise_for_duplicate(stored, fingerprint)

    def settle(self, connection: Connection, fingerprint: str, response: StoredResponse) -> None:
        """Store the response by the last statement of that transaction.

        Raises:
            KeyInProgress: the key expired, and another request has it.
        """
        settled = repository.settle(
            connection, self._holder, fingerprint=fingerprint, response=response, seconds=self._seconds
        )
        if not settled:
            raise KeyInProgress

    def hold(self) -> None:
        """Claim the key in a transaction of its own, before the body of the request is known.

        Raises:
            KeyInProgress: another request holds the key.
        """
        with self._database.transaction(write=True) as session:
            self._stored = repository.claim(session.connection(), self._holder, fingerprint=None, seconds=HOLD_SECONDS)
        if self._stored is not None and self._stored.response is None:
            raise KeyInProgress
        self._held = self._stored is None

    def compare(self, fingerprint: str) -> None:
        """Once the body is known: replay the response that :meth:`hold` found, if it belongs to the same request."""
        if self._stored is not None:
            _raise_for_duplicate(self._stored, fingerprint)

    def extend(self) -> None:
        """Prolong the hold on the key."""
        with self._database.transaction(write=True) as session:
            repository.extend(session.connection(), self._holder, seconds=HOLD_SECONDS)

    def release(self) -> None:
        """Free the key, where it is still held."""
        if self._held:
            with self._database.transaction(write=True) as session:
                repository.release(session.connection(), self._holder)


def render_stored(response: StoredResponse, *, replayed: bool = False) -> Response:
    """The HTTP response that is stored under a key, or that was."""
    headers = {"content-type": response.media_type}
    if response.location is not None:
        headers["location"] = response.location
    if replayed:
        headers[REPLAYED_HEADER] = "true"
    return Response(response.body, status_code=response.status, headers=headers)


def check_size(body: bytes) -> None:
    """
    Raises:
        ResponseTooLarge: the body cannot be stored under a key.
    """
    if len(body) > MAX_BODY_BYTES:
        raise ResponseTooLarge


def install_replay_handler(app: FastAPI) -> None:
    """Answer a duplicate with the stored response."""
    app.add_exception_handler(Replay, _handle_replay)


def _handle_replay(_request: Request, error: Exception) -> Response:
    assert isinstance(error, Replay)
    return render_stored(error.response, replayed=True)


def _raise_for_duplicate(stored: StoredKey, fingerprint: str) -> NoReturn:
    if stored.fingerprint is not None and stored.fingerprint != fingerprint:
        raise KeyReused
    if stored.response is None:
        raise KeyInProgress
    raise Replay(stored.response)
