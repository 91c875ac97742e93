"""Cursor pages: `limit` and `after` in, `{object, data, has_more, first_id, last_id}` out."""

from collections.abc import Callable
from typing import Annotated, Generic, Literal, Self, TypeVar

from fastapi import Query
from pydantic import BaseModel, ConfigDict

from domain.db import KeysetPage

MAX_LIMIT = 100

Limit = Annotated[int, Query(ge=1, le=MAX_LIMIT, description="Items of one page.")]
After = Annotated[
    str | None,
    # No control characters: PostgreSQL takes no text with U+0000.
    Query(pattern=r"^[0-9a-z_]{1,64}$", description="Go on after the item of this id: `last_id` of the page before."),
]
AfterNumber = Annotated[
    int, Query(ge=0, lt=2**31, description="Go on after the item of this number: `last_id` of the page before.")
]


class Resource(BaseModel):
    """What the API shows of a row."""

    model_config = ConfigDict(use_attribute_docstrings=True)


Id = TypeVar("Id", str, int)
Row = TypeVar("Row")
Item = TypeVar("Item")


class Page(Resource, Generic[Item, Id]):
    """One page of a list, and whether there is another."""

    object: Literal["list"] = "list"
    data: list[Item]
    has_more: bool
    first_id: Id | None
    last_id: Id | None
    """Give it as `after` for the next page."""

    @classmethod
    def of(cls, rows: KeysetPage[Row], show: Callable[[Row], Item], identify: Callable[[Row], Id]) -> Self:
        """The page that shows a slice of rows."""
        ids = [identify(row) for row in rows.rows]
        return cls(
            data=[show(row) for row in rows.rows],
            has_more=rows.has_more,
            first_id=ids[0] if ids else None,
            last_id=ids[-1] if ids else None,
        )
