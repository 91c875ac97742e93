"""Where a bucket is, and the clients of it."""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from obstore.store import S3Config, S3Store

MAX_RETRIES: Final = 6
SILENCE_SECONDS: Final = 60
"""A store that sends nothing for so long in answer to a request is taken for away."""
CONNECT_SECONDS: Final = 5
_RETRY_SECONDS: Final = 30
_REQUEST_SECONDS: Final = 24 * 3600


@dataclass(frozen=True)
class Bucket:
    """Where artifacts are, as `POCL_ARTIFACT_STORE` and the environment say."""

    name: str
    prefix: str = ""
    endpoint: str | None = None
    """The address of the store; null: that of AWS."""

    @classmethod
    def parse(cls, address: str) -> "Bucket":
        """Read `s3://bucket/prefix`; the endpoint is that of `AWS_ENDPOINT_URL_S3` or `AWS_ENDPOINT_URL`."""
        name, _, prefix = address.removeprefix("s3://").partition("/")
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None
        return cls(name, prefix.strip("/"), endpoint)

    def connect(self, endpoint: str | None = None, *, max_retries: int = MAX_RETRIES) -> "S3Store":
        """A client, with the region and the credentials of the environment: those of variables, a web identity, a
        container or an instance.

        Args:
            endpoint: another address of the same store.
        """
        from obstore.store import S3Store

        endpoint = endpoint or self.endpoint
        config: S3Config = {} if endpoint is None else {"endpoint": endpoint, "aws_endpoint_url_s3": endpoint}
        return S3Store(
            self.name,
            prefix=self.prefix or None,
            config=config,
            client_options={
                "allow_http": endpoint is not None and endpoint.startswith("http://"),
                "connect_timeout": timedelta(seconds=CONNECT_SECONDS),
                "read_timeout": timedelta(seconds=SILENCE_SECONDS),
                "timeout": timedelta(seconds=_REQUEST_SECONDS),
            },
            retry_config={
                "max_retries": max_retries,
                "retry_timeout": timedelta(seconds=_RETRY_SECONDS),
                "backoff": {
                    "init_backoff": timedelta(milliseconds=200),
                    "max_backoff": timedelta(seconds=5),
                    "base": 2,
                },
            },
        )
