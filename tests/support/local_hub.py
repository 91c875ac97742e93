"""A Hub of directories, whose branches move as those of the Hub do."""

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub.errors import RevisionNotFoundError

from pocl.models.hub import RepoType


class LocalHub:
    """Repositories below a directory; each commit is a directory of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.branches: dict[tuple[RepoType, str, str], str] = {}

    def publish(self, repo: str, files: Path, repo_type: RepoType = "model") -> str:
        """Make a copy of `files` the newest commit of `main`; the commit."""
        digest = hashlib.sha256()
        for path in sorted(files.rglob("*")):
            if path.is_file():
                digest.update(path.relative_to(files).as_posix().encode() + path.read_bytes())
        commit = digest.hexdigest()[:40]
        shutil.copytree(files, self.directory(repo, commit, repo_type), dirs_exist_ok=True)
        self.branches[repo_type, repo, "main"] = commit
        return commit

    def directory(self, repo: str, commit: str, repo_type: RepoType = "model") -> Path:
        """Where the files of a commit are."""
        return self.root / f"{repo_type}s" / repo / commit

    def snapshot(
        self,
        repo: str,
        revision: str,
        patterns: Sequence[str],  # noqa: ARG002 # All files are here.
        *,
        repo_type: RepoType = "model",
    ) -> Path:
        """As of :class:`~pocl.models.hub.HubClient`."""
        directory = self.directory(repo, self.branches.get((repo_type, repo, revision), revision), repo_type)
        if not directory.is_dir():
            # Its initialiser wants the answer of a server.
            raise RevisionNotFoundError.__new__(RevisionNotFoundError)
        return directory
