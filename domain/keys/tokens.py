"""The text of an API key: `pocl_<id>_<secret>`, which clients send as a bearer token."""

import hashlib
import re
import secrets
from dataclasses import dataclass, field
from typing import Final

_TOKEN: Final = re.compile(r"pocl_([0-9a-z]{8,40})_([0-9a-f]{64})")
_ID_PREFIX: Final = "key_"
_SECRET_BYTES: Final = 32


@dataclass(frozen=True)
class KeyToken:
    """The two parts of a key's text."""

    key_id: str
    """The id of the key's row."""
    secret: str = field(repr=False)

    def __str__(self) -> str:
        return f"pocl_{self.key_id.removeprefix(_ID_PREFIX)}_{self.secret}"

    @property
    def sha256(self) -> str:
        """SHA-256 of the key's text, in hexadecimal."""
        return hashlib.sha256(str(self).encode()).hexdigest()


def make_token(key_id: str) -> KeyToken:
    """A token with a new secret of 32 random bytes."""
    return KeyToken(key_id, secrets.token_hex(_SECRET_BYTES))


def parse_token(text: str) -> KeyToken | None:
    """The parts of a key's text; null where it has another form."""
    match = _TOKEN.fullmatch(text)
    return None if match is None else KeyToken(f"{_ID_PREFIX}{match[1]}", match[2])
