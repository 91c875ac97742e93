"""Header fields that keep browsers from running, framing or guessing at what the service answers."""

from typing import Final

CONTENT_SECURITY_POLICY: Final = b"default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
"""For everything that is no page: nothing is loaded and nothing runs."""
_POLICY_NAME: Final = b"content-security-policy"
_SECURITY_HEADERS: Final = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
)


def add_security_headers(headers: list[tuple[bytes, bytes]]) -> None:
    """Add them to the header fields of a response; a policy of its own stays as it is."""
    headers.extend(_SECURITY_HEADERS)
    if all(name != _POLICY_NAME for name, _ in headers):
        headers.append((_POLICY_NAME, CONTENT_SECURITY_POLICY))
