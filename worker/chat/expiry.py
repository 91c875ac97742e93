"""Ends chat requests that nobody answers, and deletes those that have ended, under the leader's lease."""

from dataclasses import dataclass

import structlog

from domain.chat.repository import delete_ended, expire
from domain.db import Database

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class ChatExpiry:
    """Looks for requests whose time has come."""

    database: Database
    worker_seconds: float
    """A worker that has been silent for longer does not count."""
    kept_seconds: float
    """How long a request is kept after its end."""

    def look(self) -> int:
        """Fail requests that no worker claimed in time or whose worker is lost, and delete old ones; the number of
        both.
        """
        with self.database.transaction(write=True) as session:
            failed = expire(session, worker_seconds=self.worker_seconds)
            deleted = delete_ended(session, older_than_seconds=self.kept_seconds)
        for chat_id in failed:
            _log.warning("chat_expired", chat_id=chat_id)
        return len(failed) + deleted
