"""`Idempotency-Key`: the stored response of a request is replayed to its duplicates."""
