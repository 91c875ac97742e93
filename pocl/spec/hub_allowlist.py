"""Which repositories of the Hugging Face Hub a service lets its jobs read: checked at submission and by the engine."""

import fnmatch
from collections.abc import Sequence
from typing import Final

REPOSITORY_NOT_ALLOWED: Final = "hub_repository_not_allowed"


def allows_repository(patterns: Sequence[str] | None, repo: str) -> bool:
    """Whether `owner/name` matches one of the patterns, such as `meta-llama/*`; letter case counts for nothing.

    Args:
        patterns: as of a shell; None allows every repository.
    """
    # The Hub itself tells names that differ in letter case alone apart nowhere.
    return patterns is None or any(fnmatch.fnmatchcase(repo.lower(), pattern.lower()) for pattern in patterns)


def refusal(patterns: Sequence[str], repo: str) -> str:
    """The sentence for a repository that no pattern allows."""
    if not patterns:
        return f"{repo} is not read: this service takes nothing from the Hub; upload data, or name a model by its path"
    return f"{repo} is not read: this service takes from the Hub only {', '.join(patterns)}"
