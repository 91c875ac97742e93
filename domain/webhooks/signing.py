"""Secrets of endpoints, and signatures of messages by the Standard Webhooks specification."""

import base64
import secrets
from datetime import UTC, datetime
from typing import Final

_SECRET_BYTES: Final = 32


def new_secret() -> str:
    """A new secret, `whsec_` and 32 random bytes in base64."""
    return "whsec_" + base64.b64encode(secrets.token_bytes(_SECRET_BYTES)).decode()


def sign(message_id: str, at: datetime, body: str, valid_secrets: tuple[str, ...]) -> dict[str, str]:
    """The header fields that a receiver verifies a message by, with a signature for each secret that is valid.

    Args:
        at: when the message is sent: a receiver refuses one that is more than minutes old.
    """
    # Imported where it is used: the API signs nothing.
    from standardwebhooks import Webhook

    # The library takes whatever it is given for UTC.
    moment = at.astimezone(UTC)
    signatures = [Webhook(secret).sign(message_id, moment, body) for secret in valid_secrets]
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(int(moment.timestamp())),
        "webhook-signature": " ".join(signatures),
    }
