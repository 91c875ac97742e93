"""Models on the Hugging Face Hub, pinned to a commit and inspected before their weights are fetched."""

import errno
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, Protocol

import httpx2
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    DryRunError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.tqdm import tqdm

from pocl.callbacks import OnProgress
from pocl.errors import (
    DiskFull,
    EngineFailure,
    FieldError,
    HubCacheFull,
    InputsChanged,
    ModelNotFound,
    SpecInvalid,
    is_disk_full,
)
from pocl.inspect import read_supported_configs
from pocl.models.hub_cache import HubCache
from pocl.spec import HubModel
from pocl.spec.hub_allowlist import REPOSITORY_NOT_ALLOWED, allows_repository, refusal

# The card states the licence.
_DESCRIPTION = ("*.json", "*.jinja", "*.txt", "tokenizer.model", "README.md")
# Some repositories hold the weights a second time under other names.
_WEIGHTS = ("model.safetensors", "model-*.safetensors")
_REPORT_SECONDS: Final = 1.0
_UNWRITABLE: Final = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)
"""What the file system says of a directory that this user, or nobody, may write."""

HUB_UNREACHABLE: Final = (OSError, httpx2.HTTPError)
"""The errors of a Hub, or of a proxy on the way to it, that does not answer as it should."""

RepoType = Literal["model", "dataset"]


class HubClient(Protocol):
    """The one call to the Hub that fetching a model or a data set needs."""

    def snapshot(self, repo: str, revision: str, patterns: Sequence[str], *, repo_type: RepoType = "model") -> Path:
        """A directory, named as the commit that `revision` means, with the files that match `patterns`."""
        ...


@dataclass(frozen=True)
class HubPolicy:
    """What a run may take from the Hub, and how its cache is kept."""

    allowed: Sequence[str] | None = None
    """Patterns of the repositories that may be read, see :mod:`pocl.spec.hub_allowlist`; None: all."""
    max_cache_bytes: int | None = None
    """The bound of the cache, see :class:`~pocl.models.hub_cache.HubCache`; None leaves it alone."""
    on_progress: OnProgress | None = None
    """Is told the bytes that are there, and those of all files, about once a second while files are fetched."""


_NO_POLICY: Final = HubPolicy()
_policy: ContextVar[HubPolicy] = ContextVar("hub_policy")


def current_policy() -> HubPolicy:
    """The policy that holds now: that of the innermost :func:`hub_policy`."""
    return _policy.get(_NO_POLICY)


@contextmanager
def hub_policy(policy: HubPolicy) -> Iterator[None]:
    """While the block runs, :class:`HuggingFaceHub` keeps to this policy."""
    token = _policy.set(policy)
    try:
        yield
    finally:
        _policy.reset(token)


@dataclass(frozen=True)
class HuggingFaceHub:
    """The Hub itself, and its local cache where the Hub cannot be reached."""

    cache: Path | None = None
    """Where files are cached; None for the library's own directory."""
    offline: bool = False

    def snapshot(self, repo: str, revision: str, patterns: Sequence[str], *, repo_type: RepoType = "model") -> Path:
        """As :meth:`HubClient.snapshot`, by the policy of :func:`hub_policy`.

        Raises:
            SpecInvalid: the repository is not one of those that may be read.
            HubCacheFull: the files do not fit within the bound of the cache.
            EngineFailure: the proxies that the environment names cannot be used.
        """
        policy = current_policy()
        if not allows_repository(policy.allowed, repo):
            raise SpecInvalid([FieldError("", REPOSITORY_NOT_ALLOWED, refusal(policy.allowed or (), repo))])

        if not (self.offline or constants.HF_HUB_OFFLINE):
            _check_proxies()

        def download(**options: Any) -> Any:  # Any: the type that the library returns depends on an option.
            return snapshot_download(
                repo,
                revision=revision,
                repo_type=repo_type,
                allow_patterns=list(patterns),
                cache_dir=self.cache,
                local_files_only=self.offline,
                **options,
            )

        if policy.max_cache_bytes is not None:
            cache = HubCache(self.cache or Path(constants.HF_HUB_CACHE), policy.max_cache_bytes)
            cache.hold(repo, repo_type)
            needed = 0 if self.offline else _bytes_to_fetch(download)
            if not cache.make_room(needed) and needed:
                raise HubCacheFull(
                    f"{needed} bytes of {repo} are to be fetched, and the cache of the Hub, which may hold "
                    f"{cache.max_bytes} bytes, has no room for them."
                )
        report = policy.on_progress
        return Path(download() if report is None else download(tqdm_class=_reporting_bar(report)))


