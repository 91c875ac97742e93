"""Two processes on one device that open a full cache at once, and what each of them computes of the teacher.

`python -m bench.gpu.second_job SETTINGS` is one such process.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import ours
from bench.gpu.scale import SCALES, Scale
from bench.gpu.section import Section, Setting
from bench.gpu.targets import SECOND_JOB
from bench.lengths import random_samples, representative_lengths
from bench.memory import ROOT
from bench.sizes import build_model, set_mode
from pocl.data.batches import collate
from pocl.models.precision import Precision

_JOBS = 2
_READ_AT_ONCE = 16


@dataclass(frozen=True)
class Opening:
    """What it cost a process to open the cache and to read every sample's states."""

    teacher_flops: int
    """Operations of all products, none of which is the student's."""
    seconds: float


def measure_second_job(setting: Setting) -> Section:
    """Fill a cache in this process, and open it in two others at once."""
    scale, precision = setting.scale, setting.precision
    with tempfile.TemporaryDirectory(prefix="pocl-bench-") as directory:
        openings = {"fills the empty cache": _open(Path(directory), scale, precision)}
        settings = {
            "directory": directory,
            "scale": scale.name,
            "precision": precision.name,
            "device": str(precision.device),
        }
        for number, opening in enumerate(_open_in_processes(settings), start=1):
            openings[f"process {number} of the full cache"] = opening
    return Section(
        f"opening the cache of {scale.filled.name}'s teacher, {scale.rows} samples, {_JOBS} processes at once",
        [{"name": name, **asdict(opening)} for name, opening in openings.items()],
        {SECOND_JOB: float(opening.teacher_flops)},
    )


def _open_in_processes(settings: dict[str, Any]) -> list[Opening]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-m", "bench.gpu.second_job", json.dumps(settings)]
    jobs = [subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) for _ in range(_JOBS)]
    printed = [job.communicate()[0] for job in jobs]
    if any(job.returncode for job in jobs):
        raise RuntimeError("a process that opens the full cache failed")
    return [Opening(**json.loads(output.splitlines()[-1])) for output in printed]


def _open(directory: Path, scale: Scale, precision: Precision) -> Opening:
    size = scale.filled
    model = build_model(size.teacher_config, device=precision.device, dtype=precision.weights)
    teacher = set_mode(model, train=False).requires_grad_(False)
    samples = random_samples(representative_lengths(scale.rows), size.vocabulary)
    start = time.perf_counter()
    with (
        FlopCounterMode(display=False) as counter,
        ours.filled_teacher(teacher, samples, precision, directory) as signal,
    ):
        for first in range(0, len(samples), _READ_AT_ONCE):
            signal.hidden(collate(samples[first : first + _READ_AT_ONCE], device=precision.device))
    return Opening(int(counter.get_total_flops()), time.perf_counter() - start)


def main(settings: str) -> None:
    given = json.loads(settings)
    precision = Precision(given["precision"], torch.device(given["device"]))
    print(json.dumps(asdict(_open(Path(given["directory"]), SCALES[given["scale"]], precision))))


if __name__ == "__main__":
    main(sys.argv[1])
