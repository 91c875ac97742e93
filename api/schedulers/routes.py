"""Schedulers over HTTP: their liveness, and which of them leads."""

from datetime import datetime
from typing import Annotated, Literal

from fastapi import APIRouter, Query
from pydantic import AliasChoices, Field

from api.auth import Caller
from api.pagination import Limit, Page, Resource
from api.problems import COMMON_PROBLEMS
from api.sessions import ReadSession
from domain.workers import repository

router = APIRouter(prefix="/schedulers", tags=["workers"], responses=COMMON_PROBLEMS)

AfterName = Annotated[
    str | None,
    Query(
        pattern=r"^[A-Za-z0-9._@-]{1,200}$",
        description="The name after whose scheduler the page begins: `last_id` of the previous page.",
    ),
]


class SchedulerView(Resource):
    """A scheduler."""

    id: str = Field(validation_alias=AliasChoices("id", "name"))
    """The name of the scheduler; one that starts again has another."""
    object: Literal["scheduler"] = "scheduler"
    """The kind of the resource."""
    leads: bool
    """Whether it does what is due; the others wait to take its place."""
    reaches_broker: bool
    """Whether the broker answered at its last heartbeat."""
    version: str | None
    """The version of the service that the scheduler runs; null for one that does not tell."""
    generation: int | None
    """The generation of that version (`/version`)."""
    seen_at: datetime
    """The time of its last heartbeat; one that ended is listed for a day."""


class SchedulerPage(Page[SchedulerView, str]):
    """Schedulers, by name."""


@router.get("", summary="List the schedulers")
def list_schedulers(session: ReadSession, _caller: Caller, limit: Limit = 20, after: AfterName = None) -> SchedulerPage:
    """Each scheduler, and which of them leads."""
    page = repository.list_schedulers(session, limit=limit, after=after)
    return SchedulerPage.from_rows(page, SchedulerView.model_validate, lambda row: row.name)
