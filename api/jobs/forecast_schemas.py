"""What a job will take, as the API shows it."""

from api.pagination import Resource
from domain.jobs.forecast import ForecastBasis, WorkerFit
from domain.workers.models import DeviceKind


class DurationView(Resource):
    """How long the job will run, from its claim by a worker to its end, if nothing interrupts it."""

    low_seconds: float
    """The lower end of the expected range in seconds."""
    expected_seconds: float
    """The expected time in seconds."""
    high_seconds: float
    """The upper end of the expected range in seconds."""
    basis: ForecastBasis
    """What it rests on: `past_jobs` with students of about this size on the devices of the workers that the job fits,
    or an `assumption` about devices of this kind, right within a factor of four at best. No trial run is made."""
    past_jobs: int
    """The number of past jobs; 0 for an assumption."""
    device: DeviceKind
    """The kind of device that it is about."""
    flops_per_second: float
    """The floating-point operations per second that are expected, of those that the estimate counts."""


class FitView(Resource):
    """Which workers the job fits at this moment."""

    state: WorkerFit
    """`fits`; or `no_worker`: none is live and accepts jobs; `no_worker_fits`: none has the device or the memory;
    `workers_quarantined`: those that have it are quarantined. In the last three cases the job would wait."""
    workers: int
    """The number of live workers that accept jobs."""
    able: int
    """The number of those that have the device and the memory that the job needs."""


class DiskView(Resource):
    """The disk space that the job needs, and what is free."""

    needed_bytes: int | None
    """What its checkpoints take at most; null where a model's files are not at hand."""
    free_bytes: int | None
    """What is free where the artifact store is, as the API sees it; workers may have other disks. Null where it is not
    known."""
    fits: bool | None
    """Whether there is enough; null where either is not known."""


class PriceView(Resource):
    """What the job will cost at the rate for an hour of a GPU that the service is set to."""

    low: float
    """The lower end of the expected range."""
    expected: float
    """The expected price."""
    high: float
    """The upper end of the expected range."""
    currency: str
    """The currency, as ISO 4217 names it."""
    per_gpu_hour: float
    """The rate for an hour of a GPU."""


class ForecastView(Resource):
    """What a job will take, by the workers that there are and the jobs that they have done."""

    duration: DurationView | None
    """How long it will run; null where a model's files are not at hand."""
    fit: FitView
    """Which workers it fits."""
    disk: DiskView
    """The disk space that it needs."""
    price: PriceView | None
    """What it will cost; null where the service has no rate, for a job on a CPU, and without a duration."""
