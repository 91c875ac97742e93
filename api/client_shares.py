"""Fair shares of what a process has a limited number of: connections, followers, transfers.

A client may hold as many slots as are free: one alone gets half of them, two get a third each, and whoever comes next
finds some. (The dynamic thresholds of shared buffers: Choudhury and Hahne, IEEE/ACM Transactions on Networking 6(2),
1998, with a factor of 1.)
"""

import ipaddress
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from starlette.types import Scope

from domain.errors import ApiError, QuotaExceeded, Unavailable


class ClientShareExceeded(QuotaExceeded):
    """This client uses as much of the service as one may while others need it: end some of its requests first."""

    code = "client_share_exceeded"


class TooManyTransfers(Unavailable):
    """As many uploads and downloads are in progress as this process can serve: try again later."""

    code = "too_many_transfers"


TRANSFER_ERRORS: Final = (ClientShareExceeded, TooManyTransfers)
"""The errors of an operation that uploads or downloads a file."""


class ClientShares:
    """Slots that the clients of one process share. It is used from the event loop alone.

    Args:
        capacity: the number of slots.
        all_taken: the error where none is free.
    """

    def __init__(self, capacity: int, all_taken: type[ApiError]) -> None:
        self._capacity = capacity
        self._all_taken = all_taken
        self._held: Counter[str] = Counter()
        self._total = 0

    @property
    def total(self) -> int:
        """The slots that are held now."""
        return self._total

    def take(self, client: str) -> None:
        """Take a slot; :meth:`release` gives it back.

        Raises:
            ApiError: none is free; of the type that the shares were made with.
            ClientShareExceeded: the client holds as many as are free.
        """
        free = self._capacity - self._total
        if free <= 0:
            raise self._all_taken
        if self._held[client] >= free:
            raise ClientShareExceeded
        self._held[client] += 1
        self._total += 1

    def release(self, client: str) -> None:
        """Give a slot back."""
        self._total -= 1
        self._held[client] -= 1
        if not self._held[client]:
            del self._held[client]

    @contextmanager
    def hold(self, client: str) -> Iterator[None]:
        """Hold a slot for as long as the block lasts; raises as :meth:`take` does."""
        self.take(client)
        try:
            yield
        finally:
            self.release(client)


def client_of(scope: Scope) -> str:
    """The name under which the sender of a request has its shares: its key, where it has one, and its network."""
    principal = scope.get("state", {}).get("principal")
    key_id = getattr(principal, "key_id", None) or ""
    return f"{key_id}@{network_of(host_of(scope))}"


def host_of(scope: Scope) -> str:
    """The address of the sender of a request; empty where the server knows none, as over a Unix socket."""
    client = scope.get("client")
    return str(client[0]) if client else ""


def plain_address(host: str) -> str:
    """The address of an IPv4 client that a socket of both versions shows as `::ffff:10.0.0.1`; any other as it is."""
    if ":" not in host:
        return host
    try:
        mapped = ipaddress.IPv6Address(host.partition("%")[0]).ipv4_mapped
    except ValueError:
        return host
    return host if mapped is None else str(mapped)


def network_of(host: str) -> str:
    """The network that counts as one client: an IPv4 address itself, and 64 bits of an IPv6 address.

    One subscriber has 2^64 IPv6 addresses.
    """
    host = plain_address(host)
    if ":" not in host:
        return host
    try:
        address = ipaddress.IPv6Address(host.partition("%")[0])
    except ValueError:
        return host
    return str(ipaddress.IPv6Network((int(address) >> 64 << 64, 64)))
