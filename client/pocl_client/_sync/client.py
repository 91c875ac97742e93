"""The client: one service, one key."""

from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, Final, Self, TypeVar

import httpx2
from pydantic import BaseModel

from pocl_client._sync.checkpoints import Checkpoints
from pocl_client._sync.concurrency import Clock
from pocl_client._sync.datasets import Datasets
from pocl_client._sync.jobs import Jobs
from pocl_client._sync.pages import iterate
from pocl_client._sync.transport import Transport
from pocl_client.credentials import find_credentials
from pocl_client.models import (
    Method,
    Model,
    Preset,
    PresetList,
    QueuedJob,
    Quota,
    Usage,
    Version,
    Worker,
)
from pocl_client.models import MethodList as _MethodList
from pocl_client.responses import given, segment
from pocl_client.retries import RetryPolicy

M = TypeVar("M", bound=BaseModel)
_TIMEOUT_SECONDS: Final = 60.0


class Client:
    """A client of one service.

    Args:
        url: the address of the service; `POCL_URL`, else that of the last `pocl login`, else `http://127.0.0.1:8000`.
        key: the API key; `POCL_API_KEY`, else the content of the file `POCL_API_KEY_FILE`, else that of `pocl login`.
        retries: when a request is sent again.
        timeout: the longest wait for the next bytes, in seconds.
        transport: what carries requests, in place of the network: for tests.
        clock: what waits use: for tests.

    Attributes:
        jobs, datasets, checkpoints: what may be done with them.

    Raises:
        CredentialsInvalid: an address or a key that was found cannot be used.
    """

    def __init__(
        self,
        url: str | None = None,
        key: str | None = None,
        *,
        retries: RetryPolicy | None = None,
        timeout: float = _TIMEOUT_SECONDS,
        transport: httpx2.BaseTransport | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._transport = Transport(
            find_credentials(url, key),
            retries=retries or RetryPolicy(),
            timeout=timeout,
            transport=transport,
            clock=clock,
        )
        self.jobs = Jobs(self._transport)
        self.datasets = Datasets(self._transport)
        self.checkpoints = Checkpoints(self._transport)

    @property
    def url(self) -> str:
        """The address of the service."""
        return self._transport.url

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._transport.close()

    def models(self, *, limit: int | None = None) -> Iterator[Model]:
        """The models below the model roots of the service, as specifications name them."""
        return iterate(self._transport, "/v1/models", Model, limit=limit)

    def model(self, model_id: str) -> Model:
        """One of them."""
        return (self._transport.send("GET", f"/v1/models/{segment(model_id)}")).model(Model)

    def presets(self) -> list[Preset]:
        """The presets, with the defaults that each has."""
        return (self._transport.send("GET", "/v1/presets")).model(PresetList).data

    def methods(self) -> list[Method]:
        """The methods, with their parameters."""
        return (self._transport.send("GET", "/v1/methods")).model(_MethodList).data

    def queue(self, *, limit: int | None = None) -> Iterator[QueuedJob]:
        """The waiting jobs of the project, in the order in which workers take them."""
        return iterate(self._transport, "/v1/queue", QueuedJob, limit=limit)

    def workers(self, *, limit: int | None = None) -> Iterator[Worker]:
        """The workers and what they do."""
        return iterate(self._transport, "/v1/workers", Worker, limit=limit)

    def usage(self, *, since: str | None = None, until: str | None = None) -> Usage:
        """The device time and the storage of the project, by day; both ends as `2026-11-24`."""
        return (self._transport.send("GET", "/v1/usage", params=given(since=since, until=until))).model(Usage)

    def quota(self) -> Quota:
        """What the project may have, and has."""
        return (self._transport.send("GET", "/v1/quota")).model(Quota)

    def version(self) -> Version:
        """The version of the service. This needs no key."""
        return (self._transport.send("GET", "/version")).model(Version)

    def request(
        self,
        method: str,
        path: str,
        kind: type[M],
        *,
        json: Any = None,
        params: Mapping[str, Any] | None = None,
        idempotency_key: str | None = None,
    ) -> M:
        """Any other operation of the API, with the same retries and errors.

            webhook = client.request("POST", "/v1/webhooks", models.WebhookWithSecret, json={"url": "https://..."})

        Args:
            path: with `/v1`.
            kind: what the response is.
            json: the body.
        """
        # Secrets are not kept for a second answer: below /v1/keys no request may be sent twice.
        keyed = not path.startswith("/v1/keys")
        response = self._transport.send(
            method, path, json=json, params=params, idempotency_key=idempotency_key, keyed=keyed
        )
        return response.model(kind)

    def items(
        self, path: str, kind: type[M], *, params: Mapping[str, Any] | None = None, limit: int | None = None
    ) -> Iterator[M]:
        """All items of any other list of the API.

        Args:
            path: with `/v1`, for instance `/v1/keys`.
            kind: what an item is.
            limit: how many at most; null for all.
        """
        return iterate(self._transport, path, kind, params, limit=limit)
