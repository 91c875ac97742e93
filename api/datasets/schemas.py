"""Data sets as the API shows them."""

from datetime import datetime
from typing import Literal

from api.pagination import Page, Resource


class DatasetView(Resource):
    """An uploaded data set. It never changes."""

    id: str
    """The id by which a job's specification names the data set."""
    object: Literal["dataset"] = "dataset"
    """The kind of the resource."""
    name: str
    """The name that people call the data set."""
    rows: int
    """The number of samples in the file; blank lines are not counted."""
    size_bytes: int
    """The size of the file in bytes."""
    sha256: str
    """The SHA-256 digest of the file, hexadecimal."""
    created_at: datetime
    """When the upload was complete."""


class DatasetPage(Page[DatasetView, str]):
    """Data sets, newest first."""
