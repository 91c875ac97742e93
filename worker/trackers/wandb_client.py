"""Sends the metrics of jobs to Weights & Biases, or writes them as the file that `wandb sync` sends.

The client sends in the background and says when all has arrived only as the run ends. So the run itself has, in its
summary, how far each series has come: a process that goes on with the run begins there.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import wandb
from wandb.errors import AuthenticationError, CommError, Error, UsageError

from worker.trackers.client import CannotTrack, OpenedRun, Point

LAST_STEPS: Final = "pocl_last_steps"
"""The field of the summary that has the last step of each series, as JSON."""
STEP: Final = "step"
"""The series that all others are drawn over: the optimiser step."""


class WandbTrackerClient:
    """All runs of one key. The server and its key are in the environment: `WANDB_*`."""

    def __init__(self) -> None:
        self._runs: dict[str, wandb.Run] = {}
        self._last_steps: dict[str, dict[str, int]] = {}

    def open(self, run: Mapping[str, Any], directory: Path) -> OpenedRun:
        options = run["options"]
        # The job's id is the run's, so that a process that was killed before it recorded anything goes on with the run.
        try:
            opened = wandb.init(
                project=options["project"],
                entity=options["entity"],
                id=run["job_id"],
                resume="allow",
                reinit="create_new",
                name=run["name"],
                group=options["group"] or run["parent_job_id"],
                tags=list(options["tags"]),
                config={"spec": dict(run["parameters"]), "job": dict(run["tags"]), "parent_run": run["parent_run_id"]},
                dir=str(directory),
                settings=_settings(options["mode"]),
            )
        except Error as error:
            raise _cannot_track(error) from error
        opened.define_metric(STEP)
        opened.define_metric("*", step_metric=STEP)
        known = json.loads(opened.summary.get(LAST_STEPS) or "{}")
        self._runs[run["job_id"]], self._last_steps[run["job_id"]] = opened, dict(known)
        return OpenedRun(opened.id, opened.url, known)

    def send(self, job_id: str, points: Sequence[Point]) -> None:
        run, last_steps = self._runs[job_id], self._last_steps[job_id]
        try:
            for step, values in points:
                run.log({**values, STEP: step})
                for name in values:
                    last_steps[name] = max(step, last_steps.get(name, 0))
            run.summary[LAST_STEPS] = json.dumps(last_steps)
        except Error as error:
            raise _cannot_track(error) from error

    def close(self, job_id: str, status: str, tags: Mapping[str, str]) -> Path | None:
        run = self._runs.pop(job_id)
        del self._last_steps[job_id]
        try:
            run.config.update({"job": {**run.config["job"], **tags}}, allow_val_change=True)
            run.finish(exit_code=1 if status in ("failed", "cancelled") else 0)
        except Error as error:
            raise _cannot_track(error) from error
        return next(iter(Path(run.dir).parent.glob("run-*.wandb"))) if run.offline else None


def _settings(mode: str) -> wandb.Settings:
    """Nothing of the machine, its programs or its output is sent: only what the service sends."""
    return wandb.Settings(
        mode=mode,
        console="off",
        disable_git=True,
        disable_code=True,
        save_code=False,
        silent=True,
        x_disable_stats=True,
        x_disable_meta=True,
        x_disable_machine_info=True,
        x_save_requirements=False,
    )


def _cannot_track(error: Error) -> CannotTrack:
    if isinstance(error, AuthenticationError | UsageError):
        return CannotTrack("tracker_refused", "Weights & Biases refuses the key of the service, or the project.")
    if isinstance(error, CommError):
        return CannotTrack("tracker_unreachable", "Weights & Biases does not answer, or refuses the run.")
    return CannotTrack("tracker_error", f"The client of Weights & Biases failed ({type(error).__name__}).")
