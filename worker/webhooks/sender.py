"""Sends one message of a webhook once.

One connection for each message, to an address that was checked; no redirect is followed, no cookie kept, and of the
response no more is read than its first kibibytes. Neither URL nor secret nor body is ever logged.
"""

import ssl
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from http import HTTPStatus
from typing import Any, Final
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

import httpcore2

from domain.webhooks.addresses import WebhookTarget, WebhookUrlInvalid, parse_url
from domain.webhooks.deliveries import AttemptResult, DueMessage
from domain.webhooks.signing import sign
from worker.retry_after import parse_retry_after
from worker.webhooks.network import CannotSend, CheckedBackend, Deadline, Resolver, checked_addresses, resolve

_MAX_RESPONSE_BYTES: Final = 16 * 1024
_CONNECT_SECONDS: Final = 5.0
_READ_SECONDS: Final = 10.0


def environment_proxy(host: str) -> str | None:
    """The proxy that the environment names for a host (`HTTPS_PROXY`, `NO_PROXY`); null for none."""
    return None if proxy_bypass(host) else getproxies().get("https")


def _utc_now() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True)
class WebhookSender:
    """Sends messages. Safe to share between threads."""

    internal_hosts: Collection[str]
    """Hosts that may be reached by `http` and at private addresses, without a proxy."""
    user_agent: str
    seconds: float = 15
    """The time of an attempt in all."""
    resolver: Resolver = resolve
    proxy_of: Callable[[str], str | None] = environment_proxy
    now: Callable[[], datetime] = field(default=_utc_now)
    """The time that a message is signed with."""

    @cached_property
    def ssl_context(self) -> ssl.SSLContext:
        """Trusts the authorities of the system, or those of `SSL_CERT_FILE`."""
        return httpcore2.default_ssl_context()

    def send(self, message: DueMessage) -> AttemptResult:
        """Send a message, and say what came of it. Nothing is raised for what a receiver or a network may do."""
        began = time.monotonic()
        try:
            status, headers = self._post(message, Deadline.after(self.seconds))
        except CannotSend as failure:
            return AttemptResult(failure.error, time.monotonic() - began, detail=failure.detail)
        return _judge(status, headers, time.monotonic() - began, self.now())

    def _post(self, message: DueMessage, deadline: Deadline) -> tuple[int, Mapping[str, str]]:
        try:
            target = parse_url(message.url, self.internal_hosts)
        except WebhookUrlInvalid as error:
            raise CannotSend("url_not_allowed", error.detail) from None
        addresses = checked_addresses(target, self.resolver, deadline)
        headers = {
            "host": target.authority,
            "user-agent": self.user_agent,
            "accept": "*/*",
            "content-type": "application/json",
            "content-length": str(len(message.body.encode())),
            "connection": "close",
            **sign(message.id, self.now(), message.body, message.secrets),
        }
        proxy = None if target.internal else self.proxy_of(target.host)
        try:
            if proxy is not None:
                # The proxy gets an address that was checked here, for it would resolve the name by itself.
                host = str(addresses[0])
                with _proxy_pool(proxy, self.ssl_context, deadline) as pool:
                    return _exchange(pool, target, f"[{host}]" if ":" in host else host, headers, message.body)
            backend = CheckedBackend(addresses, deadline)
            with httpcore2.ConnectionPool(ssl_context=self.ssl_context, network_backend=backend) as pool:
                return _exchange(pool, target, target.host, headers, message.body)
        except (httpcore2.TimeoutException, TimeoutError):
            raise CannotSend("timed_out", "There was no response in time.") from None
        except httpcore2.ProxyError:
            raise CannotSend("proxy_failed", "The proxy of the environment refused the connection.") from None
        except (httpcore2.ConnectError, httpcore2.NetworkError) as error:
            raise _connection_failure(error) from None
        except (httpcore2.ProtocolError, httpcore2.UnsupportedProtocol):
            raise CannotSend("response_invalid", "The response is no well-formed HTTP.") from None
        except OSError:
            raise CannotSend("connection_failed", "The connection could not be made, or was lost.") from None


def _exchange(
    pool: httpcore2.ConnectionPool, target: WebhookTarget, host: str, headers: Mapping[str, str], body: str
) -> tuple[int, Mapping[str, str]]:
    """Send a request, and read the response as far as it is of interest: its status and header fields."""
    extensions: dict[str, Any] = {
        "timeout": {"connect": _CONNECT_SECONDS, "read": _READ_SECONDS, "write": _READ_SECONDS},
        "sni_hostname": target.host,
    }
    url = httpcore2.URL(scheme=target.scheme, host=host, port=target.port, target=target.path)
    with pool.stream(
        "POST", url, headers=list(headers.items()), content=body.encode(), extensions=extensions
    ) as response:
        size = 0
        # A receiver that is cut off in its answer may take that for an error; a long one has itself to blame.
        for chunk in response.iter_stream():
            size += len(chunk)
            if size > _MAX_RESPONSE_BYTES:
                break
        fields = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in response.headers}
        return response.status, fields


def _proxy_pool(proxy: str, context: ssl.SSLContext, deadline: Deadline) -> httpcore2.HTTPProxy:
    """Connections through the proxy of the environment.

    Raises:
        CannotSend: its address is none that is understood.
    """
    try:
        parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        parts, port = urlsplit(""), 0
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise CannotSend("proxy_failed", "HTTPS_PROXY must be an address that begins with http:// or https://.")
    credentials = None
    if parts.username is not None:
        credentials = (unquote(parts.username), unquote(parts.password or ""))
    return httpcore2.HTTPProxy(
        httpcore2.URL(scheme=parts.scheme, host=parts.hostname, port=port, target="/"),
        proxy_auth=credentials,
        ssl_context=context,
        network_backend=CheckedBackend(None, deadline),
    )


def _connection_failure(error: Exception) -> CannotSend:
    # The client raises errors of TLS as those of the connection.
    causes = [error, error.__cause__, error.__context__]
    if any(isinstance(cause, ssl.SSLError) for cause in causes):
        return CannotSend("tls_failed", "The certificate of the host was not accepted, or TLS could not be agreed on.")
    return CannotSend("connection_failed", "The connection could not be made, or was lost.")


def _judge(status: int, headers: Mapping[str, str], seconds: float, now: datetime) -> AttemptResult:
    if HTTPStatus.OK <= status < HTTPStatus.MULTIPLE_CHOICES:
        return AttemptResult(None, seconds, status)
    if status == HTTPStatus.GONE:
        return AttemptResult("gone", seconds, status, detail="The receiver wants no more messages (410).")
    if HTTPStatus.MULTIPLE_CHOICES <= status < HTTPStatus.BAD_REQUEST:
        return AttemptResult("redirected", seconds, status, detail="Redirects are not followed: set the final URL.")
    wait = parse_retry_after(headers.get("retry-after", ""), now)
    return AttemptResult("status_not_2xx", seconds, status, wait, "The receiver did not answer with a status of 2xx.")
