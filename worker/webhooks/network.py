"""Connections for webhooks: names are resolved, the addresses checked, and the connection made to a checked address.

Between the check and the connection no name is resolved again, so a name that changes its address meanwhile (DNS
rebinding) changes nothing.
"""

import ipaddress
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from ssl import SSLContext
from threading import BoundedSemaphore, Thread
from typing import Any, Final

from httpcore2 import (
    ConnectError,
    ConnectTimeout,
    NetworkBackend,
    NetworkStream,
    ReadTimeout,
    SyncBackend,
    WriteTimeout,
)

from domain.webhooks.addresses import IPAddress, WebhookTarget, refuse_address
from domain.webhooks.models import DeliveryError

Resolver = Callable[[str, int], Sequence[str]]
"""The addresses of a name and a port, in the order in which they are to be tried.

It raises an `OSError` where the name has none.
"""
_MAX_ADDRESSES: Final = 8
_MAX_LOOKUPS: Final = 32
"""How many names are resolved at once: a resolver may hang for longer than anybody waits for it."""
_lookups: Final = BoundedSemaphore(_MAX_LOOKUPS)


class CannotSend(Exception):
    """A message could not be sent, or got no response."""

    def __init__(self, error: DeliveryError, detail: str) -> None:
        super().__init__(detail)
        self.error = error
        self.detail = detail
        """One sentence, without the URL."""


@dataclass(frozen=True)
class Deadline:
    """The end of an attempt, by a clock that is never set."""

    at: float

    @classmethod
    def after(cls, seconds: float) -> "Deadline":
        return cls(time.monotonic() + seconds)

    def left(self, at_most: float | None = None) -> float:
        """Seconds until the end, or `at_most` where that is less; never less than a millisecond."""
        seconds = max(0.001, self.at - time.monotonic())
        return seconds if at_most is None else min(seconds, at_most)

    @property
    def passed(self) -> bool:
        return time.monotonic() >= self.at


def resolve(host: str, port: int) -> list[str]:
    """The addresses of a name, by the resolver of the system."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def checked_addresses(target: WebhookTarget, resolver: Resolver, deadline: Deadline) -> list[IPAddress]:
    """The addresses that a message for `target` may be sent to.

    Raises:
        CannotSend: its name has no address, or one of them may not be used.
    """
    try:
        texts = _resolve_within(resolver, target, deadline)
    except (OSError, UnicodeError):
        raise CannotSend("name_not_resolved", "The name of the host has no address.") from None
    addresses = [ipaddress.ip_address(text.partition("%")[0]) for text in texts[:_MAX_ADDRESSES]]
    if not addresses:
        raise CannotSend("name_not_resolved", "The name of the host has no address.")
    for address in addresses:
        # One wrong address among right ones is enough: the name is not in the hands of somebody to be trusted.
        reason = refuse_address(address, internal=target.internal)
        if reason is not None:
            raise CannotSend("address_not_allowed", f"The host has an address that may not be used: {reason}.")
    return addresses


def _resolve_within(resolver: Resolver, target: WebhookTarget, deadline: Deadline) -> Sequence[str]:
    if not _lookups.acquire(timeout=deadline.left()):
        raise CannotSend("name_not_resolved", "Too many names are being resolved at once.")
    answer: Future[Sequence[str]] = Future()

    def look_up() -> None:
        try:
            answer.set_result(resolver(target.host, target.port))
        except Exception as error:  # noqa: BLE001 - whatever it is goes to the thread that waits
            answer.set_exception(error)
        finally:
            _lookups.release()

    # A daemon: a resolver that hangs must not keep the process from ending.
    Thread(target=look_up, name="webhook-lookup", daemon=True).start()
    try:
        return answer.result(timeout=deadline.left())
    except FutureTimeout:
        raise CannotSend("timed_out", "The name of the host was not resolved in time.") from None


class CheckedBackend(NetworkBackend):
    """Connects to one of some addresses, whatever name it is asked for, and ends everything at a deadline.

    Args:
        addresses: null for a proxy, which is what the operator set and is resolved by its name.
    """

    def __init__(self, addresses: Sequence[IPAddress] | None, deadline: Deadline) -> None:
        self._addresses = addresses
        self._deadline = deadline

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> NetworkStream:
        hosts = [host] if self._addresses is None else [str(address) for address in self._addresses]
        for index, each in enumerate(hosts):
            try:
                stream = SyncBackend().connect_tcp(
                    each, port, self._deadline.left(timeout), local_address, socket_options
                )
                return _BoundedStream(stream, self._deadline)
            except (ConnectError, ConnectTimeout):
                if index + 1 == len(hosts) or self._deadline.passed:
                    raise
        raise AssertionError("there is an address")


class _BoundedStream(NetworkStream):
    """A stream that ends at a deadline, however slowly bytes come."""

    def __init__(self, stream: NetworkStream, deadline: Deadline) -> None:
        self._stream = stream
        self._deadline = deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        if self._deadline.passed:
            raise ReadTimeout("the deadline has passed")
        return self._stream.read(max_bytes, self._deadline.left(timeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        if self._deadline.passed:
            raise WriteTimeout("the deadline has passed")
        self._stream.write(buffer, self._deadline.left(timeout))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> NetworkStream:
        stream = self._stream.start_tls(ssl_context, server_hostname, self._deadline.left(timeout))
        return _BoundedStream(stream, self._deadline)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)
