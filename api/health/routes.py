"""Probes for supervisors and load balancers; they need no key."""

from typing import Literal

import sqlalchemy as sa
from fastapi import APIRouter

from api.pagination import Resource
from api.problems import problem_responses
from api.sessions import ReadSession
from domain.errors import Unavailable

router = APIRouter(tags=["health"])


class Health(Resource):
    """The answer of a probe."""

    status: Literal["ok"] = "ok"
    """Always `ok`: a failing probe answers with a problem."""


@router.get("/healthz", summary="Is the process alive")
async def check_alive() -> Health:
    """Answers as long as the process does; it needs nothing else."""
    return Health()


@router.get("/readyz", summary="Can requests be served", responses=problem_responses(Unavailable))
def check_ready(session: ReadSession) -> Health:
    """Answers `ok` while the database answers."""
    session.execute(sa.select(1))
    return Health()
