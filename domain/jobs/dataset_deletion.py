"""Deletion of data sets that no job needs."""

from typing import Final

from sqlalchemy.orm import Session

from domain.datasets.repository import lock_dataset
from domain.errors import Conflict
from domain.jobs.repository import list_live_jobs_of_dataset

_MAX_NAMED: Final = 10


class DatasetIsNeeded(Conflict):
    """Jobs that have not ended need the data set: wait for them, or cancel them."""

    code = "dataset_is_needed"


def delete_dataset(session: Session, project: str, dataset_id: str) -> str:
    """Delete a data set that no job which has not ended needs.

    Returns:
        the store key whose file may be removed after the commit. Where nobody does, the scheduler removes it.

    Raises:
        DatasetNotFound: the project has no such data set.
        DatasetIsNeeded: naming the jobs.
    """
    # The lock keeps new jobs from referring to it until the transaction ends.
    dataset = lock_dataset(session, project, dataset_id)
    jobs = list_live_jobs_of_dataset(session, project, dataset_id)
    if jobs:
        listed = ", ".join(jobs[:_MAX_NAMED]) + (
            f" and {len(jobs) - _MAX_NAMED} more" if len(jobs) > _MAX_NAMED else ""
        )
        raise DatasetIsNeeded(f"Jobs that have not ended need the data set: {listed}. Wait for them, or cancel them.")
    session.delete(dataset)
    session.flush()
    return dataset.store_key
