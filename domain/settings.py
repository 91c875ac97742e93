"""Settings of the API, the worker and the scheduler: environment variables `POCL_*`.

Each that may hold a secret (:data:`domain.process_secrets.SECRET_VARIABLES`) may be given by a file instead:
`POCL_API_KEY_FILE` names the file that holds the value of `POCL_API_KEY`.
"""

import ipaddress
import os
import re
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, SecretStr, ValidationInfo, field_validator, model_validator
from pydantic_settings import SettingsConfigDict
from sqlalchemy import make_url

from domain.environment import AbsolutePath, EnvironmentSettings, Seconds, make_absolute, split_list
from domain.mounts import network_file_system
from domain.service_urls import (
    add_database_password,
    add_redis_password,
    check_database_url,
    check_redis_url,
    sqlite_url,
)
from domain.tracing import can_trace

_KEY_MIN_LENGTH = 16
_FORMER_ARTIFACT_ROOT = "POCL_ARTEFACT_ROOT"


class Settings(EnvironmentSettings):
    """Read once at start. With no variable set: everything below `./.pocl`, on loopback, with a key of its own."""

    model_config = SettingsConfigDict(env_prefix="POCL_")

    home: AbsolutePath = Path(".pocl")
    """The directory of everything that has no setting of its own; made with mode 0700."""
    # Passwords stand before the addresses that they become a part of.
    database_password: SecretStr | None = None
    """The password of the database's user, where `database_url` has none; any characters."""
    # Both URLs may hold a password, so they are kept out of every repr.
    database_url: str = Field(default="", repr=False)
    """The database, `sqlite:///...` or `postgresql://...`; a SQLite file below `home` unless it is given."""
    redis_password: SecretStr | None = None
    """The password of the broker, where `redis_url` has none; any characters."""
    redis_url: str | None = Field(default=None, repr=False, validate_default=True)
    """The broker; null for the embedded server. The certificate of a `rediss://` server is verified, unless the address
    says `?ssl_cert_reqs=none`."""
    redis_ca_file: AbsolutePath | None = None
    """The authorities that are trusted for the broker's certificate; those of the system unless given."""

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    api_workers: int = Field(default=1, ge=1, le=64)
    """How many processes of the API share the socket; each has the limits below for itself."""
    api_key: SecretStr | None = None
    """An admin key of the project `default`, 16 printable ASCII characters or more; space and quotes around it are
    dropped. Without it the first start makes one, in the file `api-key` of `home`."""
    root_path: str = Field(default="", pattern=r"^(/[A-Za-z0-9._~-]+)*/?$", max_length=256)
    """The path prefix under which a proxy serves the API, for instance `/pocl`, whether it cuts it off or not."""
    cors_origins: tuple[str, ...] = ()
    """The origins of web pages elsewhere that may use the API, such as `https://app.example.com`, separated by commas;
    none unless given. Each page sends a key of its own; there is no origin for all."""
    trusted_proxies: str = ""
    """The addresses and networks of proxies, such as `10.0.0.0/8`, separated by commas, whose `X-Forwarded-For` says
    who the client is; `*` for every sender, where only a proxy reaches the service; none otherwise."""
    access_log: Literal["all", "errors", "off"] = "all"
    """The responses that get a line in the log: all, those of status 400 and above, or none."""
    commit: str | None = Field(default=None, pattern=r"^[0-9a-f]{7,64}$")
    """The commit of the source that runs, for `/version` and metrics; that of the checkout unless it is given."""
    metrics_token: SecretStr | None = None
    """A bearer token that opens `/metrics` and nothing else, of the characters of an API key; null: only keys do."""
    traces_endpoint: str | None = Field(default=None, pattern=r"^https?://[^\s@]+$", max_length=512)
    """The address of an OpenTelemetry collector that takes OTLP over HTTP, for instance `http://collector:4318`; null:
    nothing is traced. It needs the extra `traces`."""
    traces_ratio: float = Field(default=1, ge=0, le=1, allow_inf_nan=False)
    """The share of requests that are traced, where the client has not decided it by `traceparent`."""
    metrics_cache_seconds: float = Field(default=5, ge=0, le=3600, allow_inf_nan=False)
    """Seconds for which the figures that scrapes read from the database are kept, for all scrapes of a process."""

    model_roots: tuple[AbsolutePath, ...] = ()
    """The directories below which models may be read, separated like `PATH`; `home/models` unless they are given."""
    hub_repositories: tuple[str, ...] | None = None
    """The repositories of the Hugging Face Hub that jobs may name, as patterns separated by commas, such as
    `HuggingFaceTB/*,acme/*`; null: all. `-` stands for none."""
    hub_publish_to: tuple[str, ...] = ()
    """The owners of repositories on the Hugging Face Hub, users and organisations separated by commas, that jobs may
    have their students pushed to (`export.hub`); none unless given. The API and the scheduler read it."""
    hub_write_token: SecretStr | None = None
    """The token of the Hub that the scheduler pushes with, which may write to these owners; null: nothing is pushed."""
    artifact_store: str | None = Field(default=None, max_length=512)
    """Where checkpoints, data sets and results are: `s3://bucket/prefix`, whose endpoint, region and credentials the
    variables `AWS_*` say, or a directory, which is the same as `artifact_root`; null: in `artifact_root`."""
    artifact_root: AbsolutePath = Path()
    """The directory of the artifact store; `home/artifacts` unless it is given. With a bucket as the store, copies of
    data sets are in `artifact-copies` below it, or below `home`."""
    artifact_downloads: Literal["redirect", "proxy"] = "redirect"
    """Whether clients are sent to the bucket for files, by presigned addresses, or get them through the API."""
    artifact_public_endpoint: str | None = Field(default=None, pattern=r"^https?://[^\s@/]+/?$", max_length=512)
    """The address under which clients reach the bucket's store; null: that of `AWS_ENDPOINT_URL`."""
    artifact_link_seconds: int = Field(default=900, ge=1, le=604_800)
    """How long a presigned address is good."""
    max_artifact_copies_bytes: int = Field(default=16 * 1024**3, ge=0)
    """The size of the copies of data sets that an API process with a bucket keeps on its disk, each for a day after its
    last use."""
    work_root: AbsolutePath = Path()
    """The working directories of attempts; `home/work` unless it is given."""
    cache_root: AbsolutePath = Path()
    """The cache that jobs share, with teachers' hidden states and rankings; `home/cache` unless it is given."""
    max_cache_bytes: int = Field(default=64 * 1024**3, ge=0)
    """The size of the cache, whose least recently used entries are evicted first. With 0 the teacher runs at each visit
    of a sample."""
    max_cache_days: int = Field(default=30, ge=1, le=36_500)
    """Days after which an entry of the cache that no job has used is removed."""

    max_request_bytes: int = Field(default=1024**2, ge=1024)
    """The largest JSON body of a request."""
    max_upload_bytes: int = Field(default=1024**3, ge=1024)
    """The largest data set that may be uploaded."""
    requests_per_minute: int | None = Field(default=600_000, ge=1)
    """How many requests one key may send in a minute, to all API processes of one socket together, and to all there are
    where `rate_limit_redis_url` is set."""
    rate_limit_redis_url: str | None = Field(default=None, repr=False)
    """A Redis or Valkey where all API processes count the requests of a key together; null: those of each
    socket do."""
    sync_upload_bytes: int = Field(default=16 * 1024**2, ge=0)
    """The largest upload that is read before it is answered (201, or 422 with the rows that are wrong). A larger one is
    answered by 202 once it has arrived, and read afterwards: its `status` says what came of it."""
    max_jobs_queued: int = Field(default=100, ge=1)
    """How many jobs of one project may be queued at once, unless its own quota says otherwise."""
    max_exports_queued: int = Field(default=16, ge=1, le=1000)
    """How many exports of checkpoints of one project may wait or be made at once."""
    encoding_check_seconds: float = Field(default=10, ge=0, le=600, allow_inf_nan=False)
    """How long a dry run or a submission may encode rows of each data set that no earlier one has; with 0 none is
    encoded, and the worker checks them all."""
    max_log_bytes: int = Field(default=1024**2, ge=1024)
    """How many bytes of the end of an attempt's log are kept, about."""

    price_per_gpu_hour: float | None = Field(default=None, ge=0, le=1e6, allow_inf_nan=False)
    """What an hour of a GPU costs, for the price that dry runs and usage show; null: none is shown."""
    price_currency: str = Field(default="USD", pattern=r"^[A-Z]{3}$")
    """The currency of that price, as ISO 4217 names it."""

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

    chat_wait_seconds: float = Field(default=30, ge=1, le=600, allow_inf_nan=False)
    """How long a conversation with a model waits for a worker that is free."""
    chat_answer_seconds: float = Field(default=120, ge=1, le=3600, allow_inf_nan=False)
    """How long a worker may take for one answer, the loading of the model included."""
    chat_kept_seconds: float = Field(default=600, ge=1, le=86_400, allow_inf_nan=False)
    """How long a conversation and its answer are kept after their end."""
    max_chats: int = Field(default=64, ge=1, le=1000)
    """How many conversations may wait or be answered at once."""
    max_chats_per_project: int = Field(default=8, ge=1, le=1000)
    """How many of one project may."""

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

    webhook_internal_hosts: tuple[str, ...] = ()
    """Hosts of webhooks, names or addresses separated by commas, that may be reached by `http` and at private
    addresses, without a proxy; all others by `https` in the public internet alone."""
    webhook_disable_days: float = Field(default=5, gt=0, le=366, allow_inf_nan=False)
    """Days for which every attempt at a webhook must have failed before it is disabled."""
    webhook_delivery_days: float = Field(default=30, gt=0, le=3660, allow_inf_nan=False)
    """Days for which the log of a webhook has a message that was delivered or given up."""
    max_webhook_deliveries: int = Field(default=1000, ge=10)
    """How many such messages of one webhook its log has at most, the newest."""

    @field_validator("model_roots", mode="before")
    @classmethod
    def _split_like_path(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        if "://" in value:
            raise ValueError("has an address, where paths are expected, with colons between")
        return [part for part in value.split(os.pathsep) if part]

    @field_validator("root_path")
    @classmethod
    def _end_without_slash(cls, path: str) -> str:
        return path.rstrip("/")

    @field_validator("webhook_internal_hosts", mode="before")
    @classmethod
    def _split_hosts(cls, value: Any) -> Any:
        hosts = split_list(value)
        return [str(host).lower().removeprefix("[").removesuffix("]").rstrip(".") for host in hosts]

    @field_validator("webhook_internal_hosts")
    @classmethod
    def _check_hosts(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        for host in hosts:
            if not re.fullmatch(r"[a-z0-9._-]+|[0-9a-f:.]+", host):
                raise ValueError(
                    "POCL_WEBHOOK_INTERNAL_HOSTS takes names and addresses of hosts, without scheme, port or path"
                )
        return hosts

    @field_validator("cors_origins", mode="before")
    @classmethod
    def _split_origins(cls, value: Any) -> Any:
        return [str(origin).lower() for origin in split_list(value)]

    @field_validator("cors_origins")
    @classmethod
    def _check_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            if not re.fullmatch(r"https?://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?", origin):
                raise ValueError(
                    "POCL_CORS_ORIGINS takes origins as browsers send them, such as https://app.example.com or"
                    " http://localhost:5173: scheme, host and port, without path, and never *"
                )
        return origins

    @field_validator("trusted_proxies")
    @classmethod
    def _check_proxies(cls, addresses: str) -> str:
        if addresses == "*":
            return addresses
        try:
            return ",".join(str(ipaddress.ip_network(each, strict=False)) for each in split_list(addresses))
        except ValueError:
            # The server would take a name for an address that no client ever has.
            raise ValueError(
                "POCL_TRUSTED_PROXIES takes addresses and networks such as 10.0.0.0/8, with commas between, or * alone:"
                " no names"
            ) from None

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

    @field_validator("hub_publish_to", mode="before")
    @classmethod
    def _split_owners(cls, value: Any) -> Any:
        return split_list(value)

    @field_validator("hub_publish_to")
    @classmethod
    def _check_owners(cls, owners: tuple[str, ...]) -> tuple[str, ...]:
        for owner in owners:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}", owner):
                raise ValueError(
                    "POCL_HUB_PUBLISH_TO takes users and organisations of the Hub such as acme, with commas between:"
                    " neither repositories nor patterns"
                )
        return owners

    @field_validator("hub_write_token")
    @classmethod
    def _check_hub_token(cls, token: SecretStr | None) -> SecretStr | None:
        # A header carries it; white space and quotes are gone already.
        if token is not None and not re.fullmatch(r"[!-~]{8,512}", token.get_secret_value()):
            raise ValueError("POCL_HUB_WRITE_TOKEN must be a token of the Hub: 8 printable ASCII characters or more")
        return token

    @field_validator("api_key", "metrics_token")
    @classmethod
    def _clean_key(cls, key: SecretStr | None, info: ValidationInfo) -> SecretStr | None:
        if key is None:
            return None
        variable = f"POCL_{info.field_name}".upper()
        # Files end in a line feed, and Compose and systemd keep the quotes that a shell would take off.
        text = key.get_secret_value().strip()
        if len(text) >= 2 and text[0] == text[-1] and text[0] in "\"'":
            text = text[1:-1].strip()
        if len(text) < _KEY_MIN_LENGTH:
            raise ValueError(
                f"{variable} must have at least {_KEY_MIN_LENGTH} characters, without the space and quotes around it"
            )
        if not all(" " <= character <= "~" for character in text):
            raise ValueError(f"{variable} may have printable ASCII characters only: no header carries others")
        return SecretStr(text)

    @field_validator("host")
    @classmethod
    def _check_host(cls, host: str) -> str:
        bare = host.removeprefix("[").removesuffix("]")
        if not bare or not bare.isprintable() or any(character in " /[]" for character in bare):
            raise ValueError("POCL_HOST must be an address or a name of this machine")
        return bare

    @field_validator("artifact_store")
    @classmethod
    def _check_bucket(cls, address: str | None) -> str | None:
        if address is not None and not re.fullmatch(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[\w.-]+)*/?", address):
            raise ValueError(
                "POCL_ARTIFACT_STORE must be a directory or s3://bucket/prefix, without user, password and query"
            )
        return address

    @field_validator("traces_endpoint")
    @classmethod
    def _check_traces(cls, address: str | None) -> str | None:
        if address is not None and not can_trace():
            raise ValueError("POCL_TRACES_ENDPOINT needs the extra `traces`: pip install 'pocl-service[traces]'")
        return address

    @field_validator("database_url")
    @classmethod
    def _check_database_url(cls, address: str, info: ValidationInfo) -> str:
        return add_database_password(check_database_url(address), _text(info.data.get("database_password")))

    @field_validator("redis_url")
    @classmethod
    def _check_redis_url(cls, address: str | None, info: ValidationInfo) -> str | None:
        checked = None if address is None else check_redis_url(address)
        return add_redis_password(checked, _text(info.data.get("redis_password")))

    @field_validator("rate_limit_redis_url")
    @classmethod
    def _check_rate_limit_url(cls, address: str | None) -> str | None:
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
        store = values.get("artifact_store")
        try:
            if isinstance(store, str) and store.startswith("s3://"):
                # Never the directory of a store itself, whose files are no copies.
                copies = make_absolute(values.get("artifact_root") or home) / "artifact-copies"
                values = {**values, "artifact_root": copies}
            elif isinstance(store, str):
                if values.get("artifact_root"):
                    raise ValueError("and POCL_ARTIFACT_ROOT both name a directory: set one of them alone")
                values = {**values, "artifact_root": make_absolute(store), "artifact_store": None}
        except ValueError as error:
            raise ValueError(f"POCL_ARTIFACT_STORE {error}; a bucket is s3://bucket/prefix") from None
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


def _text(secret: SecretStr | None) -> str | None:
    return None if secret is None else secret.get_secret_value()
