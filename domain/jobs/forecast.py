"""What a job will take: its time, the workers that it fits, free disk, and its price. No function commits."""

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

from sqlalchemy.orm import Session

from domain.jobs.fleet import Fleet, FleetWorker, ResourceRequest, device_kind_for
from domain.jobs.models import Job, JobAttempt
from domain.jobs.work_progress import WorkPlan
from domain.settings import Settings
from domain.throughput.repository import Speed, find_speed, record_job, size_class
from domain.workers.models import DeviceKind, Worker
from pocl.estimate import Estimate

ForecastBasis = Literal["past_jobs", "assumption"]
WorkerFit = Literal["fits", "no_worker", "no_worker_fits", "workers_quarantined"]

_ASSUMED_FACTOR: Final = 4
_ASSUMED: Final[Mapping[str, float]] = {"cpu": 5e10, "cuda": 3e13}
"""The operations a second that are assumed of a device on which no job has ended yet, give or take a factor of 4."""
_HOUR: Final = 3600


@dataclass(frozen=True)
class DurationForecast:
    """How long a job will run, from its claim to its end."""

    low_seconds: float
    expected_seconds: float
    high_seconds: float
    basis: ForecastBasis
    """`past_jobs` of the devices that the job fits, or an `assumption` about such devices."""
    past_jobs: int
    """How many jobs it was learnt from; 0 for an assumption."""
    device: DeviceKind
    """The kind of device that it is about."""
    flops_per_second: float
    """The planned operations a second that are expected."""


@dataclass(frozen=True)
class FitForecast:
    """Which workers the job fits."""

    state: WorkerFit
    workers: int
    """How many live workers accept jobs."""
    able: int
    """How many of them have the device and the memory."""


@dataclass(frozen=True)
class DiskForecast:
    """The disk that the job needs, and what is free."""

    needed_bytes: int | None
    """What its checkpoints take at most; null where that is not known."""
    free_bytes: int | None
    """What is free in the artifact store, as the API sees it; null where it does not see it."""
    fits: bool | None
    """Null where either is not known."""


@dataclass(frozen=True)
class PriceForecast:
    """What the job costs at the rate that the service is set to."""

    low: float
    expected: float
    high: float
    currency: str
    per_gpu_hour: float


@dataclass(frozen=True)
class Forecast:
    """What a job will take."""

    duration: DurationForecast | None
    """Null where a model's files are not at hand."""
    fit: FitForecast
    disk: DiskForecast
    price: PriceForecast | None
    """Null without a rate, without a duration, and for a job on a CPU."""


def make_forecast(
    session: Session,
    settings: Settings,
    fleet: Fleet,
    estimate: Estimate | None,
    *,
    device: str,
    student_parameters: int | None,
) -> Forecast:
    """What a job will take, by the workers that there are.

    Args:
        estimate: null where a model's files are not at hand.
        device: `resources.device` of the specification.
    """
    request = ResourceRequest(device, None if estimate is None else estimate.memory_bytes)
    well = fleet.able(request)
    quarantined = [] if well else fleet.able(request, quarantined=True)
    state: WorkerFit = "fits"
    if not well:
        state = "workers_quarantined" if quarantined else "no_worker_fits" if fleet.workers else "no_worker"
    duration = None
    flops = None if estimate is None else estimate.flops
    if flops is not None and student_parameters is not None:
        duration = _forecast_duration(session, well or quarantined, device, flops, size_class(student_parameters))
    return Forecast(
        duration=duration,
        fit=FitForecast(state, fleet.accepting, len(well)),
        disk=_forecast_disk(settings, estimate),
        price=_forecast_price(settings, duration),
    )


def as_stored(forecast: Forecast, estimate: Estimate | None, student_parameters: int | None) -> dict[str, Any]:
    """The forecast as the row of its job keeps it, with what the end of the job is compared by and its progress is
    counted by.
    """
    flops = None if estimate is None else estimate.flops
    size = None if student_parameters is None else size_class(student_parameters)
    work = WorkPlan.from_estimate(estimate).as_stored()
    return {**asdict(forecast), "flops": None if flops is None else float(flops), "size_class": size, "work": work}


def learn_from(session: Session, job: Job, attempt: JobAttempt) -> None:
    """Record how fast the job was done that this attempt has ended well, where the attempt did all of it."""
    forecast = job.forecast or {}
    flops, size = forecast.get("flops"), forecast.get("size_class")
    is_whole = job.token == 1 and attempt.resumed_from_step is None and job.starts_from is None
    if not is_whole or not flops or size is None or attempt.device is None or attempt.ended_at is None:
        return
    worker = session.get(Worker, attempt.worker)
    name = None if worker is None else _device_name(worker.devices, attempt.device)
    if name is not None:
        seconds = (attempt.ended_at - attempt.started_at).total_seconds()
        record_job(session, attempt.device, name, size=size, flops=flops, seconds=seconds)


def _forecast_duration(
    session: Session, workers: Sequence[FleetWorker], device: str, flops: int, size: int
) -> DurationForecast:
    kinds = {worker.name: device_kind_for(device, worker.memory) for worker in workers}
    named = {(kinds[worker.name], _device_name(worker.devices, kinds[worker.name])) for worker in workers}
    learnt = {
        kind: speed
        for kind, name in sorted(named, key=str)
        if name is not None and (speed := find_speed(session, kind, name, size)) is not None
    }
    basis: ForecastBasis = "past_jobs" if learnt else "assumption"
    speeds = learnt
    if not learnt:
        assumed = sorted(set(kinds.values())) or ["cpu" if device == "auto" else device]
        speeds = {
            kind: Speed(_ASSUMED[kind] / _ASSUMED_FACTOR, _ASSUMED[kind], _ASSUMED[kind] * _ASSUMED_FACTOR)
            for kind in assumed
        }
    # Any of the workers may claim it: from the fastest at its best to the slowest at its worst.
    rate = math.exp(sum(math.log(speed.expected) for speed in speeds.values()) / len(speeds))
    both = Speed(min(speed.low for speed in speeds.values()), rate, max(speed.high for speed in speeds.values()))
    low, expected, high = both.seconds(flops)
    return DurationForecast(
        low_seconds=low,
        expected_seconds=expected,
        high_seconds=high,
        basis=basis,
        past_jobs=sum(speed.jobs for speed in speeds.values()),
        device="cuda" if "cuda" in speeds else "cpu",
        flops_per_second=rate,
    )


def _device_name(devices: Sequence[Mapping[str, Any]], kind: str) -> str | None:
    return next((str(device["name"]) for device in devices if device["kind"] == kind), None)


def _forecast_disk(settings: Settings, estimate: Estimate | None) -> DiskForecast:
    # Where files of jobs are on this machine; with a bucket those of the working directories alone.
    root, needed = settings.artifact_root, None if estimate is None else estimate.stored_bytes
    if settings.artifact_store is not None:
        root, needed = settings.work_root, None if estimate is None else estimate.disk_bytes
    free = None
    for directory in (root, *root.parents):
        try:
            free = shutil.disk_usage(directory).free
            break
        except OSError:
            # It is made when something is stored first.
            continue
    return DiskForecast(needed, free, None if needed is None or free is None else needed <= free)


def _forecast_price(settings: Settings, duration: DurationForecast | None) -> PriceForecast | None:
    rate = settings.price_per_gpu_hour
    if rate is None or duration is None or duration.device != "cuda":
        return None
    low, expected, high = (
        round(rate * seconds / _HOUR, 4)
        for seconds in (duration.low_seconds, duration.expected_seconds, duration.high_seconds)
    )
    return PriceForecast(low, expected, high, settings.price_currency, rate)
