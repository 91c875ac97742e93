"""Every metric by its name: type, labels and meaning. `docs/observability.md` has the same table."""

from dataclasses import dataclass
from typing import Final, Literal

MetricType = Literal["counter", "gauge", "histogram"]


@dataclass(frozen=True)
class Metric:
    """One metric."""

    name: str
    """As Prometheus shows it; a counter ends in `_total`."""
    type: MetricType
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    """The upper bounds of a histogram, without the infinite one."""


_LATENCY_BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)

BUILD: Final = Metric("pocl_build_info", "gauge", "Always 1; what runs.", ("version", "commit", "schema_revision"))

# --- Processes of the API on this machine, all together ---------------------------------------------------
REQUEST_SECONDS: Final = Metric(
    "pocl_http_request_duration_seconds",
    "histogram",
    "Time from the head of a request to the head of its response. Long polls have a route of their own.",
    ("method", "route", "status"),
    _LATENCY_BUCKETS,
)
REQUESTS_IN_PROGRESS: Final = Metric(
    "pocl_http_requests_in_progress", "gauge", "Requests whose response is not complete, streams included."
)
CONNECTIONS: Final = Metric("pocl_http_connections", "gauge", "Open connections of clients.")
REFUSALS: Final = Metric(
    "pocl_http_refusals_total",
    "counter",
    "Connections that were refused or ended before a request was complete, by the reason.",
    ("reason",),
)
FOLLOWERS: Final = Metric("pocl_http_followers", "gauge", "Long polls and event streams that follow a job.")
TRANSFERS: Final = Metric("pocl_http_transfers", "gauge", "Uploads and downloads in progress.")
CAPACITY: Final = Metric(
    "pocl_http_capacity",
    "gauge",
    "How many connections, followers, transfers, transactions and connections to the database there may be.",
    ("resource",),
)
LOOP_LAG_SECONDS: Final = Metric(
    "pocl_event_loop_lag_seconds",
    "histogram",
    "How late a timer of the event loop rings, looked at four times a second.",
    (),
    (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0),
)
DATABASE_CONNECTIONS: Final = Metric(
    "pocl_database_connections_in_use", "gauge", "Connections to the database that a transaction of the API has."
)
TRANSACTION_SLOTS: Final = Metric(
    "pocl_transaction_slots", "gauge", "Requests that hold a database transaction, or wait for their turn.", ("state",)
)
PROCESSES: Final = Metric("pocl_api_processes", "gauge", "Processes of the API on this machine.")

# --- The service, as the database has it: the same from every process --------------------------------------
DATABASE_UP: Final = Metric(
    "pocl_database_up", "gauge", "Whether the figures below could be read: 1, or 0 and they are left out."
)
FIGURES_AGE_SECONDS: Final = Metric("pocl_figures_age_seconds", "gauge", "The age of the figures below.")
JOBS: Final = Metric("pocl_jobs", "gauge", "Jobs that have not ended.", ("project", "status"))
QUEUE_OLDEST_SECONDS: Final = Metric(
    "pocl_queue_oldest_seconds", "gauge", "Time since the oldest queued job was submitted.", ("project",)
)
JOBS_BACKING_OFF: Final = Metric("pocl_jobs_backing_off", "gauge", "Queued jobs that wait after a failure.")
JOBS_ENDED: Final = Metric(
    "pocl_jobs_ended_total", "counter", "Jobs that have ended, deleted ones included.", ("status", "fault", "code")
)
ATTEMPTS_ENDED: Final = Metric(
    "pocl_attempts_ended_total", "counter", "Attempts that have ended.", ("end", "fault", "code")
)
LEASES_EXPIRED: Final = Metric(
    "pocl_leases_expired", "gauge", "Held jobs whose lease has expired, and which no scheduler has reaped."
)
TOKENS_PER_SECOND: Final = Metric(
    "pocl_training_tokens_per_second", "gauge", "Training throughput of the running jobs together.", ("project",)
)
PROGRESS_AGE_SECONDS: Final = Metric(
    "pocl_training_progress_age_seconds", "gauge", "The longest silence of an engine among the running jobs."
)
WORKERS: Final = Metric("pocl_workers", "gauge", "Workers that have shown their liveness within a day.", ("state",))
GPU_MEMORY_BYTES: Final = Metric(
    "pocl_gpu_memory_bytes", "gauge", "Memory of a GPU of a live worker.", ("uuid", "name")
)
GPU_MEMORY_USED_BYTES: Final = Metric(
    "pocl_gpu_memory_used_bytes", "gauge", "Memory in use on a GPU of a live worker.", ("uuid", "name")
)
GPU_UTILIZATION: Final = Metric(
    "pocl_gpu_utilization_ratio", "gauge", "Share of time in which a GPU of a live worker computes.", ("uuid", "name")
)
GPU_TEMPERATURE_CELSIUS: Final = Metric(
    "pocl_gpu_temperature_celsius", "gauge", "Temperature of a GPU of a live worker.", ("uuid", "name")
)
SCHEDULERS: Final = Metric(
    "pocl_schedulers", "gauge", "Live schedulers, by whether they reach the broker.", ("reaches_broker",)
)
SCHEDULER_LEADERS: Final = Metric(
    "pocl_scheduler_leaders", "gauge", "Schedulers that lead: one, and none where no duty of a scheduler is done."
)
SCHEDULER_AGE_SECONDS: Final = Metric(
    "pocl_scheduler_heartbeat_age_seconds", "gauge", "Time since the newest heartbeat of a scheduler."
)
STORED_BYTES: Final = Metric(
    "pocl_stored_bytes", "gauge", "Size of what rows name in the artifact store, read once a minute.", ("kind",)
)
WEBHOOK_ENDPOINTS: Final = Metric("pocl_webhook_endpoints", "gauge", "Webhooks, read once a minute.", ("status",))
WEBHOOK_DELIVERIES_PENDING: Final = Metric(
    "pocl_webhook_deliveries_pending",
    "gauge",
    "Messages that are neither delivered nor given up, read once a minute.",
)
WEBHOOK_OLDEST_SECONDS: Final = Metric(
    "pocl_webhook_oldest_seconds", "gauge", "Time since the oldest of these messages was written."
)
PUBLICATIONS: Final = Metric(
    "pocl_publications",
    "gauge",
    "Pushes of students to the Hub that are under way or have failed, read once a minute.",
    ("state",),
)
PUBLICATIONS_OLDEST_SECONDS: Final = Metric(
    "pocl_publications_oldest_seconds", "gauge", "Time since the job of the oldest push that is under way succeeded."
)
EXPORTS: Final = Metric(
    "pocl_exports",
    "gauge",
    "Exports of checkpoints that are under way or have failed, read once a minute.",
    ("state",),
)
FILE_SYSTEM_BYTES: Final = Metric(
    "pocl_file_system_bytes", "gauge", "Size of the file system of a directory.", ("directory",)
)
FILE_SYSTEM_FREE_BYTES: Final = Metric(
    "pocl_file_system_free_bytes", "gauge", "Space that is free there for the service.", ("directory",)
)

METRICS: Final = tuple(value for value in list(globals().values()) if isinstance(value, Metric))
"""All of them, in the order of the exposition."""
