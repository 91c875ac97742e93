"""The client of the Hub, `huggingface_hub`: imported by the process that pushes, and by nothing else.

Where the Hub is away or asks to be left alone the client gives up at once, and does not wait by itself: whether and
when there is another attempt is for the scheduler to say, whose rows remember it.
"""

import hashlib
from collections.abc import Iterator
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final

import httpx2
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, set_client_factory
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined] # It is exported when it is used.

from domain.logs import redact_addresses
from pocl.storage.manifest import ManifestFile
from worker.publications.push import CannotPush, Push, Pushed
from worker.retry_after import parse_retry_after

_CONNECT_SECONDS: Final = 10.0
_SILENCE_SECONDS: Final = 60.0
"""A Hub that neither takes nor sends a byte for so long is taken for away."""
_OWN_FILES: Final = frozenset({".gitattributes"})
"""Files that the Hub keeps in a repository by itself."""
_PIECE_BYTES: Final = 2**20
_MAY_PASS: Final = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS)
_BRANCH_CHANGED: Final = CannotPush("branch_changed", "Somebody else changed the branch at the same time.")
_DAMAGED: Final = CannotPush("checkpoint_damaged", "The files of the checkpoint are damaged.", is_final=True)


class _Client(httpx2.Client):
    """Raises what may pass as :class:`CannotPush`, which `huggingface_hub` does not try again by itself."""

    def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
        try:
            response = super().send(request, **options)
        except httpx2.TransportError as error:
            raise CannotPush("hub_unreachable", "The Hub could not be reached, or broke off.") from error
        if response.status_code in _MAY_PASS or response.status_code >= HTTPStatus.INTERNAL_SERVER_ERROR:
            message = f"The Hub answered {response.status_code}."
            raise CannotPush("hub_busy", message, retry_after=_retry_after(response))
        return response


def _retry_after(response: httpx2.Response) -> float | None:
    """Seconds for which the Hub asks to be left alone: by `RateLimit`, which it sends of its own, or `Retry-After`."""
    limit = parse_ratelimit_headers(response.headers)
    if limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    return parse_retry_after(response.headers.get("retry-after", ""), datetime.now(UTC))


def _make_client() -> httpx2.Client:
    try:
        # Its connections are opened later.
        return _Client(follow_redirects=True, timeout=httpx2.Timeout(_SILENCE_SECONDS, connect=_CONNECT_SECONDS))
    except (ImportError, ValueError, httpx2.InvalidURL):
        message = "The proxies of the scheduler cannot be used: see HTTPS_PROXY and ALL_PROXY; SOCKS needs socksio."
        raise CannotPush("hub_unreachable", message) from None


def push(request: Push, token: str) -> Pushed:
    """Make the files of a directory, and no others, what a branch has. Where it has them already, nothing is changed.

    Raises:
        CannotPush: with the reason.
    """
    set_client_factory(_make_client)
    api = HfApi(token=token, library_name="pocl-service")
    try:
        return _push(api, request)
    except Exception as error:
        # Errors of uploads come wrapped, from threads.
        for cause in _causes(error):
            if isinstance(cause, CannotPush):
                raise cause from None
            if isinstance(cause, HfHubHTTPError):
                raise _refusal(cause.response, api.endpoint, request.repo) from error
        raise


