"""Probes for supervisors and load balancers; they need no key."""

from typing import Literal

from fastapi import APIRouter

from api.dependencies import DatabaseDep, SettingsDep
from api.pagination import Resource
from api.problems import DATABASE_PROBLEMS
from api.sessions import TransactionSlot
from domain.schema import check_ready as check_database_ready
from domain.workers.models import WakeUp
from domain.workers.repository import wake_up_state

router = APIRouter(tags=["health"])


class Health(Resource):
    """The answer of a probe."""

    status: Literal["ok"] = "ok"
    """Always `ok`: a failing probe answers with a problem."""


@router.get("/healthz", summary="Is the process alive")
async def check_alive() -> Health:
    """Answers as long as the process does; it needs nothing else."""
    return Health()


class Readiness(Health):
    """The answer of the probe of readiness."""

    wake_up: WakeUp
    """Whether workers are woken for queued jobs. `no_scheduler`: none has shown its liveness for as long as a lease
    lasts; `broker_unreachable`: no scheduler reaches the broker. Requests are served all the same, and jobs wait."""


@router.get("/readyz", summary="Can requests be served", responses=DATABASE_PROBLEMS)
def check_ready(database: DatabaseDep, settings: SettingsDep, _slot: TransactionSlot) -> Readiness:
    """Answers `ok` while the database takes writes and has the schema of this version, and says whether queued jobs are
    started."""
    check_database_ready(database)
    with database.transaction(write=False) as session:
        return Readiness(wake_up=wake_up_state(session, settings.lease_seconds))
