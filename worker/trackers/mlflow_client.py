"""Sends the metrics of jobs to an MLflow server.

The server says which values a run has, so that none is sent twice, whatever was killed: a batch is one transaction of
the server, and the steps of each series rise.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from mlflow import MlflowClient as Client
from mlflow.entities import Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException

from domain.jobs.tracker_feed import flatten
from worker.trackers.client import CannotTrack, OpenedRun, Point

_MAX_METRICS: Final = 1000
_MAX_PARAMETERS: Final = 100
_MAX_NAME: Final = 250
_MAX_PARAMETER: Final = 500
"""The longest value that every version of the server takes."""
_MAX_TAG: Final = 5000
_STATUS: Final = {"succeeded": "FINISHED", "failed": "FAILED", "cancelled": "KILLED"}


class MlflowTrackerClient:
    """All runs of one server. The tracking address and its credentials are in the environment: `MLFLOW_*`."""

    def __init__(self) -> None:
        self._client = Client()
        self._runs: dict[str, str] = {}

    def open(self, run: Mapping[str, Any], directory: Path) -> OpenedRun:
        del directory  # Nothing is kept on the disk.
        try:
            found = self._find(run) or self._create(run)
            run_id = str(found.info.run_id)
            if not found.data.params:
                self._log_parameters(run_id, run["parameters"])
            self._client.log_batch(run_id, tags=_tags(run["tags"]))
            if found.info.status != "RUNNING":
                self._client.update_run(run_id, status="RUNNING")
        except MlflowException as error:
            raise _cannot_track(error) from error
        self._runs[run["job_id"]] = run_id
        # `metrics` has the values alone; these have their steps too.
        latest: Sequence[Metric] = found.data._metric_objs
        return OpenedRun(run_id, _url_of(found), {metric.key: int(metric.step) for metric in latest})

    def send(self, job_id: str, points: Sequence[Point]) -> None:
        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, step) for step, values in points for name, value in values.items()]
        try:
            # Each batch ends with a whole step: what has arrived of a series shows how far all have.
            for batch in _batches(metrics):
                self._client.log_batch(self._runs[job_id], metrics=batch)
        except MlflowException as error:
            raise _cannot_track(error) from error

    def close(self, job_id: str, status: str, tags: Mapping[str, str]) -> Path | None:
        run_id = self._runs.pop(job_id)
        try:
            self._client.log_batch(run_id, tags=_tags(tags))
            if status in _STATUS:
                self._client.set_terminated(run_id, _STATUS[status])
        except MlflowException as error:
            raise _cannot_track(error) from error
        return None

    def _find(self, run: Mapping[str, Any]) -> Run | None:
        if run["run_id"] is not None:
            return self._client.get_run(run["run_id"])
        experiment = self._client.get_experiment_by_name(run["options"]["experiment"])
        if experiment is None:
            return None
        # A process that was killed after it had made the run could not record its id.
        found = self._client.search_runs([experiment.experiment_id], f"tags.`pocl.job` = '{run['job_id']}'")
        return self._client.get_run(found[0].info.run_id) if found else None

    def _create(self, run: Mapping[str, Any]) -> Run:
        name = run["options"]["experiment"]
        experiment = self._client.get_experiment_by_name(name)
        experiment_id = self._client.create_experiment(name) if experiment is None else experiment.experiment_id
        tags = {**run["options"]["tags"], **run["tags"]}
        if run["parent_run_id"] is not None:
            tags["mlflow.parentRunId"] = run["parent_run_id"]
        return self._client.create_run(experiment_id, run_name=run["name"], tags=tags)

    def _log_parameters(self, run_id: str, parameters: Mapping[str, Any]) -> None:
        flat = [
            Param(name[:_MAX_NAME].replace(":", "_"), value[:_MAX_PARAMETER])
            for name, value in flatten(parameters).items()
        ]
        for start in range(0, len(flat), _MAX_PARAMETERS):
            self._client.log_batch(run_id, params=flat[start : start + _MAX_PARAMETERS])


def _tags(tags: Mapping[str, str]) -> list[RunTag]:
    return [RunTag(name, value[:_MAX_TAG]) for name, value in tags.items()]


def _batches(metrics: Sequence[Metric]) -> list[list[Metric]]:
    """Metrics in batches of at most as many as the server takes, none of which ends within a step."""
    batches: list[list[Metric]] = [[]]
    steps: list[list[Metric]] = []
    for metric in metrics:
        if steps and steps[-1][0].step == metric.step:
            steps[-1].append(metric)
        else:
            steps.append([metric])
    for step in steps:
        if len(batches[-1]) + len(step) > _MAX_METRICS:
            batches.append([])
        batches[-1] += step
    return [batch for batch in batches if batch]


def _url_of(run: Run) -> str | None:
    """Where the run is, relative to the server: its address is the operator's."""
    return f"#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"


def _cannot_track(error: MlflowException) -> CannotTrack:
    # The text names the address, which may hold a password.
    status = error.get_http_status_code()
    if status in (401, 403):
        return CannotTrack("tracker_refused", f"The MLflow server refuses the credentials of the service ({status}).")
    if "API request to" in str(error) and status >= 500:
        return CannotTrack("tracker_unreachable", "The MLflow server does not answer.")
    return CannotTrack("tracker_error", f"The MLflow server answers {error.error_code}.")