def _check_proxies() -> None:
    """
    Raises:
        EngineFailure: the client cannot use the proxies that the environment names, of which it says so in errors of
            many types. None of them is repeated: an address may hold a password.
    """
    try:
        # It opens no connection and reads no certificates.
        httpx2.Client(verify=False).close()
    except (ImportError, ValueError, httpx2.InvalidURL):
        raise EngineFailure(
            "The proxies of the worker cannot be used: HTTPS_PROXY, HTTP_PROXY and ALL_PROXY take addresses with "
            "http://, with https://, and with socks5:// where the package socksio is installed beside the service."
        ) from None


def _bytes_to_fetch(download: Callable[..., Any]) -> int:
    """The bytes of the files that are not in the cache yet; 0 where the Hub cannot be asked."""
    try:
        files = download(dry_run=True)
    except (DryRunError, OfflineModeIsEnabled, *HUB_UNREACHABLE):
        # The download itself says what is wrong, or finds all files in the cache.
        return 0
    return sum(file.file_size or 0 for file in files if file.will_download)


def _reporting_bar(report: OnProgress) -> type[tqdm]:
    """A progress bar for `snapshot_download` that reports the bytes that are there, and draws nothing."""
    reported_at = time.monotonic() - _REPORT_SECONDS

    class ReportingBar(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            self._counts_bytes = options.get("unit") == "B"
            self._done = int(options.get("initial") or 0)
            super().__init__(*args, **{**options, "disable": True})  # type: ignore[no-untyped-call] # tqdm ships no types.

        def update(self, n: float | None = 1) -> None:
            nonlocal reported_at
            self._done += int(n or 0)
            if self._counts_bytes and time.monotonic() - reported_at >= _REPORT_SECONDS:
                reported_at = time.monotonic()
                report(self._done, max(self._done, int(self.total or 0)))

    return ReportingBar


@dataclass(frozen=True)
class PinnedHub:
    """A Hub on which branches stay at the commits that a run began with, wherever they have moved since.

    A branch that has no commit yet is resolved once: whatever else is read of it is read at the same commit.
    """

    hub: HubClient
    commits: dict[str, str]
    """The commits, by :func:`revision_key`; those of branches that are resolved are added."""

    def snapshot(self, repo: str, revision: str, patterns: Sequence[str], *, repo_type: RepoType = "model") -> Path:
        """As :meth:`HubClient.snapshot`.

        Raises:
            InputsChanged: the Hub has the commit no more.
        """
        key = revision_key(repo, revision, repo_type)
        commit = self.commits.get(key)
        if commit is None:
            directory = self.hub.snapshot(repo, revision, patterns, repo_type=repo_type)
            if directory.name != revision:
                self.commits[key] = directory.name
            return directory
        try:
            return self.hub.snapshot(repo, commit, patterns, repo_type=repo_type)
        except RevisionNotFoundError as error:
            message = f"The run began with {repo} at commit {commit[:12]}, which the Hub has no more."
            raise InputsChanged(message) from error


def revision_key(repo: str, revision: str, repo_type: RepoType = "model") -> str:
    """The key of a revision among pinned commits: `owner/name@main`, `datasets/owner/name@main`."""
    return f"{'datasets/' if repo_type == 'dataset' else ''}{repo}@{revision}"


def hub_failure(repo: str, error: Exception) -> EngineFailure:
    """What is told of a repository that could not be fetched; the error itself may name a proxy with its password."""
    if isinstance(error, OSError) and error.errno in _UNWRITABLE:
        return EngineFailure(
            f"{repo} could not be fetched, since the cache of the Hub on this worker cannot be written: see HF_HOME, "
            "or HOME where it is not set."
        )
    way = "the proxy refused" if isinstance(error, httpx2.ProxyError) else "the Hub did not answer"
    return EngineFailure(
        f"{repo} could not be fetched from the Hub ({way}): try again later, or check HF_ENDPOINT, proxies and "
        "certificates of the worker."
    )


def fetch(ref: HubModel, hub: HubClient) -> tuple[str, Path]:
    """The commit that the revision names now, and a directory with the model at that commit.

    Raises:
        ModelNotFound: there is no such repository or revision, or it is gated.
        ModelUnsupported: its config asks for remote code or is of no causal language model.
        DiskFull, HubCacheFull: the weights do not fit.
        EngineFailure: the Hub cannot be reached, and the model is not in its cache.
        InputsChanged: the commit that a run is pinned to is gone.
    """
    try:
        directory = hub.snapshot(ref.repo, ref.revision, _DESCRIPTION)
        read_supported_configs(directory)
        commit = directory.name
        # The weights are fetched by commit, since the branch may have moved.
        return commit, hub.snapshot(ref.repo, commit, (*_DESCRIPTION, *_WEIGHTS))
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise ModelNotFound(
            f"The Hub has no {ref.repo} at {ref.revision} that this machine may read; a gated model needs a token."
        ) from error
    except HUB_UNREACHABLE as error:
        if is_disk_full(error):
            raise DiskFull() from error
        raise hub_failure(ref.repo, error) from error
