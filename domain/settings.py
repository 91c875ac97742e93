"""Settings of the API, the worker and the scheduler: environment variables `POCL_*`."""

import ipaddress
import os
import re
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import SettingsConfigDict
from sqlalchemy import make_url

from domain.environment import AbsolutePath, EnvironmentSettings, Seconds, make_absolute
from domain.mounts import network_file_system
from domain.service_urls import check_database_url, check_redis_url, sqlite_url

_KEY_MIN_LENGTH = 16
_FORMER_ARTIFACT_ROOT = "POCL_ARTEFACT_ROOT"


class Settings(EnvironmentSettings):
    """Read once at start. With no variable set: everything below `./.pocl`, on loopback, without a key."""

    model_config = SettingsConfigDict(env_prefix="POCL_")

    home: AbsolutePath = Path(".pocl")
    """The directory of everything that has no setting of its own; made with mode 0700."""
    # Both URLs may hold a password, so they are kept out of every repr.
    database_url: str = Field(default="", repr=False)
    """The database, `sqlite:///...` or `postgresql://...`; a SQLite file below `home` unless it is given."""
    redis_url: str | None = Field(default=None, repr=False)
    """The broker; null for the embedded server. The certificate of a `rediss://` server is verified, unless the address
    says `?ssl_cert_reqs=none`."""
    redis_ca_file: AbsolutePath | None = None
    """The authorities that are trusted for the broker's certificate; those of the system unless given."""

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    api_key: SecretStr | None = None
    """The bearer token of clients, 16 printable ASCII characters or more; space and quotes around it are dropped. It is
    needed to listen beyond loopback."""
    root_path: str = Field(default="", pattern=r"^(/[A-Za-z0-9._~-]+)*/?$", max_length=256)
    """The path prefix under which a proxy serves the API, for instance `/pocl`, whether it cuts it off or not."""
    trusted_proxies: str = ""
    """The addresses of proxies, separated by commas, whose `X-Forwarded-For` says who the client is; none otherwise."""
    access_log: Literal["all", "errors", "off"] = "all"
    """The responses that get a line in the log: all, those of status 400 and above, or none."""

    model_roots: tuple[AbsolutePath, ...] = ()
    """The directories below which models may be read, separated like `PATH`; `home/models` unless they are given."""
    hub_repositories: tuple[str, ...] | None = None
    """The repositories of the Hugging Face Hub that jobs may name, as patterns separated by commas, such as
    `HuggingFaceTB/*,acme/*`; null: all. `-` stands for none."""
    artifact_root: AbsolutePath = Path()
    """The artifact store, for checkpoints, data sets and results; `home/artifacts` unless it is given."""
    work_root: AbsolutePath = Path()
    """The working directories of attempts; `home/work` unless it is given."""
    cache_root: AbsolutePath = Path()
    """The cache that jobs share, with teachers' hidden states and rankings; `home/cache` unless it is given."""
    max_cache_bytes: int = Field(default=64 * 1024**3, ge=0)
    """The size of the cache, whose least recently used entries are evicted first. With 0 the teacher runs at each visit
    of a sample."""

    max_request_bytes: int = Field(default=1024**2, ge=1024)
    """The largest JSON body of a request."""
    max_upload_bytes: int = Field(default=1024**3, ge=1024)
    """The largest data set that may be uploaded."""
    max_jobs_queued: int = Field(default=100, ge=1)
    """How many jobs of one project may be queued at once."""
    encoding_check_seconds: float = Field(default=10, ge=0, le=600, allow_inf_nan=False)
    """How long a dry run or a submission may encode rows of each data set that no earlier one has; with 0 none is
    encoded, and the worker checks them all."""
    max_log_bytes: int = Field(default=64 * 1024, ge=1024)
    """How much of the end of an attempt's log is kept in its row."""

    max_connections: int = Field(default=6000, ge=64)
    """How many connections one API process serves at once; fewer where the limit on open files does not allow it."""
    head_seconds: Seconds = 10
    """Seconds in which the head of a request must arrive, from the connection or from its first byte."""
    body_seconds: Seconds = 20
    """Seconds in which a body must go on by a kibibyte, or end."""
    idle_seconds: int = Field(default=65, ge=1)
    """Seconds after which a connection without requests is closed; longer than proxies keep theirs open."""
    write_seconds: Seconds = 60
    """Seconds after which a client that takes none of the bytes sent to it is dropped."""
    max_transfers: int = Field(default=256, ge=2)
    """How many uploads and downloads one API process serves at once. A client may have as many as are free: alone half
    of them. The same holds for connections and for followers."""

    watch_seconds: float = Field(default=0.25, gt=0, le=10, allow_inf_nan=False)
    """Seconds between two queries for the snapshots of the jobs that clients wait for; one query serves all of them."""
    max_followers: int = Field(default=4000, ge=2)
    """How many long polls and event streams one API process serves at once."""
    keep_alive_seconds: Seconds = 15
    """Seconds after which an event stream without events sends a comment."""

    lease_seconds: Seconds = 60
    """Seconds after its last heartbeat at which the lease of a worker on its job expires."""
    heartbeat_seconds: Seconds = 10
    """Seconds between two heartbeats of a worker."""
    reaper_seconds: Seconds = 15
    """Seconds between two searches for expired leases."""
    max_attempts: int = Field(default=3, ge=1, le=100)
    """How many attempts of a job may be lost, crash or fail without progress before the job fails; of failures that may
    pass one counts for each worker."""
    max_failures: int = Field(default=12, ge=1, le=1000)
    """How many failures that may pass a job survives without progress, on whichever workers."""
    retry_seconds: float = Field(default=10, ge=0, le=86_400, allow_inf_nan=False)
    """How long a job waits at most after its first failure that may pass, and a worker after its first failed check of
    itself; each further one doubles it. 0: no wait."""
    max_retry_seconds: float = Field(default=600, ge=0, le=86_400, allow_inf_nan=False)
    """The longest of these waits; after it a job may also return to a worker that failed it while others are busy."""

    @field_validator("model_roots", mode="before")
    @classmethod
    def _split_like_path(cls, value: Any) -> Any:
        return [part for part in value.split(os.pathsep) if part] if isinstance(value, str) else value

    @field_validator("root_path")
    @classmethod
    def _end_without_slash(cls, path: str) -> str:
        return path.rstrip("/")

    @field_validator("hub_repositories", mode="before")
    @classmethod
    def _split_at_commas(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        patterns = [part.strip() for part in value.split(",") if part.strip()]
        return [] if patterns == ["-"] else patterns

    @field_validator("hub_repositories")
    @classmethod
    def _check_patterns(cls, patterns: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for pattern in patterns or ():
            if not re.fullmatch(r"[\w.*?\[\]!-]+/[\w.*?\[\]!-]+", pattern):
                raise ValueError(
                    "POCL_HUB_REPOSITORIES takes patterns such as acme/* and acme/model-?, with commas between"
                )
        return patterns

    @field_validator("api_key")
    @classmethod
    def _clean_key(cls, key: SecretStr | None) -> SecretStr | None:
        if key is None:
            return None
        # Files end in a line feed, and Compose and systemd keep the quotes that a shell would take off.
        text = key.get_secret_value().strip()
        if len(text) >= 2 and text[0] == text[-1] and text[0] in "\"'":
            text = text[1:-1].strip()
        if len(text) < _KEY_MIN_LENGTH:
            raise ValueError(
                f"POCL_API_KEY must have at least {_KEY_MIN_LENGTH} characters, without the space and quotes around it"
            )
        if not all(" " <= character <= "~" for character in text):
            raise ValueError("POCL_API_KEY may have printable ASCII characters only: no header carries others")
        return SecretStr(text)

    @field_validator("host")
    @classmethod
    def _check_host(cls, host: str) -> str:
        bare = host.removeprefix("[").removesuffix("]")
        if not bare or not bare.isprintable() or any(character in " /[]" for character in bare):
            raise ValueError("POCL_HOST must be an address or a name of this machine")
        return bare

    @field_validator("database_url")
    @classmethod
    def _check_database_url(cls, address: str) -> str:
        return check_database_url(address)

    @field_validator("redis_url")
    @classmethod
    def _check_redis_url(cls, address: str | None) -> str | None:
        return None if address is None else check_redis_url(address)

    @model_validator(mode="before")
    @classmethod
    def _refuse_former_name(cls, values: dict[str, Any]) -> dict[str, Any]:
        # A variable that no field reads would be ignored, and the service would begin with an empty store.
        if any(name.upper() == _FORMER_ARTIFACT_ROOT and value for name, value in os.environ.items()):
            raise ValueError(f"{_FORMER_ARTIFACT_ROOT} is now called POCL_ARTIFACT_ROOT: set that instead")
        return values

    @model_validator(mode="before")
    @classmethod
    def _default_directories(cls, values: dict[str, Any]) -> dict[str, Any]:
        try:
            home = make_absolute(values.get("home") or ".pocl")
        except ValueError as error:
            raise ValueError(f"POCL_HOME {error}") from None
        defaults = {
            "home": home,
            "model_roots": (home / "models",),
            "artifact_root": home / "artifacts",
            "work_root": home / "work",
            "cache_root": home / "cache",
            "database_url": sqlite_url(home / "pocl.sqlite3"),
        }
        return {**defaults, **values, "home": home}

    @model_validator(mode="after")
    def _refuse_sqlite_on_network_file_system(self) -> Self:
        url = make_url(self.database_url)
        if url.get_backend_name() == "sqlite":
            kind = network_file_system(Path(str(url.database)))
            if kind is not None:
                # Their locks do not hold between processes, and the write-ahead log needs shared memory.
                raise ValueError(
                    f"POCL_DATABASE_URL names a SQLite file on a network file system ({kind}), where SQLite loses data:"
                    " put it on a local disk, or use PostgreSQL"
                )
        return self

    @model_validator(mode="after")
    def _require_key_beyond_loopback(self) -> Self:
        if self.api_key is None and not self.on_loopback:
            raise ValueError("set POCL_API_KEY to listen beyond loopback, or POCL_HOST=127.0.0.1")
        return self

    @model_validator(mode="after")
    def _check_heartbeat_interval(self) -> Self:
        if self.heartbeat_seconds * 2 > self.lease_seconds:
            raise ValueError("POCL_HEARTBEAT_SECONDS must be at most half of POCL_LEASE_SECONDS")
        return self

    @cached_property
    def on_loopback(self) -> bool:
        """Whether only this machine can reach the service."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"
