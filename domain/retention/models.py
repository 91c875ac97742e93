"""The retention policy of a project, as a value and as its row."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Final

from sqlalchemy import String
from sqlalchemy.orm import Mapped, mapped_column

from domain.db import Base, JsonType, UtcDateTime, db_now

MAX_DAYS: Final = 36_500
MAX_KEPT: Final = 1000


@dataclass(frozen=True)
class RetentionPolicy:
    """What is deleted when. Days count from the end of a job, those of a data set from its last use; null: never."""

    checkpoint_days: int | None = None
    """After so many days the checkpoints of an ended job are deleted, apart from pinned and needed ones and those that
    `keep_last` and `keep_best` name."""
    keep_last: int = 1
    """How many of its last checkpoints a job keeps: the student first, then the newest training states."""
    keep_best: bool = True
    """Whether a job keeps its best student."""
    history_days: int | None = None
    """After so many days the events, metrics and logs of an ended job are deleted, but for its changes of state."""
    job_days: int | None = None
    """After so many days an ended job is deleted with all that it made."""
    dataset_days: int | None = None
    """After so many days a data set is deleted that no job has named meanwhile."""

    def for_job(self, own: Mapping[str, Any] | None) -> "RetentionPolicy":
        """The policy of a job that has fields of its own, which take the place of the project's."""
        return replace(self, **own) if own else self

    @property
    def deletes_of_jobs(self) -> bool:
        """Whether anything that belongs to a job is ever deleted."""
        return any(days is not None for days in (self.checkpoint_days, self.history_days, self.job_days))


class ProjectRetention(Base):
    """The retention policy of a project; a project without a row keeps everything."""

    __tablename__ = "retention_policies"

    project: Mapped[str] = mapped_column(String(64), primary_key=True)
    policy: Mapped[dict[str, Any]] = mapped_column(JsonType)
    """The fields of :class:`RetentionPolicy`."""
    updated_at: Mapped[datetime] = mapped_column(UtcDateTime, default=db_now())
