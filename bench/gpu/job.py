"""A whole job at the settings of the paper: a part of it is run, and the whole follows from its phases.

Ranking takes as long as there are samples, filling the cache too; evaluating as there are validation samples; training
as there are steps, and each save costs the same. The rest is done once, however large the job.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch

from bench import ours
from bench.gpu.scale import Job
from bench.gpu.section import Section, Setting
from bench.gpu.targets import JOB
from bench.report import Figure
from bench.whole_run import Stopwatch, write_inputs
from pocl.events import Event, StageFinished, StepLogged
from pocl.plan import stage_table
from pocl.spec import DistillationSpec
from pocl.spec.presets import resolve

STAGES = 4
SAVE_EVERY = 200
"""Optimiser steps between saves, by default."""


@dataclass
class JobWatch:
    """A sink that takes the time of each phase, and of each optimiser step but the first of a stage."""

    clock: Callable[[], float] = time.perf_counter
    step_seconds: list[float] = field(default_factory=list)
    steps: int = 0
    _since: float | None = None

    def __post_init__(self) -> None:
        self.phases = Stopwatch(self.clock)

    def sink(self, event: Event) -> None:
        self.phases.sink(event)
        if isinstance(event, StepLogged):
            now = self.clock()
            self.steps += 1
            if self._since is not None:
                self.step_seconds.append(now - self._since)
            self._since = now
        elif isinstance(event, StageFinished):
            self._since = None


def measure_job(setting: Setting, *, whole: bool) -> Section:
    """Seconds of each phase of the part that was run, and of the whole."""
    scale = setting.scale
    ran = scale.job if whole else scale.part
    watch = JobWatch()
    with tempfile.TemporaryDirectory(prefix="pocl-bench-") as scratch:
        spec = _specification(Path(scratch), ran, setting)
        setting.say(f"  running {ran.rows} of {scale.job.rows} samples, {ran.epochs} of {scale.job.epochs} epochs")
        ours.whole_run(spec, Path(scratch) / "run", watch.sink)
        watch.phases.enter("end")
    part = dict(watch.phases.seconds)
    steps = planned_steps(spec, scale.job)
    of_whole = part if whole else extrapolate(watch, ran, scale.job, steps)
    rows: list[dict[str, Figure]] = []
    for name in part:
        rows.append({"phase": name, "run_s": part[name], "whole_s": of_whole[name]})
    rows.append({"phase": "all", "run_s": sum(part.values()), "whole_s": sum(of_whole.values())})
    how = "all of it was run" if whole else "EXTRAPOLATED from the part that was run; --whole runs all"
    return Section(
        f"a job of {scale.job.size.name}: {scale.job.rows} samples, {steps} steps of {scale.job.batch_size}, "
        f"{scale.job.validation_rows} validation samples, {scale.job.new_tokens} new tokens",
        rows,
        {JOB: sum(of_whole.values())},
        notes=(
            f"The whole: {how}.",
            "The models are random and end no answer, so that each has all tokens: more than a trained model gives.",
        ),
    )


def extrapolate(watch: JobWatch, part: Job, whole: Job, whole_steps: int) -> dict[str, float]:
    """The seconds of each phase of `whole`, from those of `part`."""
    seconds = dict(watch.phases.seconds)
    times = {
        "ranking": whole.rows / part.rows,
        "caching_teacher": (whole.rows + whole.validation_rows) / (part.rows + part.validation_rows),
        "evaluating": whole.validation_rows / part.validation_rows,
    }
    scaled = {name: spent * times.get(name, 1.0) for name, spent in seconds.items()}
    if watch.step_seconds:
        step = median(watch.step_seconds)
        # What is no step is saves, one at the end of each stage; the whole saves between them too.
        saves = max(0.0, seconds["training"] - step * watch.steps)
        scaled["training"] = step * whole_steps + saves * (1 + whole_steps / SAVE_EVERY / STAGES)
    return scaled


def planned_steps(spec: DistillationSpec, job: Job) -> int:
    """The optimiser steps of `job`, under the curriculum of `spec`."""
    curriculum = spec.curriculum.model_copy(update={"epochs_per_stage": job.epochs})
    return sum(stage.steps for stage in stage_table(spec.model_copy(update={"curriculum": curriculum}), job.rows))


def _specification(scratch: Path, job: Job, setting: Setting) -> DistillationSpec:
    teacher_dtype = setting.precision.weights
    parts = write_inputs(
        scratch,
        job.size,
        rows=job.rows,
        validation_rows=job.validation_rows,
        device=setting.device,
        teacher_dtype=teacher_dtype,
    )
    return resolve(
        {
            **parts,
            "curriculum": {
                "stages": STAGES,
                "epochs_per_stage": job.epochs,
                "ranking": {"max_new_tokens": job.new_tokens},
            },
            "training": {"batch_size": job.batch_size, "precision": setting.precision.name},
            "evaluation": {"max_new_tokens": job.new_tokens},
            "checkpoints": {"every_steps": SAVE_EVERY},
            "resources": {"device": setting.device.type, "threads": torch.get_num_threads()},
        }
    )
