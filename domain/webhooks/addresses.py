"""Which addresses messages may be sent to: `https` and the public internet, but for hosts that the operator names.

A client chooses the URL, and this service sends from within a private network: without these rules every client could
reach what that network holds (server-side request forgery). A URL is checked when it is given; the addresses that its
name resolves to are checked each time before a connection is made, and the connection goes to a checked address.
"""

import ipaddress
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from domain.errors import Unprocessable
from pocl.errors import FieldError

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

MAX_URL_LENGTH: Final = 2048
_DEFAULT_PORTS: Final = {"https": 443, "http": 80}
_LABEL: Final = r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?"
_NAME: Final = re.compile(rf"(?=.{{1,253}}$)({_LABEL}\.)*{_LABEL}")
_LAST_LABEL_OF_NUMBER: Final = re.compile(r"(^|.*\.)([0-9]+|0x[0-9a-f]*)")
"""Resolvers take a name that ends like this for an address in decimal, octal or hexadecimal."""
_NAT64: Final = ipaddress.IPv6Network("64:ff9b::/96")
# Versions of Python differ in what they call global: these are not, by the registries of the IANA.
_SPECIAL_PURPOSE: Final = tuple(
    ipaddress.ip_network(network)
    for network in (
        "100.64.0.0/10",
        "192.0.0.0/24",
        "192.88.99.0/24",
        "198.18.0.0/15",
        "240.0.0.0/4",
        "64:ff9b:1::/48",
        "100::/64",
        "2001::/23",
        "2001:db8::/32",
        "3fff::/20",
        "5f00::/16",
        "fec0::/10",
    )
)
_METADATA: Final = frozenset({ipaddress.ip_address("168.63.129.16")})
"""Services of clouds for their machines at addresses that are public by their range."""


class WebhookUrlInvalid(Unprocessable):
    """Messages cannot be sent to this URL."""

    code = "webhook_url_invalid"

    def __init__(self, reason: str) -> None:
        super().__init__(f"Messages cannot be sent to this URL: {reason}.")
        self.field_errors = (FieldError("/url", self.code, reason),)


@dataclass(frozen=True)
class WebhookTarget:
    """A URL in parts, as a request needs them."""

    scheme: str
    host: str
    """A name in ASCII and lower case, or an address without brackets."""
    port: int
    path: str
    """The path and the query."""
    internal: bool
    """Whether the operator lets messages go to this host by `http` and at a private address."""

    @property
    def authority(self) -> str:
        """The value of the header field `Host`."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"


def parse_url(url: str, internal_hosts: Collection[str]) -> WebhookTarget:
    """The parts of a URL that messages may be sent to, as far as that is known before its name is resolved.

    Args:
        internal_hosts: names and addresses, in lower case, that the operator trusts.

    Raises:
        WebhookUrlInvalid: nothing may be sent there, with the reason.
    """
    if len(url) > MAX_URL_LENGTH:
        raise WebhookUrlInvalid(f"it has more than {MAX_URL_LENGTH} characters")
    # The parser drops some control characters in silence, and a space ends the request line.
    if not all("!" <= character <= "~" for character in _ascii_host(url)):
        raise WebhookUrlInvalid("write spaces and characters beyond ASCII in path and query as %XX")
    try:
        parts = urlsplit(_ascii_host(url))
        host, port = (parts.hostname or "").rstrip("."), parts.port
    except ValueError:
        raise WebhookUrlInvalid("it is not well-formed") from None
    if parts.scheme not in _DEFAULT_PORTS or not parts.netloc:
        raise WebhookUrlInvalid("it must begin with https://")
    if "@" in parts.netloc:
        raise WebhookUrlInvalid("leave out user and password: messages are signed")
    if parts.fragment or "\\" in url:
        raise WebhookUrlInvalid("leave out the fragment (#...) and backslashes")
    if port == 0:
        raise WebhookUrlInvalid("0 is no port")
    internal = host in internal_hosts
    if parts.scheme == "http" and not internal:
        raise WebhookUrlInvalid("it must begin with https://, since its host is not in POCL_WEBHOOK_INTERNAL_HOSTS")
    _check_host(host, internal=internal)
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return WebhookTarget(parts.scheme, host, port or _DEFAULT_PORTS[parts.scheme], path, internal)


def refuse_address(address: IPAddress, *, internal: bool) -> str | None:
    """Why no message may be sent to an address, as a phrase; null where one may.

    Addresses of link-local networks, where clouds keep credentials of their machines, and those of no single host are
    refused whatever the operator says.
    """
    for each in _meanings(address):
        if each.is_link_local or each in _METADATA:
            return "it is link-local or a metadata service"
        if each.is_multicast or each.is_unspecified or (each.is_reserved and not each.is_loopback):
            return "it is no address of a single host"
        if not internal and (not each.is_global or any(each in network for network in _SPECIAL_PURPOSE)):
            return "it is loopback, private, or not in the public internet"
    return None


def _meanings(address: IPAddress) -> Iterator[IPAddress]:
    """The address, or the IPv4 addresses that a gateway or a kernel takes it for."""
    if isinstance(address, ipaddress.IPv4Address):
        yield address
        return
    translated = address.ipv4_mapped
    if address in _NAT64:
        translated = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    if translated is not None:
        yield translated
        return
    yield address
    yield from (each for each in (address.sixtofour, *(address.teredo or ())) if each is not None)


def _check_host(host: str, *, internal: bool) -> None:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        if not _NAME.fullmatch(host):
            raise WebhookUrlInvalid("its host is no name and no address") from None
        if _LAST_LABEL_OF_NUMBER.fullmatch(host):
            raise WebhookUrlInvalid("write an IPv4 address as four decimal numbers") from None
        if not internal and (host == "localhost" or host.endswith(".localhost")):
            raise WebhookUrlInvalid("its host is this machine") from None
        return
    if getattr(address, "scope_id", None) is not None:
        raise WebhookUrlInvalid("leave out the zone of the address")
    reason = refuse_address(address, internal=internal)
    if reason is not None:
        raise WebhookUrlInvalid(f"its host is an address that may not be used: {reason}")


def _ascii_host(url: str) -> str:
    """The URL with a host name of other scripts in its ASCII form (IDNA)."""
    match = re.match(r"(?i)(https?://)([^/?#\\@:\[\]]+)(.*)", url, re.DOTALL)
    if match is None or match[2].isascii():
        return url
    # Imported where it is used: its tables are large, and such names are few.
    import idna

    try:
        return f"{match[1]}{idna.encode(match[2], uts46=True).decode()}{match[3]}"
    except idna.IDNAError:
        raise WebhookUrlInvalid("its host name is not well-formed") from None
