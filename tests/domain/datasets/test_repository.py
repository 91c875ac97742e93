"""Queries for data sets."""

import pytest

from domain.datasets.repository import get_dataset, list_datasets
from domain.db import Database
from domain.errors import DatasetNotFound
from tests.support.rows import insert_dataset


def test_a_data_set_of_another_project_is_not_found(database: Database) -> None:
    with database.transaction(write=True) as session:
        dataset = insert_dataset(session, project="theirs")
        assert get_dataset(session, "theirs", dataset.id) is dataset
        with pytest.raises(DatasetNotFound):
            get_dataset(session, "default", dataset.id)


def test_lists_are_newest_first_in_pages(database: Database) -> None:
    with database.transaction(write=True) as session:
        added = [insert_dataset(session).id for _ in range(3)]
        insert_dataset(session, project="theirs")
        page = list_datasets(session, "default", limit=2)
        rest = list_datasets(session, "default", limit=2, after=page.rows[-1].id)
    assert [row.id for row in (*page.rows, *rest.rows)] == added[::-1]
    assert (page.has_more, rest.has_more) == (True, False)