def _push(api: HfApi, request: Push) -> Pushed:
    verify_files(request)
    api.create_repo(request.repo, private=request.private, exist_ok=True)
    if request.private and not api.model_info(request.repo).private:
        message = f"{request.repo} is public: set `export.hub.private` to false, or name another repository."
        raise CannotPush("hub_repository_is_public", message, is_final=True)
    if request.branch != "main":
        api.create_branch(request.repo, branch=request.branch, exist_ok=True)
    parent = _head_of(api, request)
    url = redact_addresses(f"{api.endpoint}/{request.repo}")
    if request.branch != "main":
        url = f"{url}/tree/{request.branch}"
    present = _files_of(api, request, parent)
    if _has_exactly(present, request):
        return Pushed(parent, url, is_new=False)
    additions = [
        CommitOperationAdd(path_in_repo=file.path, path_or_fileobj=request.directory / file.path)
        for file in request.files
    ]
    for addition, file in zip(additions, request.files, strict=True):
        # It is verified, and would be read once more.
        addition.upload_info.sha256 = bytes.fromhex(file.sha256)
    wanted = {file.path for file in request.files}
    deletions = [CommitOperationDelete(path_in_repo=path) for path in sorted(present.keys() - wanted)]
    commit = api.create_commit(
        request.repo,
        [*additions, *deletions],
        commit_message=request.title,
        revision=request.branch,
        parent_commit=parent,
    )
    if not _has_exactly(_files_of(api, request, commit.oid), request):
        # Files that a `.gitignore` of the branch names are left out; without it they come with the next attempt.
        raise CannotPush("hub_lacks_files", "The commit does not have all files of the student.")
    return Pushed(commit.oid, url)


def verify_files(request: Push) -> None:
    """Compare the files with the manifest before anything is sent.

    Raises:
        CannotPush: a file is not what the manifest says.
    """
    for file in request.files:
        path = request.directory / file.path
        try:
            if path.is_symlink() or path.stat().st_size != file.size or _digest_of(path, "sha256") != file.sha256:
                raise _DAMAGED
        except FileNotFoundError:
            raise _DAMAGED from None


def _head_of(api: HfApi, request: Push) -> str:
    commit = api.model_info(request.repo, revision=request.branch).sha
    if commit is None:
        raise CannotPush("hub_refused", "The Hub does not say which commit the branch has.")
    return commit


def _files_of(api: HfApi, request: Push, commit: str) -> dict[str, RepoFile]:
    entries = api.list_repo_tree(request.repo, recursive=True, revision=commit)
    return {each.path: each for each in entries if isinstance(each, RepoFile) and each.path not in _OWN_FILES}


def _has_exactly(present: dict[str, RepoFile], request: Push) -> bool:
    if present.keys() != {file.path for file in request.files}:
        return False
    return all(_is_same(present[file.path], file, request.directory) for file in request.files)


def _is_same(present: RepoFile, file: ManifestFile, directory: Path) -> bool:
    if present.size != file.size:
        return False
    if present.lfs is not None:
        return present.lfs.sha256 == file.sha256
    # A blob of Git: its name is a digest of its size and content.
    return present.blob_id == _digest_of(directory / file.path, "sha1", f"blob {file.size}\0".encode())


def _digest_of(path: Path, algorithm: str, start: bytes = b"") -> str:
    digest = hashlib.new(algorithm, start, usedforsecurity=False)
    with path.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _refusal(response: httpx2.Response, endpoint: str, repo: str) -> CannotPush:
    """What an answer of the Hub means that is neither success nor a request to wait."""
    status = response.status_code
    if not str(response.url).startswith(f"{endpoint}/"):
        # Its storage, at an address that was signed for a while: the next attempt gets another one.
        return CannotPush("hub_storage_refused", f"The storage of the Hub refused a file with status {status}.")
    match status:
        case HTTPStatus.UNAUTHORIZED:
            code, message = "hub_token_refused", "The Hub does not accept the token of the service: have it renewed."
        case HTTPStatus.PAYMENT_REQUIRED | HTTPStatus.FORBIDDEN:
            code = "hub_write_refused"
            message = f"The token of the service may not write to {repo}: have it granted, or name another repository."
        case HTTPStatus.NOT_FOUND:
            code, message = "hub_repository_not_found", f"The Hub has no {repo} that the token of the service sees."
        case HTTPStatus.CONFLICT | HTTPStatus.PRECONDITION_FAILED:
            return _BRANCH_CHANGED
        case _:
            code, message = "hub_refused", f"The Hub refused the push with status {status}."
    return CannotPush(code, message, is_final=True)
