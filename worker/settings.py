"""Settings of the worker and the scheduler besides those that they share with the API: `POCL_WORKER_*`."""

import sys
from typing import Any, Final, Literal

from pydantic import Field, field_validator
from pydantic_settings import SettingsConfigDict

from domain.environment import AbsolutePath, EnvironmentSettings, Seconds, split_command, split_list

DEFAULT_ENGINE: Final = (sys.executable, "-P", "-m", "pocl", "run")
"""One process on one device; -P: a module of the working directory is never taken for one of ours."""
DEFAULT_CHAT_ENGINE: Final = (sys.executable, "-P", "-m", "pocl.chat")


class WorkerSettings(EnvironmentSettings):
    """Read once at start."""

    model_config = SettingsConfigDict(env_prefix="POCL_WORKER_")

    queue: str = Field(default="pocl", pattern=r"^[a-z0-9-]{1,64}$")
    """The broker queue that wakes workers; services that share a broker take different ones."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """What this worker computes on. `auto`: `cuda` where an NVIDIA device is present, else `cpu`."""
    gpus: tuple[int | str, ...] | None = None
    """The GPUs that this worker may use, numbers of the driver or UUIDs (`nvidia-smi -L`) with commas between
    or as a JSON list; null: all that `CUDA_VISIBLE_DEVICES` leaves. Workers of one machine take different ones."""
    gpus_per_job: int | None = Field(default=None, ge=1, le=64)
    """How many of them the engine of a job is given, those with the most memory; null: one for the engine that is set
    by default, which is one process, and all for another."""
    engine: tuple[str, ...] = Field(default=DEFAULT_ENGINE, min_length=1)
    """The command that starts an engine, as for a shell or a JSON list; `SPEC --workdir DIR` is appended."""
    chat_engine: tuple[str, ...] = Field(default=DEFAULT_CHAT_ENGINE, min_length=1)
    """The command that starts the process which answers conversations, as for a shell or a JSON list."""
    chat_idle_seconds: float = Field(default=60, ge=0, le=3600, allow_inf_nan=False)
    """How long a worker without a job keeps the model of the last conversation loaded."""
    threads: int | None = Field(default=None, ge=1, le=1024)
    """CPU threads of the engine; null leaves the choice to it."""
    memory_bytes: int | None = Field(default=None, ge=1 << 30)
    """The memory of the machine that jobs of this worker may take, where others share it; null: all there is."""
    count: int | None = Field(default=None, ge=0, le=64)
    """How many workers `python -m worker serve` starts, which share the machine; null: one per GPU, and one without
    GPUs."""

    memory_factor: float = Field(default=4, ge=0)
    """How many times its estimated memory the engine of a job on the CPU may take, besides some gigabytes for libraries
    and at least half of the machine; with 0 there is no limit."""
    sandbox: Literal["auto", "off", "required"] = "auto"
    """Whether Landlock keeps the engine from reading the home of the service and from writing outside of its own
    directories. `auto`: where the kernel has it; `required`: a worker without it does not start."""
    max_hub_cache_bytes: int = Field(default=256 * 1024**3, ge=0)
    """The size of the cache of the Hugging Face Hub, whose least recently used revisions are evicted first."""

    grace_seconds: Seconds = 120
    """How long an engine may take to save its state after it was asked to stop; then it is killed."""
    stall_seconds: Seconds = 3600
    """An engine that reports no event for this long is stopped."""
    check_seconds: Seconds = 300
    """How long the tiny job may take by which a worker checks itself after a failure."""
    tick_seconds: float = Field(default=0.25, gt=0, le=10, allow_inf_nan=False)
    """The interval at which the supervisor looks at the engine."""
    flush_seconds: Seconds = 1
    """The interval at which events are written to the rows; changes of state are written at once."""

    pulse_file: AbsolutePath | None = None
    """The liveness file of the worker or scheduler, which `python -m worker.liveness` checks; null: none."""

    doorbell_seconds: Seconds = 1
    """The interval at which the scheduler looks at the queue, and at messages for webhooks."""
    doorbell_limit: int = Field(default=64, ge=1)
    """How many wake-up messages may wait at once."""
    leader_seconds: Seconds = 10
    """How long the scheduler that leads may be silent before another one takes its place."""
    janitor_seconds: Seconds = 600
    """The interval of garbage collection: what killed processes left, and files that no row names."""

    webhook_threads: int = Field(default=16, ge=2, le=256)
    """How many messages the scheduler sends to webhooks at once."""
    webhook_seconds: float = Field(default=15, ge=1, le=30, allow_inf_nan=False)
    """How long one attempt to send a message may take in all; 5 of them to connect, 10 without a byte of the
    response."""

    tracker_seconds: float = Field(default=5, gt=0, le=3600, allow_inf_nan=False)
    """The interval at which the scheduler sends the metrics of running jobs to their trackers; after a failure it is
    doubled, up to ten minutes."""
    tracker_timeout_seconds: float = Field(default=60, ge=1, le=600, allow_inf_nan=False)
    """How long a tracker may take for one message; then its client is ended, and the message is sent again later."""
    tracker_give_up_days: float = Field(default=3, gt=0, le=366, allow_inf_nan=False)
    """Days for which a tracker of an ended job must have failed before it is given up."""

    publish_uploads: int = Field(default=2, ge=1, le=16)
    """How many students the scheduler pushes to the Hugging Face Hub at once."""
    publish_timeout_seconds: float = Field(default=7200, ge=10, le=86_400, allow_inf_nan=False)
    """How long one attempt to push a student may take in all; then its process is ended. The next one uploads what is
    missing."""

    exports: bool = True
    """Whether this worker exports checkpoints as GGUF, one at a time, beside its jobs."""
    export_seconds: Seconds = 5
    """The interval at which it looks for exports that are due."""
    export_timeout_seconds: float = Field(default=3600, ge=10, le=86_400, allow_inf_nan=False)
    """How long one attempt to export a checkpoint may take in all; then its process is ended."""
    export_memory_bytes: int = Field(default=16 * 1024**3, ge=1 << 30)
    """The memory that the process may take which writes an export: several times the largest weight in fp32."""

    max_engine_log_bytes: int = Field(default=8 * 1024**2, ge=4096)
    """The size of the engine's log on disk; its older half is dropped first."""
    kept_attempts: int = Field(default=10, ge=0)
    """How many directories of ended attempts are kept for inspection."""

    @field_validator("gpus", mode="before")
    @classmethod
    def _split_gpus(cls, value: Any) -> Any:
        listed = split_list(value)
        return [_parse_gpu(each) for each in listed] if isinstance(listed, list | tuple) else listed

    @field_validator("engine", "chat_engine", mode="before")
    @classmethod
    def _split_engine(cls, value: Any) -> Any:
        return split_command(value)


def _parse_gpu(name: Any) -> int | str:
    if isinstance(name, int) and not isinstance(name, bool) and name >= 0:
        return name
    if isinstance(name, str) and name.isascii() and name.isdecimal():
        return int(name)
    if isinstance(name, str) and name.startswith(("GPU-", "MIG-")):
        return name
    raise ValueError("GPUs are named by numbers of the driver or by UUIDs, as `nvidia-smi -L` lists them")
