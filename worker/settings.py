"""Settings of the worker and the scheduler besides those that they share with the API: `POCL_WORKER_*`."""

import sys
from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class WorkerSettings(BaseSettings):
    """Read once at start."""

    model_config = SettingsConfigDict(
        env_prefix="POCL_WORKER_", env_ignore_empty=True, frozen=True, use_attribute_docstrings=True
    )

    queue: str = Field(default="pocl", pattern=r"^[a-z0-9-]{1,64}$")
    """The broker queue that wakes workers; services that share a broker take different ones."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """What this worker computes on. `auto`: `cuda` where an NVIDIA device is present, else `cpu`."""
    gpus: tuple[int, ...] | None = None
    """The CUDA devices that this worker uses, a JSON list; null: all. Workers of one machine take different ones."""
    engine: tuple[str, ...] = Field(default=(sys.executable, "-m", "pocl", "run"), min_length=1)
    """The command that starts an engine, a JSON list; `SPEC --workdir DIR` is appended."""
    threads: int | None = Field(default=None, ge=1, le=1024)
    """CPU threads of the engine; null leaves the choice to it."""

    grace_seconds: float = Field(default=120, gt=0)
    """How long an engine may take to save its state after it was asked to stop; then it is killed."""
    stall_seconds: float = Field(default=3600, gt=0)
    """An engine that reports no event for this long is stopped."""
    check_seconds: float = Field(default=300, gt=0)
    """How long the tiny job may take by which a worker checks itself after a failure."""
    tick_seconds: float = Field(default=0.25, gt=0, le=10)
    """The interval at which the supervisor looks at the engine."""
    flush_seconds: float = Field(default=1, gt=0)
    """The interval at which events are written to the rows; changes of state are written at once."""

    pulse_file: Path | None = None
    """The liveness file of the worker or scheduler, which `python -m worker.liveness` checks; null: none."""

    doorbell_seconds: float = Field(default=1, gt=0)
    """The interval at which the scheduler looks at the queue."""
    doorbell_limit: int = Field(default=64, ge=1)
    """How many wake-up messages may wait at once."""
    janitor_seconds: float = Field(default=600, gt=0)
    """The interval of garbage collection: what killed processes left, and files that no row names."""

    max_engine_log_bytes: int = Field(default=8 * 1024**2, ge=4096)
    """The size of the engine's log on disk; its older half is dropped first."""
    kept_attempts: int = Field(default=10, ge=0)
    """How many directories of ended attempts are kept for inspection."""
