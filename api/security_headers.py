"""Header fields that keep browsers from running, framing or guessing at what the service answers."""

from typing import Final

CONTENT_SECURITY_POLICY: Final = b"default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
"""For everything that is no page: nothing is loaded and nothing runs."""
_SECURITY_HEADERS: Final = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"content-security-policy", CONTENT_SECURITY_POLICY),
)


def add_security_headers(headers: list[tuple[bytes, bytes]]) -> None:
    """Add them to the header fields of a response; those that it has already stay as they are."""
    given = {name for name, _ in headers}
    headers.extend(each for each in _SECURITY_HEADERS if each[0] not in given)
