"""Probes for supervisors and load balancers; they need no key."""

from typing import Literal

from fastapi import APIRouter

from api.dependencies import DatabaseDep
from api.pagination import Resource
from api.problems import DATABASE_PROBLEMS
from api.sessions import TransactionSlot
from domain.schema import check_ready as check_database_ready

router = APIRouter(tags=["health"])


class Health(Resource):
    """The answer of a probe."""

    status: Literal["ok"] = "ok"
    """Always `ok`: a failing probe answers with a problem."""


@router.get("/healthz", summary="Is the process alive")
async def check_alive() -> Health:
    """Answers as long as the process does; it needs nothing else."""
    return Health()


@router.get("/readyz", summary="Can requests be served", responses=DATABASE_PROBLEMS)
def check_ready(database: DatabaseDep, _slot: TransactionSlot) -> Health:
    """Answers `ok` while the database takes writes and has the schema of this version."""
    check_database_ready(database)
    return Health()
