"""Requests that may be repeated: the answer under an `Idempotency-Key` is given once and shown again for a day."""
