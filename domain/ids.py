"""Identifiers: a prefix that tells the kind, then a body that sorts by the time of creation."""

import secrets
import time
from typing import Literal

Prefix = Literal["job", "ds", "ckpt", "key", "wh", "msg", "chat", "exp"]

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford's base 32: no letter is taken for a digit.
_LENGTH = 26
_RANDOM_BITS = 5 * _LENGTH - 64


def new_id(prefix: Prefix) -> str:
    """A new identifier such as `job_1q2m...`: 64 bits of nanoseconds since 1970, then 66 random bits, in base 32."""
    number = time.time_ns() << _RANDOM_BITS | secrets.randbits(_RANDOM_BITS)
    digits = (_ALPHABET[number >> 5 * place & 31] for place in reversed(range(_LENGTH)))
    return f"{prefix}_{''.join(digits)}"
