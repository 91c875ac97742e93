"""`python -m bench gpu`: every figure that has a target on a GPU, in one run, and which targets are met.

Where there is no GPU all of it runs on the CPU at smaller sizes, and what only a GPU has is *not run*.
"""

import argparse
import gc
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.gpu.answers import measure_answers
from bench.gpu.filling import measure_filling
from bench.gpu.job import measure_job
from bench.gpu.scale import Scale, choose_scale
from bench.gpu.scoring import measure_scoring
from bench.gpu.second_job import measure_second_job
from bench.gpu.section import Section, Setting
from bench.gpu.steps import measure_steps
from bench.gpu.targets import SECOND_JOB, judge
from bench.machine import Machine
from bench.report import table, to_json
from pocl.models.precision import choose_device, choose_precision

PARTS = ("steps", "answers", "scoring", "filling", "second_job", "job")


@dataclass
class GpuReport:
    """All figures of a run, which grows as they are measured."""

    machine: Machine
    scale: Scale
    device: str
    sections: dict[str, Section] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    """Why a figure could not be measured, by its name."""

    @property
    def failure(self) -> str | None:
        return None if not self.failures else "; ".join(f"{name}: {why}" for name, why in self.failures.items())

    def text(self) -> str:
        parts = [f"gpu: {self.scale.name} sizes on {self.device}", self.machine.text()]
        parts += [section.text() for section in self.sections.values()]
        parts += [f"{name} failed: {why}" for name, why in self.failures.items()]
        parts.append("targets\n" + table(judge(self._measured())))
        if not self.scale.has_targets:
            parts.append("The targets are for a GPU and the whole sizes: all but the last are not run here.")
        return "\n\n".join(parts)

    def record(self) -> dict[str, Any]:
        return {
            "command": "gpu",
            "settings": {"device": self.device, "sizes": self.scale.name},
            "machine": asdict(self.machine),
            "sections": {name: asdict(section) for name, section in self.sections.items()},
            "failures": self.failures,
            "targets": list(judge(self._measured())),
            "failure": self.failure,
        }

    def _measured(self) -> dict[str, float]:
        """What counts towards a target: everything at the sizes that it is for, and operations, counted at any size."""
        every = {key: value for section in self.sections.values() for key, value in section.measured.items()}
        return every if self.scale.has_targets else {key: every[key] for key in every.keys() & {SECOND_JOB}}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--quick", action="store_true", help="toy sizes: it shows that all of it runs, in seconds")
    parser.add_argument("--whole", action="store_true", help="run all of the job, not a part to extrapolate from")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="these figures alone")


def run(args: argparse.Namespace) -> GpuReport:
    device = choose_device(args.device)
    precision = choose_precision(args.dtype, device)
    scale = choose_scale(device, quick=args.quick)
    start = time.perf_counter()

    def say(line: str) -> None:
        print(f"[{time.perf_counter() - start:6.1f} s] {line}", file=sys.stderr, flush=True)

    say("matrix peak")
    machine = Machine.measure(device, scale.matrix_side)
    setting = Setting(scale, precision, machine.peak_gflops[precision.name], say)
    report = GpuReport(machine, scale, str(device))
    # Garbage is collected before everything that is timed; what is there already need not be looked at each time.
    gc.freeze()
    for name, measure in _figures(setting, args.only, whole=args.whole):
        say(name)
        try:
            report.sections[name] = measure()
        except Exception as error:  # noqa: BLE001  # The other figures are measured all the same; this one is reported.
            report.failures[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            say(f"  failed: {report.failures[name]}")
        _free()
        if args.json is not None:
            _write(args.json, report)
    gc.unfreeze()
    say("done")
    return report


def _figures(setting: Setting, only: Sequence[str], *, whole: bool) -> list[tuple[str, Callable[[], Section]]]:
    figures: dict[str, list[tuple[str, Callable[[], Section]]]] = {
        "steps": [(f"step {size.name}", partial(measure_steps, setting, size)) for size in setting.scale.pairs],
        "answers": [("answers", partial(measure_answers, setting))],
        "scoring": [("scoring", partial(measure_scoring, setting))],
        "filling": [("filling", partial(measure_filling, setting))],
        "second_job": [("second job", partial(measure_second_job, setting))],
        "job": [("job", partial(measure_job, setting, whole=whole))],
    }
    return [figure for part in PARTS if part in only for figure in figures[part]]


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _write(file: Path, report: GpuReport) -> None:
    """What is measured so far, so that a run that is cut off has left it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(to_json(report))
