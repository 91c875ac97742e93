"""What a worker runs its engines with: rows, files, settings, devices, and when to stop."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from opentelemetry.trace import NoOpTracer, Tracer

from domain.artifacts import ArtifactStore
from domain.db import Database
from domain.jobs.retries import RetryPolicy
from domain.settings import Settings
from domain.workers.models import Device, DeviceKind
from worker.devices import visible_devices
from worker.engine_environment import ENGINE_HOME, engine_environment
from worker.settings import WorkerSettings


@dataclass(frozen=True)
class EngineHost:
    """The surroundings of every engine of one worker."""

    database: Database
    store: ArtifactStore
    settings: Settings
    options: WorkerSettings
    worker_name: str
    """The name of this worker, unique among the workers."""
    devices: Sequence[Device]
    """The devices that it computes on, detected once: a driver takes long to answer."""
    should_stop: Callable[[], bool]
    """Whether this worker is shutting down: the job is then saved and released."""
    kill_strays: Callable[[], int] = lambda: 0
    """Kills what an engine leaves behind in sessions of its own; how many processes that were."""
    clock: Callable[[], float] = time.monotonic
    tracer: Tracer = field(default_factory=NoOpTracer)
    """Makes the spans of attempts."""

    @property
    def retry(self) -> RetryPolicy:
        return RetryPolicy.from_settings(self.settings)

    @property
    def device_kind(self) -> DeviceKind:
        """What an engine computes on where its job does not say."""
        return "cuda" if any(each.kind == "cuda" for each in self.devices) else "cpu"

    def hub_arguments(self) -> list[str]:
        """What an engine may read of the Hub, and how much of it is kept."""
        patterns = self.settings.hub_repositories
        return [
            *("--hub-cache-bytes", str(self.options.max_hub_cache_bytes)),
            *(f"--hub-allow={pattern}" for pattern in (() if patterns is None else patterns or ("",))),
        ]

    def engine_environment(self, temporary: Path, device: DeviceKind) -> dict[str, str]:
        """The environment of an engine that computes on this kind of device."""
        return engine_environment(
            os.environ,
            temporary,
            home=self.settings.home / ENGINE_HOME,
            visible_devices=visible_devices(self.devices, device),
        )
