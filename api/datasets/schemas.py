"""Data sets as the API shows them."""

from datetime import datetime
from typing import Literal, Self

from api.pagination import Page, Resource
from domain.datasets.models import Dataset


class DatasetView(Resource):
    """An uploaded data set. It never changes."""

    id: str
    object: Literal["dataset"] = "dataset"
    name: str
    rows: int
    """Samples in it; blank lines are none."""
    size_bytes: int
    sha256: str
    """Of the file, hexadecimal."""
    created_at: datetime

    @classmethod
    def of(cls, row: Dataset) -> Self:
        return cls(
            id=row.id,
            name=row.name,
            rows=row.rows,
            size_bytes=row.size_bytes,
            sha256=row.sha256,
            created_at=row.created_at,
        )


class DatasetPage(Page[DatasetView, str]):
    """Data sets, newest first."""
