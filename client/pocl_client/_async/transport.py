"""One request and its retries: the only place that talks HTTP."""

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final
from uuid import uuid4

import httpx2

from pocl_client._async.concurrency import AsyncClock
from pocl_client.credentials import Credentials, loopback_host
from pocl_client.errors import ClientError, ResponseInvalid, ServerFault, ServiceUnreachable
from pocl_client.responses import Response
from pocl_client.retries import IN_PROGRESS, RETRIED_STATUSES, RetryPolicy

_MAX_BODY_BYTES: Final = 64 * 2**20
"""A larger body of JSON is refused: what is large comes as a file."""
_CONNECT_SECONDS: Final = 10.0
_MAX_CONNECTIONS: Final = 32
KEY_HEADER: Final = "Idempotency-Key"


class AsyncTransport:
    """Sends requests, each as often as the retry policy allows, and reads their responses.

    A POST carries a key that all its tries share, so that the service does its work once. What must not be sent twice,
    and may not carry such a key, is sent again only where the service has not seen it.

    Args:
        transport: what carries requests, for tests; by default connections of the network.
        timeout: the longest wait for the next bytes in either direction, in seconds.

    Raises:
        ClientError: the proxies that the environment names cannot be used.
    """

    def __init__(
        self,
        credentials: Credentials,
        *,
        retries: RetryPolicy,
        timeout: float,
        transport: httpx2.AsyncBaseTransport | None = None,
        clock: AsyncClock | None = None,
    ) -> None:
        headers = {"User-Agent": f"pocl-client/{_own_version()}"}
        if credentials.key is not None:
            # Where a response leads to another host, as to a bucket, httpx2 takes this header away.
            headers["Authorization"] = f"Bearer {credentials.key}"
        own_host = loopback_host(credentials.url)
        self.url = credentials.url
        self.clock = clock or AsyncClock()
        self.retries = retries
        self._timeout = timeout
        try:
            self._http = httpx2.AsyncClient(
                base_url=credentials.url,
                headers=headers,
                transport=transport,
                # No proxy has a way to the loopback of this machine.
                mounts={} if own_host is None else {f"all://{own_host}": None},
                limits=httpx2.Limits(max_connections=_MAX_CONNECTIONS),
            )
        except (ImportError, ValueError, httpx2.InvalidURL):
            # The errors may repeat an address, with its password.
            raise ClientError(
                "The proxies of the environment cannot be used: HTTPS_PROXY, HTTP_PROXY and ALL_PROXY take addresses"
                " with http:// and https://, and those with socks5:// where the package socksio is installed"
                " (pip install 'httpx2[socks]')."
            ) from None

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def send(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, Any] | None = None,
        json: Any = None,
        content: Callable[[], AsyncIterator[bytes]] | None = None,
        headers: Mapping[str, str] | None = None,
        idempotency_key: str | None = None,
        keyed: bool = True,
        read_timeout: float | None = None,
    ) -> Response:
        """Send a request, and read its response whole.

        Args:
            path: below the address of the service.
            params: of the query; null ones are left out, and lists are repeated.
            json: the body as JSON.
            content: makes the body, anew for each try.
            idempotency_key: of a POST; a random one unless given.
            keyed: whether a POST may carry one.
            read_timeout: the longest wait for the next bytes, where it is not that of the client.

        Raises:
            ApiError: the service answered with a problem.
            ServiceUnreachable: no response came.
            ResponseInvalid: the response is not one of the service.
        """
        fields = dict(headers or {})
        if method == "POST" and keyed:
            fields[KEY_HEADER] = idempotency_key or uuid4().hex
        is_safe = method != "POST" or keyed

        async def attempt() -> Response:
            request = self._http.build_request(
                method,
                path,
                params=_query(params),
                json=json,
                content=None if content is None else content(),
                headers=fields,
                timeout=self._timeouts(read_timeout),
            )
            response = await self._http.send(request, stream=True, follow_redirects=method == "GET")
            try:
                return await _read_whole(response)
            finally:
                await response.aclose()

        tries = 0
        while True:
            tries += 1
            try:
                response = await attempt()
            except httpx2.RequestError as error:
                await self._wait_after(tries, _unreachable(self.url, error), may_repeat=is_safe or _was_not_sent(error))
                continue
            if response.status < 400:
                # A GET has been led to where the resource is; nothing that is written is.
                if 300 <= response.status < 400 and response.status != 304 and method != "HEAD":
                    raise _redirected(response.headers.get("location"))
                return response
            if method == "DELETE" and tries > 1 and response.status in (404, 410):
                # An earlier try has done it, and its response was lost.
                return response
            problem = response.error()
            is_retried = response.status in RETRIED_STATUSES or problem.code == IN_PROGRESS
            # A request beyond the rate limit has not been looked at.
            await self._wait_after(
                tries,
                problem,
                may_repeat=is_retried and (is_safe or response.status == 429),
                retry_after=problem.retry_after,
            )

    @asynccontextmanager
    async def stream(
        self,
        path: str,
        *,
        method: str = "GET",
        params: Mapping[str, Any] | None = None,
        json: Any = None,
        headers: Mapping[str, str] | None = None,
        read_timeout: float | None = None,
    ) -> AsyncIterator[httpx2.Response]:
        """A response whose body the caller reads as it comes; its beginning is tried as often as the retry policy
        allows. A POST is tried again only where the service has not looked at it, and is led nowhere else.

        Raises:
            ApiError: the service answered with a problem.
            ServiceUnreachable: no response came, or it broke off.
        """
        tries = 0
        while True:
            tries += 1
            is_read = method == "GET"
            request = self._http.build_request(
                method, path, params=_query(params), json=json, headers=headers, timeout=self._timeouts(read_timeout)
            )
            try:
                response = await self._http.send(request, stream=True, follow_redirects=is_read)
            except httpx2.RequestError as error:
                await self._wait_after(tries, _unreachable(self.url, error), may_repeat=is_read or _was_not_sent(error))
                continue
            try:
                if response.is_redirect:
                    raise _redirected(response.headers.get("location"))
                if response.status_code < 400:
                    try:
                        yield response
                    except httpx2.RequestError as error:
                        raise _unreachable(self.url, error) from None
                    return
                problem = (await _read_whole(response)).error()
            except httpx2.RequestError as error:
                raise _unreachable(self.url, error) from None
            finally:
                await response.aclose()
            may_repeat = problem.status in RETRIED_STATUSES and (is_read or problem.status == 429)
            await self._wait_after(tries, problem, may_repeat=may_repeat, retry_after=problem.retry_after)

    async def _wait_after(
        self, tries: int, error: ClientError, *, may_repeat: bool, retry_after: float | None = None
    ) -> None:
        """Wait before the next try.

        Raises:
            ClientError: there is none, and this is why.
        """
        wait = self.retries.wait_after(tries, retry_after) if may_repeat else None
        if wait is None:
            raise error
        await self.clock.sleep(wait)

    def _timeouts(self, read_timeout: float | None) -> httpx2.Timeout:
        return httpx2.Timeout(
            self._timeout, connect=min(_CONNECT_SECONDS, self._timeout), read=read_timeout or self._timeout
        )


