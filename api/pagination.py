"""Cursor pages: `limit` and `after` in, `{object, data, has_more, first_id, last_id}` out."""

from collections.abc import Callable
from typing import Annotated, Generic, Literal, Self, TypeVar

from fastapi import Query
from pydantic import BaseModel, ConfigDict, Field

from domain.db import KeysetPage

MAX_LIMIT = 100

Limit = Annotated[int, Query(ge=1, le=MAX_LIMIT, description="The number of items of a page at most.")]
After = Annotated[
    str | None,
    # No control characters: PostgreSQL takes no text with U+0000.
    Query(
        pattern=r"^[0-9a-z_]{1,64}$",
        description="The id after whose item the page begins: `last_id` of the previous page.",
    ),
]
AfterNumber = Annotated[
    int,
    Query(ge=0, lt=2**31, description="The number after whose item the page begins: `last_id` of the previous page."),
]


class Resource(BaseModel):
    """A view of a row, read from the row's attributes of the same names."""

    model_config = ConfigDict(use_attribute_docstrings=True, from_attributes=True)


Id = TypeVar("Id", str, int)
Row = TypeVar("Row")
Item = TypeVar("Item")


class Page(Resource, Generic[Item, Id]):
    """One page of a list, and whether there is another."""

    # For each class that is made from this one Pydantic would search all frames of the stack for its source.
    model_config = ConfigDict(use_attribute_docstrings=False)

    object: Literal["list"] = Field(default="list", description="The kind of the resource.")
    data: list[Item] = Field(description="The items of the page.")
    has_more: bool = Field(description="Whether there are items after this page.")
    first_id: Id | None = Field(description="The id of the first item; null for an empty page.")
    last_id: Id | None = Field(
        description="The id of the last item, which gets the next page as `after`; null for an empty page."
    )

    @classmethod
    def from_rows(cls, page: KeysetPage[Row], present: Callable[[Row], Item], identify: Callable[[Row], Id]) -> Self:
        """The page that presents a page of rows."""
        ids = [identify(row) for row in page.rows]
        return cls(
            data=[present(row) for row in page.rows],
            has_more=page.has_more,
            first_id=ids[0] if ids else None,
            last_id=ids[-1] if ids else None,
        )
