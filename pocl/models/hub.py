"""Models on the Hugging Face Hub, pinned to a commit and inspected before their weights are fetched."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

from pocl.errors import DiskFull, EngineFailure, InputsChanged, ModelNotFound, is_disk_full
from pocl.inspect import read_supported_configs
from pocl.spec import HubModel

# The card states the licence.
_DESCRIPTION = ("*.json", "*.jinja", "*.txt", "tokenizer.model", "README.md")
# Some repositories hold the weights a second time under other names.
_WEIGHTS = ("model.safetensors", "model-*.safetensors")


RepoType = Literal["model", "dataset"]


class HubClient(Protocol):
    """The one call to the Hub that fetching a model or a data set needs."""

    def snapshot(self, repo: str, revision: str, patterns: Sequence[str], *, repo_type: RepoType = "model") -> Path:
        """A directory, named as the commit that `revision` means, with the files that match `patterns`."""
        ...


@dataclass(frozen=True)
class HuggingFaceHub:
    """The Hub itself, and its local cache where the Hub cannot be reached."""

    cache: Path | None = None
    """Where files are cached; None for the library's own directory."""
    offline: bool = False

    def snapshot(self, repo: str, revision: str, patterns: Sequence[str], *, repo_type: RepoType = "model") -> Path:
        directory = snapshot_download(
            repo,
            revision=revision,
            repo_type=repo_type,
            allow_patterns=list(patterns),
            cache_dir=self.cache,
            local_files_only=self.offline,
        )
        return Path(directory)


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


def fetch(ref: HubModel, hub: HubClient) -> tuple[str, Path]:
    """The commit that the revision names now, and a directory with the model at that commit.

    Raises:
        ModelNotFound: there is no such repository or revision, or it is gated.
        ModelUnsupported: its config asks for remote code or is of no causal language model.
        DiskFull: the weights do not fit.
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
    except OSError as error:
        if is_disk_full(error):
            raise DiskFull() from error
        raise EngineFailure(f"{ref.repo} could not be fetched from the Hub; try again later.") from error
