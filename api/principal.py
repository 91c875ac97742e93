"""The sender of a request, as its key names it."""

from dataclasses import dataclass
from typing import Final

from domain.keys.models import Scope
from domain.projects.models import DEFAULT_PROJECT

SAFE_METHODS: Final = frozenset({"GET", "HEAD", "OPTIONS"})
"""The methods for which the scope `read` is enough; all others need `submit`, unless a route needs `admin`."""


@dataclass(frozen=True)
class Principal:
    """Who sent a request, and what the sender may do."""

    project: str
    """The project of the sender, who sees no rows of others."""
    scopes: frozenset[Scope]
    """What the sender may do; a scope stands here with those that it includes."""
    key_id: str
    """Names the key of the sender in logs: `static` for that of the settings, `local` for that of the first start."""

    @property
    def administers_all(self) -> bool:
        """Whether the sender administers the projects and keys of the whole service."""
        return self.project == DEFAULT_PROJECT and "admin" in self.scopes
