"""The Prometheus exposition format of what was recorded and read."""

import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, get_args

from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from api.metrics import catalog
from api.metrics.catalog import Metric
from api.metrics.process_values import Key
from api.metrics.recorder import SUM
from domain.monitoring.figures import ServiceFigures, TableFigures
from domain.workers.models import WorkerState

CONTENT_TYPE: Final = CONTENT_TYPE_PLAIN_0_0_4
Samples = Iterable[tuple[tuple[str, ...], float]]
"""Labels and value of each series of a metric."""


@dataclass(frozen=True)
class Snapshot:
    """All that a scrape shows."""

    build: tuple[str, str, str]
    """Version, commit and revision of the schema."""
    processes: Mapping[Key, float]
    """The values of all processes together."""
    figures: ServiceFigures | None
    """The figures of the service; null where they could not be read."""
    figures_age: float = 0
    """Their age in seconds."""
    tables: TableFigures | None = None
    """The figures that need whole tables; null where they are not known."""
    directories: Mapping[str, Path] | None = None
    """Directories whose file system is looked at, by what they are for."""


def render(snapshot: Snapshot) -> bytes:
    """The text of a scrape."""
    return generate_latest(_SnapshotCollector(snapshot))


class _SnapshotCollector(Collector):
    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterator[Family]:
        snapshot = self._snapshot
        yield _family(catalog.BUILD, [(snapshot.build, 1)])
        yield from _process_families(snapshot.processes)
        yield _family(catalog.DATABASE_UP, [((), float(snapshot.figures is not None))])
        if snapshot.figures is not None:
            yield _family(catalog.FIGURES_AGE_SECONDS, [((), snapshot.figures_age)])
            for metric, samples in _service_samples(snapshot.figures):
                yield _family(metric, samples)
        if snapshot.tables is not None:
            for metric, samples in _table_samples(snapshot.tables):
                yield _family(metric, samples)
        yield from _file_system_families(snapshot.directories or {})


def _process_families(values: Mapping[Key, float]) -> Iterator[Family]:
    by_name: dict[str, list[tuple[Key, float]]] = defaultdict(list)
    for key, value in sorted(values.items()):
        by_name[key[0]].append((key[1:], value))
    for metric in catalog.METRICS:
        entries = by_name.get(metric.name)
        if entries is None:
            continue
        yield _histogram(metric, entries) if metric.type == "histogram" else _family(metric, entries)


def _histogram(metric: Metric, entries: Iterable[tuple[Key, float]]) -> Family:
    family = HistogramMetricFamily(metric.name, metric.help, labels=metric.labels)
    series: dict[Key, dict[str, float]] = defaultdict(dict)
    for key, value in entries:
        series[key[:-1]][key[-1]] = value
    bounds = [floatToGoString(bound) for bound in (*metric.buckets, float("inf"))]
    for labels, parts in series.items():
        # A version with other buckets or labels may have written to the same directory.
        if len(labels) != len(metric.labels):
            continue
        count, cumulative = 0.0, []
        for index, bound in enumerate(bounds):
            count += parts.get(str(index), 0.0)
            cumulative.append((bound, count))
        family.add_metric(labels, cumulative, parts.get(SUM, 0.0))
    return family


def _service_samples(figures: ServiceFigures) -> Iterator[tuple[Metric, Samples]]:
    projects = figures.projects.items()
    yield catalog.JOBS, [((name, status), jobs) for name, each in projects for status, jobs in each.jobs.items()]
    yield (
        catalog.QUEUE_OLDEST_SECONDS,
        [((name,), each.oldest_queued_seconds) for name, each in projects if each.oldest_queued_seconds is not None],
    )
    yield catalog.JOBS_BACKING_OFF, [((), figures.backing_off)]
    ended = {kind: [each for each in figures.ends if each.kind == kind] for kind in ("job", "attempt")}
    yield catalog.JOBS_ENDED, [((each.end, each.fault, each.code), each.count) for each in ended["job"]]
    yield catalog.ATTEMPTS_ENDED, [((each.end, each.fault, each.code), each.count) for each in ended["attempt"]]
    yield catalog.LEASES_EXPIRED, [((), figures.expired_leases)]
    yield catalog.TOKENS_PER_SECOND, [((name,), each.tokens_per_second) for name, each in projects]
    if figures.progress_age_seconds is not None:
        yield catalog.PROGRESS_AGE_SECONDS, [((), figures.progress_age_seconds)]
    yield catalog.WORKERS, [((state,), figures.workers.get(state, 0)) for state in get_args(WorkerState)]
    gpus = [((each.uuid, each.name), each) for each in figures.gpus.values()]
    for metric, values in (
        (catalog.GPU_MEMORY_BYTES, [(labels, gpu.memory_bytes) for labels, gpu in gpus]),
        (catalog.GPU_MEMORY_USED_BYTES, [(labels, gpu.memory_used_bytes) for labels, gpu in gpus]),
        (catalog.GPU_UTILIZATION, [(labels, gpu.utilization) for labels, gpu in gpus]),
        (catalog.GPU_TEMPERATURE_CELSIUS, [(labels, gpu.temperature_celsius) for labels, gpu in gpus]),
    ):
        yield metric, [(labels, float(value)) for labels, value in values if value is not None]
    yield (
        catalog.SCHEDULERS,
        [(("true" if reaches else "false",), count) for reaches, count in figures.schedulers.items()],
    )
    yield catalog.SCHEDULER_LEADERS, [((), float(figures.has_leader))]
    if figures.scheduler_age_seconds is not None:
        yield catalog.SCHEDULER_AGE_SECONDS, [((), figures.scheduler_age_seconds)]


def _table_samples(figures: TableFigures) -> Iterator[tuple[Metric, Samples]]:
    yield catalog.STORED_BYTES, [((kind,), size) for kind, size in figures.stored_bytes.items()]
    yield catalog.WEBHOOK_ENDPOINTS, [((status,), count) for status, count in figures.webhook_endpoints.items()]
    yield catalog.WEBHOOK_DELIVERIES_PENDING, [((), figures.pending_deliveries)]
    if figures.oldest_delivery_seconds is not None:
        yield catalog.WEBHOOK_OLDEST_SECONDS, [((), figures.oldest_delivery_seconds)]
    yield catalog.PUBLICATIONS, [((state,), count) for state, count in figures.publications.items()]
    if figures.oldest_publication_seconds is not None:
        yield catalog.PUBLICATIONS_OLDEST_SECONDS, [((), figures.oldest_publication_seconds)]
    yield catalog.EXPORTS, [((state,), count) for state, count in figures.exports.items()]


def _file_system_families(directories: Mapping[str, Path]) -> Iterator[Family]:
    sizes, free = [], []
    for name, path in directories.items():
        try:
            usage = shutil.disk_usage(path)
        except OSError:
            continue
        sizes.append(((name,), usage.total))
        free.append(((name,), usage.free))
    yield _family(catalog.FILE_SYSTEM_BYTES, sizes)
    yield _family(catalog.FILE_SYSTEM_FREE_BYTES, free)


def _family(metric: Metric, samples: Samples) -> Family:
    kind = CounterMetricFamily if metric.type == "counter" else GaugeMetricFamily
    family = kind(metric.name, metric.help, labels=metric.labels)
    for labels, value in samples:
        if len(labels) == len(metric.labels):
            family.add_metric(labels, value)
    return family
