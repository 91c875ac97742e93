"""Writes the metrics of a job as an event file for TensorBoard, by tensorboardX."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from worker.trackers.client import CannotTrack, OpenedRun, Point


class TensorBoardClient:
    """One file a job: whole once it is closed."""

    def __init__(self) -> None:
        self._writers: dict[str, SummaryWriter] = {}

    def open(self, run: Mapping[str, Any], directory: Path) -> OpenedRun:
        writer = SummaryWriter(str(directory), filename_suffix=f".{run['job_id']}")
        self._writers[run["job_id"]] = writer
        # As Markdown: four spaces make code of it.
        text = json.dumps(run["parameters"], indent=1)
        writer.add_text("specification", "\n".join(f"    {line}" for line in text.splitlines()), 0)
        writer.add_text("job", "\n\n".join(f"{name}: {value}" for name, value in run["tags"].items()), 0)
        return OpenedRun(last_steps={})

    def send(self, job_id: str, points: Sequence[Point]) -> None:
        writer = self._writers[job_id]
        for step, values in points:
            for name, value in values.items():
                writer.add_scalar(name, value, step)

    def close(self, job_id: str, status: str, tags: Mapping[str, str]) -> Path | None:
        writer = self._writers.pop(job_id)
        writer.add_text("result", "\n\n".join(f"{name}: {value}" for name, value in tags.items()) or status, 0)
        try:
            writer.close()
        except OSError as error:
            raise CannotTrack("storage_failed", "The file could not be written.") from error
        return next(Path(writer.logdir).glob("events.out.tfevents.*"))
