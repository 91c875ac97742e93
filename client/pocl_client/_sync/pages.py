"""Lists, page by page."""

from collections.abc import Iterator, Mapping
from typing import Any, Final, TypeVar

from pydantic import BaseModel, ConfigDict

from pocl_client._sync.transport import Transport

M = TypeVar("M", bound=BaseModel)
_PAGE_SIZE: Final = 100


class _Page(BaseModel):
    model_config = ConfigDict(extra="ignore")

    data: list[Any]
    has_more: bool = False
    last_id: str | int | None = None


def iterate(
    transport: Transport,
    path: str,
    kind: type[M],
    params: Mapping[str, Any] | None = None,
    *,
    limit: int | None = None,
) -> Iterator[M]:
    """All items of a list, each page read when it is needed.

    Args:
        limit: how many items at most; null for all.
    """
    after: str | int | None = (params or {}).get("after")
    remaining = limit
    while remaining is None or remaining > 0:
        size = _PAGE_SIZE if remaining is None else min(_PAGE_SIZE, remaining)
        response = transport.send("GET", path, params={**(params or {}), "limit": size, "after": after})
        page = response.model(_Page)
        for item in page.data:
            yield kind.model_validate(item)
        if not page.has_more or page.last_id is None or page.last_id == after:
            return
        after = page.last_id
        if remaining is not None:
            remaining -= len(page.data)
