"""Names on the Hugging Face Hub, none of which can lead out of the cache that their files are kept in.

The cache has a directory for each repository and a file for each revision, so a name is also a path. The rules are
those of the Hub for repositories, and of `git check-ref-format` for revisions.
"""

import re
from typing import Annotated, TypeAlias

from pydantic import AfterValidator, Field


def _check_repository(repo: str) -> str:
    for part in repo.split("/"):
        if "--" in part or ".." in part or part[-1] in "-." or part.endswith(".git"):
            raise ValueError("no part of a repository's name has '--' or '..', nor ends in '-', '.' or '.git'")
    return repo


def _check_revision(revision: str) -> str:
    if ".." in revision or any(part.endswith((".", ".lock")) for part in revision.split("/")):
        raise ValueError("no part of a revision has '..', nor ends in '.' or '.lock'")
    return revision


def _check_branch(branch: str) -> str:
    if branch.startswith("refs/") or re.fullmatch(r"[0-9a-f]{40}", branch):
        raise ValueError("a branch is named by itself: neither by `refs/...` nor by a commit")
    return branch


def _check_file(file: str) -> str:
    parts = re.split(r"[/\\]", file)
    if not file.isprintable() or "\\" in file or any(part in ("", ".", "..") for part in parts) or ":" in parts[0]:
        raise ValueError("files are named within the repository")
    return file


RepositoryName: TypeAlias = Annotated[
    str, Field(pattern=r"^[\w-][\w.-]{0,95}/[\w-][\w.-]{0,95}$"), AfterValidator(_check_repository)
]
"""A repository, as `owner/name`."""
Revision: TypeAlias = Annotated[
    # No part begins with a dot, and none is empty.
    str, Field(pattern=r"^[\w-][\w.-]*(/[\w-][\w.-]*)*$", max_length=128), AfterValidator(_check_revision)
]
"""A branch, tag or commit of a repository."""
BranchName: TypeAlias = Annotated[Revision, AfterValidator(_check_branch)]
"""A branch of a repository."""
RepositoryFile: TypeAlias = Annotated[str, Field(min_length=1, max_length=256), AfterValidator(_check_file)]
"""The path of a file within a repository, or a pattern of such paths."""
