"""A valid value of each secret of the settings, with the variables that it needs beside it."""

VALID_SECRETS: dict[str, dict[str, str]] = {
    "POCL_API_KEY": {"POCL_API_KEY": "a-key-of-decent-length"},
    "POCL_METRICS_TOKEN": {"POCL_METRICS_TOKEN": "a-token-of-decent-length"},
    "POCL_HUB_WRITE_TOKEN": {"POCL_HUB_WRITE_TOKEN": "hf_a-token-of-the-hub"},
    "POCL_DATABASE_URL": {"POCL_DATABASE_URL": "postgresql://pocl:p%40ss@db/pocl"},
    "POCL_DATABASE_PASSWORD": {"POCL_DATABASE_PASSWORD": "p@ss#?%/", "POCL_DATABASE_URL": "postgresql://pocl@db/pocl"},
    "POCL_REDIS_URL": {"POCL_REDIS_URL": "redis://:p%40ss@r:6379/1"},
    "POCL_REDIS_PASSWORD": {"POCL_REDIS_PASSWORD": "p@ss#?%/", "POCL_REDIS_URL": "redis://r:6379/1"},
    "POCL_RATE_LIMIT_REDIS_URL": {"POCL_RATE_LIMIT_REDIS_URL": "redis://:p%40ss@r:6379/2"},
}
