"""Usage over HTTP."""

import re
from datetime import UTC, date, datetime, timedelta
from typing import Annotated, Final, Literal

from fastapi import APIRouter, Query
from pydantic import BeforeValidator

from api.auth import Caller
from api.dependencies import SettingsDep
from api.pagination import Resource
from api.problems import COMMON_PROBLEMS
from api.sessions import ReadSession
from domain.errors import Unprocessable
from domain.jobs.usage import list_usage, storage_bytes
from pocl.errors import FieldError

router = APIRouter(prefix="/usage", tags=["usage"], responses=COMMON_PROBLEMS)

_MAX_DAYS: Final = 366
_DEFAULT_DAYS: Final = 30
_DAY: Final = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", re.ASCII)


def _require_day(value: object) -> object:
    """Refuse what pydantic takes for a day besides: a number of seconds, or a moment."""
    if isinstance(value, str) and not _DAY.fullmatch(value):
        raise ValueError("write the day as YYYY-MM-DD")
    return value


Day = Annotated[date, BeforeValidator(_require_day)]
Since = Annotated[
    Day | None, Query(description="The first day, in UTC, inclusive; 29 days before the last one unless given.")
]
Until = Annotated[Day | None, Query(description="The last day, in UTC, inclusive; today unless given.")]


class DeviceTimeView(Resource):
    """Time on devices."""

    gpu_seconds: float
    """The seconds on GPUs. Every attempt counts from its claim to its end, however it ended; one that runs counts up to
    now."""
    cpu_seconds: float
    """The seconds of attempts that computed on the CPU of their worker, whatever number of cores that had."""
    other_seconds: float
    """The seconds of attempts from before the service noted on which device an attempt computes."""


class ChatUseView(Resource):
    """What conversations with models took."""

    chat_requests: int
    """The number of conversations that workers answered, also those that failed or were cancelled on the way."""
    chat_prompt_tokens: int
    """The tokens of the conversations that models read."""
    chat_completion_tokens: int
    """The tokens of the answers."""


class DayUsageView(DeviceTimeView, ChatUseView):
    """What the project used on one day."""

    day: date
    """The day, in UTC."""
    jobs: int
    """The number of jobs that computed on the day."""
    attempts: int
    """The number of attempts that computed on the day."""
    storage_bytes: int | None
    """The most bytes that checkpoints, data sets and results took on the day, as far as the scheduler looked; null
    where it did not."""


class UsageTotalsView(DeviceTimeView, ChatUseView):
    """What the project used on all days."""


class CostView(Resource):
    """What the time on GPUs costs at the rate that the service is set to now."""

    amount: float
    """The cost."""
    currency: str
    """The currency, as ISO 4217 names it."""
    per_gpu_hour: float
    """The rate for an hour of a GPU."""


class UsageView(Resource):
    """What the project used, day by day. It is kept when jobs are deleted."""

    object: Literal["usage"] = "usage"
    """The kind of the resource."""
    project: str
    """The project."""
    since: date
    """The first day, inclusive."""
    until: date
    """The last day, inclusive."""
    storage_bytes: int
    """The bytes that the checkpoints, data sets and results of the project take now."""
    totals: UsageTotalsView
    """The time on devices and the conversations of all days."""
    cost: CostView | None
    """What the time on GPUs costs; null where the service has no rate."""
    days: list[DayUsageView]
    """The days on which anything was used, oldest first."""


@router.get("", summary="Show the usage")
def show_usage(
    session: ReadSession, caller: Caller, settings: SettingsDep, since: Since = None, until: Until = None
) -> UsageView:
    """The device time, jobs and storage of the project for each day, deleted jobs included."""
    last = until or datetime.now(UTC).date()
    first = since or last - timedelta(days=min(_DEFAULT_DAYS - 1, (last - date.min).days))
    if not 0 <= (last - first).days < _MAX_DAYS:
        detail = f"name a day that is not after `until`, and at most {_MAX_DAYS - 1} days before it"
        raise Unprocessable(field_errors=[FieldError("/query/since", "range_invalid", detail)])
    days = list_usage(session, caller.project, since=first, until=last)
    rate, cost = settings.price_per_gpu_hour, None
    if rate is not None:
        amount = round(rate * sum(day.gpu_seconds for day in days) / 3600, 4)
        cost = CostView(amount=amount, currency=settings.price_currency, per_gpu_hour=rate)
    return UsageView(
        cost=cost,
        project=caller.project,
        since=first,
        until=last,
        storage_bytes=storage_bytes(session, caller.project)[caller.project],
        totals=UsageTotalsView(
            **{name: sum(getattr(day, name) for day in days) for name in UsageTotalsView.model_fields}
        ),
        days=[DayUsageView.model_validate(day) for day in days],
    )