class Outage:
    """How long a service may be away while a client waits for what it says next.

    Args:
        limit: in seconds; the time counts from the first failure after a success.
    """

    def __init__(self, clock: AsyncClock, limit: float) -> None:
        self._clock = clock
        self._limit = limit
        self._since: float | None = None

    def end(self) -> None:
        """Note that the service has answered."""
        self._since = None

    def failed(self, error: ClientError) -> None:
        """Note a failure.

        Raises:
            ClientError: it is no failure that passes, or has lasted for too long.
        """
        if not isinstance(error, ServiceUnreachable) and not (
            isinstance(error, ServerFault) and error.status in RETRIED_STATUSES
        ):
            raise error
        now = self._clock.monotonic()
        self._since = now if self._since is None else self._since
        if now - self._since >= self._limit:
            raise error


async def _read_whole(response: httpx2.Response) -> Response:
    pieces, size = [], 0
    async for piece in response.aiter_bytes():
        pieces.append(piece)
        size += len(piece)
        if size > _MAX_BODY_BYTES:
            raise ResponseInvalid(f"The response has more than {_MAX_BODY_BYTES} bytes, and no resource is as large.")
    return Response(response.status_code, dict(response.headers), b"".join(pieces))


def _query(params: Mapping[str, Any] | None) -> dict[str, Any]:
    return {name: value for name, value in (params or {}).items() if value is not None}


def _was_not_sent(error: httpx2.RequestError) -> bool:
    return isinstance(error, (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout))


def _unreachable(url: str, error: httpx2.RequestError) -> ServiceUnreachable:
    what = "took too long" if isinstance(error, httpx2.TimeoutException) else "failed"
    return ServiceUnreachable(f"The connection to {url} {what} ({type(error).__name__}: {error}).")


def _redirected(location: str | None) -> ResponseInvalid:
    return ResponseInvalid(
        f"The service is elsewhere, at {location}: name that address as POCL_URL, or ask who runs it."
    )


def _own_version() -> str:
    try:
        return version("pocl-client")
    except PackageNotFoundError:
        return "0"
