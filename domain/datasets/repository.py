"""Queries for data sets. No function commits."""

from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from domain.datasets.models import Dataset
from domain.db import KeysetPage, fetch_page
from domain.errors import DatasetNotFound
from domain.ids import new_id
from pocl.samples.stored import STORED
from pocl.spec import DataRef


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
