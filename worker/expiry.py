"""Deletes what retention policies say has expired, in bounded turns, on one scheduler at a time.

Rows go first, each job in transactions of its own, and files after them: see :mod:`worker.garbage`.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import sqlalchemy as sa
import structlog

from domain.artifacts import ArtifactStore
from domain.datasets.models import Dataset
from domain.db import Database, db_now
from domain.errors import DatasetNotFound
from domain.jobs import expiry
from domain.jobs.dataset_deletion import DatasetIsNeeded, delete_dataset
from domain.jobs.expiry import ExpiredJob
from domain.retention.models import RetentionPolicy
from domain.retention.repository import list_policies
from domain.workers.repository import take_duty

_log = structlog.get_logger(__name__)

_DUTY: Final = "expiry"
_LEASE_SECONDS: Final = 600
_TURN_SECONDS: Final = 20.0
"""A turn begins no further job after so long: the next one goes on there."""
_PAGE: Final = 200
_DATASET_PAGE: Final = 5
"""Data sets are few, and to find out whether one is used reads the jobs of its project."""


@dataclass
class ExpiryCollector:
    """Goes through ended jobs and data sets, and remembers how far it came."""

    database: Database
    store: ArtifactStore
    scheduler: str
    """The name of this process, unique among the schedulers."""
    clock: Callable[[], float] = time.monotonic
    _last_job: str = ""
    _last_dataset: dict[str, str] = field(default_factory=dict)

    def turn(self) -> int:
        """Delete what has expired, for a bounded time; the number of jobs, parts of jobs and data sets deleted. Does
        nothing while another scheduler has the lease.
        """
        with self.database.transaction(write=True) as session:
            if not take_duty(session, _DUTY, self.scheduler, seconds=_LEASE_SECONDS):
                return 0
            policies = list_policies(session)
        until = self.clock() + _TURN_SECONDS
        deleted = self._delete_of_jobs(policies, until)
        for project, policy in policies.items():
            deleted += self._delete_datasets(project, policy, until)
        if deleted:
            _log.info("expired", deleted=deleted)
        return deleted

    def _delete_of_jobs(self, policies: dict[str, RetentionPolicy], until: float) -> int:
        deleted = 0
        while self.clock() < until:
            with self.database.transaction(write=False) as session:
                now = session.scalars(sa.select(db_now())).one()
                jobs = expiry.list_ended_jobs(session, policies, after=self._last_job, limit=_PAGE)
                page = [(job.id, policies.get(job.project, RetentionPolicy()), job) for job in jobs]
                found = {job_id: expiry.find_expired(session, job, policy, now) for job_id, policy, job in page}
            for job_id, policy, _ in page:
                if self.clock() >= until:
                    return deleted
                expired = found[job_id]
                if expired is not None:
                    self._delete(expired, policy)
                    deleted += 1
                self._last_job = job_id
            if len(page) < _PAGE:
                self._last_job = ""
                return deleted
        return deleted

    def _delete(self, expired: ExpiredJob, policy: RetentionPolicy) -> None:
        if expired.whole:
            with self.database.transaction(write=True) as session:
                key = expiry.delete_expired_job(session, expired.job_id, policy)
            if key is not None:
                # A process that is killed before this leaves a directory that no job names, which is removed too.
                self.store.discard(key)
            return
        if expired.checkpoints:
            with self.database.transaction(write=True) as session:
                expiry.delete_expired_checkpoints(session, expired.job_id, policy)
        is_left = expired.history
        while is_left:
            with self.database.transaction(write=True) as session:
                is_left = expiry.delete_history(session, expired.job_id, policy)

    def _delete_datasets(self, project: str, policy: RetentionPolicy, until: float) -> int:
        if self.clock() >= until:
            return 0
        after = self._last_dataset.get(project, "")
        with self.database.transaction(write=False) as session:
            unused = expiry.list_unused_datasets(session, project, policy, after=after, limit=_DATASET_PAGE)
        self._last_dataset[project] = unused[-1].id if len(unused) == _DATASET_PAGE else ""
        return sum(self._delete_dataset(dataset) for dataset in unused)

    def _delete_dataset(self, dataset: Dataset) -> bool:
        try:
            with self.database.transaction(write=True) as session:
                key = delete_dataset(session, dataset.project, dataset.id)
        except (DatasetIsNeeded, DatasetNotFound):
            # A job was submitted meanwhile, or a client deleted it.
            return False
        self.store.discard(key)
        return True
