"""Records what a process of the API does, at the cost of a few microseconds a request."""

import asyncio
from bisect import bisect_left
from collections.abc import Callable, Mapping
from typing import Final

from api.metrics.catalog import LOOP_LAG_SECONDS, PROCESSES, REQUEST_SECONDS, REQUESTS_IN_PROGRESS, Metric
from api.metrics.process_values import Key, PrivateValues, ProcessValues

TICK_SECONDS: Final = 0.25
_MAX_SERIES: Final = 900
_OTHER: Final = "other"
_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_NO_ROUTE: Final = "none"
"""The label of a request for a path that no route has, or that was refused before one was looked for."""
_READING_TICKS: Final = 4
SUM: Final = "sum"
"""The part of a histogram's series that is the sum of what was observed; the others are numbers of buckets."""

Readings = Callable[[], Mapping[tuple[Metric, tuple[str, ...]], float]]
"""Reads gauges and counters of this process: metric and labels of each series, and its value."""


class _Series:
    """One series of a histogram in this process."""

    __slots__ = ("counts", "keys", "sum", "sum_key")

    def __init__(self, metric: Metric, labels: tuple[str, ...]) -> None:
        self.counts = [0] * (len(metric.buckets) + 1)
        self.keys: list[Key] = [(metric.name, *labels, str(index)) for index in range(len(self.counts))]
        self.sum = 0.0
        self.sum_key: Key = (metric.name, *labels, SUM)


class HistogramRecorder:
    """Counts observations of one histogram. It is used from the event loop alone."""

    def __init__(self, metric: Metric, values: ProcessValues) -> None:
        self._metric = metric
        self._values = values
        self._series: dict[tuple[str, ...], _Series] = {}

    def observe(self, labels: tuple[str, ...], value: float) -> None:
        """Count a value, in seconds; one too many series are counted together."""
        series = self._series.get(labels)
        if series is None:
            series = self._add_series(labels)
        bucket = bisect_left(self._metric.buckets, value)
        series.counts[bucket] += 1
        series.sum += value
        self._values.write(series.keys[bucket], series.counts[bucket])
        self._values.write(series.sum_key, series.sum)

    def _add_series(self, labels: tuple[str, ...]) -> _Series:
        if len(self._series) >= _MAX_SERIES:
            labels = tuple(_OTHER for _ in labels)
        series = self._series.get(labels)
        if series is None:
            series = self._series[labels] = _Series(self._metric, labels)
        return series


class MetricsRecorder:
    """The values that one process of the API records. It is used from the event loop alone.

    Args:
        values: where they are written; kept to this process unless given.
    """

    def __init__(self, values: ProcessValues | None = None) -> None:
        self.values = values or PrivateValues()
        self._requests = HistogramRecorder(REQUEST_SECONDS, self.values)
        self._lag = HistogramRecorder(LOOP_LAG_SECONDS, self.values)
        self._in_progress = 0
        self._readings: list[Readings] = []

    def begin_request(self) -> None:
        """Count a request that has come."""
        self._in_progress += 1

    def end_request(self, method: str, route: str | None, status: int | None, seconds: float) -> None:
        """Count a response.

        Args:
            route: the template of the path; null for none.
            status: null where the client was gone before there was a response.
            seconds: from the head of the request to that of the response.
        """
        self._in_progress -= 1
        label = method if method in _METHODS else _OTHER
        self._requests.observe((label, route or _NO_ROUTE, "none" if status is None else str(status)), seconds)

    def add_readings(self, readings: Readings) -> None:
        """Read further gauges and counters of this process from now on."""
        self._readings.append(readings)

    def update_readings(self) -> None:
        """Write the gauges and counters as they are now."""
        self.values.write((PROCESSES.name,), 1, is_gauge=True)
        self.values.write((REQUESTS_IN_PROGRESS.name,), self._in_progress, is_gauge=True)
        for read in self._readings:
            for (metric, labels), value in read().items():
                self.values.write((metric.name, *labels), value, is_gauge=metric.type == "gauge")

    async def run(self) -> None:
        """Watch the event loop, and keep the readings fresh for the scrapes of other processes, until cancelled."""
        loop = asyncio.get_running_loop()
        ticks = 0
        while True:
            due = loop.time() + TICK_SECONDS
            await asyncio.sleep(TICK_SECONDS)
            self._lag.observe((), max(0.0, loop.time() - due))
            ticks += 1
            if ticks % _READING_TICKS == 1:
                self.update_readings()
