"""Queries for data sets. No function commits."""

from collections.abc import Collection
from functools import cache
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from domain.datasets.models import Dataset
from domain.db import KeysetPage, fetch_page
from domain.errors import Conflict, DatasetNotFound
from domain.ids import new_id
from pocl.samples.stored import STORED
from pocl.spec import DataRef


class DatasetNotReady(Conflict):
    """The file of the data set is still being read: name it once its `status` is `ready`."""

    code = "dataset_not_ready"


class DatasetRefused(DatasetNotReady):
    """The file of the data set was refused, as its `refusal` says: correct the file, and upload it again."""

    code = "dataset_refused"


def add_dataset(
    session: Session,
    *,
    project: str,
    name: str,
    rows: int,
    size_bytes: int,
    sha256: str,
    store_key: str,
    dataset_id: str | None = None,
    prompts: int = 0,
    ingestion: dict[str, Any] | None = None,
) -> Dataset:
    """Add the row of a data set whose file is in the artifact store.

    Args:
        dataset_id: the id that the file's key already contains; null for a new one.
        prompts: how many of the rows have no answer.
        ingestion: how the uploaded file was read; null where the file is stored as it was uploaded.
    """
    dataset = Dataset(
        id=dataset_id or new_id("ds"),
        project=project,
        name=name,
        rows=rows,
        prompts=prompts,
        ingestion=ingestion,
        size_bytes=size_bytes,
        sha256=sha256,
        store_key=store_key,
    )
    session.add(dataset)
    session.flush()
    return dataset


def require_ready(dataset: Dataset) -> Dataset:
    """The data set, if its samples can be used.

    Raises:
        DatasetNotReady: they are not there yet, or never will be.
    """
    if dataset.status == "refused":
        raise DatasetRefused
    if dataset.status != "ready":
        raise DatasetNotReady
    return dataset


def get_dataset(session: Session, project: str, dataset_id: str) -> Dataset:
    """A data set of the project.

    Raises:
        DatasetNotFound: the project has no such data set.
    """
    return _one(session, _by_id(project, dataset_id))


def get_dataset_for_share(session: Session, project: str, dataset_id: str) -> Dataset:
    """Like :func:`get_dataset`, with a shared row lock: nobody can delete it until the transaction ends.

    Raises:
        DatasetNotFound: the project has no such data set.
    """
    return _one(session, _by_id(project, dataset_id).with_for_update(read=True))


def share_datasets(session: Session, project: str, dataset_ids: Collection[str]) -> int:
    """Take shared row locks on data sets of the project that can be used, as :func:`get_dataset_for_share` does.

    Returns:
        how many of them there are.
    """
    statement = _share_statement()
    rows = session.execute(statement, {"project": project, "dataset_ids": sorted(dataset_ids)})
    return sum(row.status == "ready" for row in rows)


@cache
def _share_statement() -> sa.Select[str, str]:
    """The statement with the parameters `project` and `dataset_ids`: each submission executes it."""
    is_named = Dataset.id.in_(sa.bindparam("dataset_ids", expanding=True))
    statement = sa.select(Dataset.id, Dataset.status).where(is_named, Dataset.project == sa.bindparam("project"))
    return statement.order_by(Dataset.id).with_for_update(read=True)


def lock_dataset(session: Session, project: str, dataset_id: str) -> Dataset:
    """Like :func:`get_dataset`, with a row lock: no new job can refer to it until the transaction ends.

    Raises:
        DatasetNotFound: the project has no such data set.
    """
    return _one(session, _by_id(project, dataset_id).with_for_update())


def stored_reference(dataset: Dataset, path: Path) -> DataRef:
    """How the engine reads a data set whose file is at `path`."""
    # What was uploaded before files were read at once is stored as it was sent.
    options = {} if dataset.ingestion is None else STORED.model_dump()
    return DataRef(path=str(path), **options)


def list_datasets(session: Session, project: str, *, limit: int, after: str | None = None) -> KeysetPage[Dataset]:
    """The project's data sets, newest first, after the one with the id `after`."""
    statement = sa.select(Dataset).where(Dataset.project == project).order_by(Dataset.id.desc())
    if after is not None:
        statement = statement.where(Dataset.id < after)
    return fetch_page(session, statement, limit=limit)


def _by_id(project: str, dataset_id: str) -> sa.Select[Dataset]:
    return sa.select(Dataset).where(Dataset.id == dataset_id, Dataset.project == project)


def _one(session: Session, statement: sa.Select[Dataset]) -> Dataset:
    dataset = session.scalars(statement).one_or_none()
    if dataset is None:
        raise DatasetNotFound
    return dataset
