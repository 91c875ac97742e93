"""What is pushed to the Hub, and what comes of it: the words between a scheduler and the process that pushes."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from pocl.storage.manifest import ManifestFile


@dataclass(frozen=True)
class Push:
    """A directory of files that are to be what a branch of a repository has."""

    repo: str
    branch: str
    private: bool
    """Whether the repository must not be public."""
    directory: Path
    files: Sequence[ManifestFile]
    title: str
    """The first line of the commit's message."""

    def as_json(self) -> dict[str, Any]:
        """The fields as JSON can hold them."""
        files = [file.model_dump() for file in self.files]
        return {**asdict(self), "directory": str(self.directory), "files": files}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Self:
        """Read what :meth:`as_json` gave."""
        files = [ManifestFile.model_validate(file) for file in stored["files"]]
        return cls(**{**stored, "directory": Path(stored["directory"]), "files": files})


@dataclass(frozen=True)
class Pushed:
    """The branch has the files."""

    commit: str
    url: str
    """Where people see the repository."""
    is_new: bool = True
    """Whether this attempt made the commit; false where the branch had the files already."""


class CannotPush(Exception):
    """The branch does not have the files.

    Args:
        code: a stable name of the reason, for programs.
        message: one sentence for people, without addresses.
        is_final: whether another attempt would end the same way.
        retry_after: seconds for which the Hub asked to be left alone.
    """

    def __init__(self, code: str, message: str, *, is_final: bool = False, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.is_final = is_final
        self.retry_after = retry_after
