"""`python -m bench gpu`: all of it at toy sizes on the CPU, and the arithmetic of what only a GPU shows."""

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu.activity import Activity
from bench.gpu.command import PARTS, run
from bench.gpu.job import JobWatch, extrapolate
from bench.gpu.rounds import time_contenders
from bench.gpu.scale import TOY, WHOLE, Job
from bench.gpu.targets import BUSY, JOB, SECOND_JOB, TARGETS, judge
from bench.protocol import OURS, Rival, Work
from bench.report import to_json
from bench.rivals import GKD, PUBLISHED
from pocl.events import PhaseChanged, StageFinished, StepLogged

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.system
def test_everything_but_processes_runs_at_toy_size_on_a_cpu(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    parts = [part for part in PARTS if part != "second_job"]
    report = run(Namespace(device="cpu", dtype="fp32", quick=True, whole=False, only=parts, json=file))
    assert report.failure is None
    # What was measured is written as it is measured.
    record = json.loads(file.read_text())
    assert record == json.loads(to_json(report))
    assert list(record["sections"]) == [
        *(f"step {size.name}" for size in TOY.pairs),
        "answers",
        "scoring",
        "filling",
        "job",
    ]
    for size in TOY.pairs:
        rows = {row["name"]: row for row in record["sections"][f"step {size.name}"]["rows"]}
        assert rows[OURS]["outcome"] == rows[PUBLISHED]["outcome"] == "measured"
        assert rows[GKD]["outcome"] in ("measured", "not installed: trl")
        # What only a GPU has.
        assert rows[OURS]["launches"] is rows[OURS]["gpu_busy_%"] is None
        assert all(value < 1e-4 for value in record["sections"][f"step {size.name}"]["checks"].values())
    assert all(row["first_tokens_equal_%"] == 100 for row in record["sections"]["answers"]["rows"])
    assert all(value < 1e-4 for value in record["sections"]["scoring"]["checks"].values())
    assert {row["outcome"] for row in record["targets"]} == {"not run"}
    assert "EXTRAPOLATED" in report.text()


@pytest.mark.slow
def test_the_command_runs_at_toy_size_on_a_cpu(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    printed = subprocess.run(
        [sys.executable, "-m", "bench", "gpu", "--device", "cpu", "--quick", "--threads", "1", "--json", str(file)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    record = json.loads(file.read_text())
    assert len(record["targets"]) == len(TARGETS)
    assert "targets" in printed
    openings = record["sections"]["second job"]["rows"]
    assert openings[0]["teacher_flops"] > 0


def test_a_rival_that_fails_is_reported_and_the_others_are_timed() -> None:
    def absent() -> Work:
        raise ModuleNotFoundError("No module named 'rival'", name="rival")

    def too_large() -> object:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def broken() -> object:
        raise RuntimeError("no kernel\nimage")

    rivals = [
        Rival(OURS, lambda: lambda: None),
        Rival("absent", absent),
        Rival("large", lambda: too_large),
        Rival("broken", lambda: broken),
    ]
    contenders = {contender.name: contender for contender in time_contenders(rivals, 2)}
    timing = contenders[OURS].timing
    assert timing is not None
    assert len(timing.seconds) == 2
    assert {name: each.failure for name, each in contenders.items()} == {
        OURS: None,
        "absent": "not installed: rival",
        "large": "out of memory",
        "broken": "failed: RuntimeError: no kernel image",
    }
    assert all(each.timing is None and each.work is None for name, each in contenders.items() if name != OURS)


def traced(category: str, name: str, start: float, duration: float) -> dict[str, Any]:
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": duration}


def test_activity_is_the_union_of_kernels_and_the_calls_of_the_host() -> None:
    events = [
        {"ph": "M", "name": "process_name"},
        traced("cpu_op", "aten::mm", 0, 1000),
        traced("cuda_runtime", "cudaLaunchKernel", 1, 2),
        traced("cuda_driver", "cuLaunchKernelEx", 3, 2),
        traced("cuda_runtime", "cudaGraphLaunch", 5, 2),
        traced("cuda_runtime", "cudaMemcpyAsync", 7, 2),
        traced("cuda_runtime", "cudaStreamSynchronize", 9, 50),
        traced("cuda_runtime", "cudaDeviceSynchronize", 60, 50),
        # Two streams overlap, and a copy lies apart.
        traced("kernel", "gemm", 10, 20),
        traced("kernel", "softmax", 20, 20),
        traced("kernel", "inside", 25, 5),
        traced("gpu_memcpy", "Memcpy DtoH", 50, 10),
    ]
    activity = Activity.from_trace(events)
    assert activity.busy_seconds == pytest.approx(40e-6)
    assert (activity.launches, activity.synchronisations) == (3, 1)
    assert Activity.from_trace([]) == Activity(0, 0, 0)


def test_targets_are_met_missed_or_not_run() -> None:
    outcomes = {row["figure"]: row["outcome"] for row in judge({BUSY: 70.0, JOB: 480.0, SECOND_JOB: 1.0})}
    by_key = {target.key: outcomes[target.text] for target in TARGETS}
    assert (by_key[BUSY], by_key[JOB], by_key[SECOND_JOB]) == ("must met", "aim met", "missed")
    assert set(by_key.values()) == {"must met", "aim met", "missed", "not run"}


def test_every_target_is_at_least_as_hard_to_aim_at_as_to_meet() -> None:
    for target in TARGETS:
        assert (target.aim <= target.must) if target.lower_is_better else (target.aim >= target.must)


def test_the_whole_job_follows_from_a_part() -> None:
    """A job whose costs are known, part of which is run on a simulated clock."""
    part = Job(WHOLE.filled, rows=10, validation_rows=2, epochs=1, new_tokens=1)
    whole = Job(WHOLE.filled, rows=100, validation_rows=20, epochs=8, new_tokens=1)
    now = 0.0
    watch = JobWatch(clock=lambda: now)

    def spend(phase: str, seconds: float) -> None:
        nonlocal now
        watch.sink(PhaseChanged(phase=phase))
        now += seconds

    def step(seconds: float) -> None:
        nonlocal now
        now += seconds
        watch.sink(logged(watch.steps + 1))

    now += 1  # loading
    spend("ranking", 10)
    spend("caching_teacher", 12)
    for stage in range(4):
        watch.sink(PhaseChanged(phase="training", stage=stage))
        for _ in range(5):
            step(2)
        now += 3  # the save at its end
        watch.sink(StageFinished(stage=stage, step=watch.steps, epochs=1))
        spend("evaluating", 1)
    watch.phases.enter("end")
    seconds = extrapolate(watch, part, whole, whole_steps=800)
    assert seconds["loading"] == 1
    assert seconds["ranking"] == 100
    assert seconds["caching_teacher"] == 120
    assert seconds["evaluating"] == 40
    # 800 steps, a save at each of four stages, and one every 200 steps.
    assert seconds["training"] == pytest.approx(800 * 2 + 3 * (4 + 4))


def logged(step: int) -> StepLogged:
    return StepLogged(
        step=step,
        stage=0,
        total_steps=20,
        loss=1.0,
        cross_entropy=1.0,
        divergence=None,
        temperature=1.0,
        kd_weight=1.0,
        learning_rate=1e-4,
        grad_norm=1.0,
        tokens=1,
        tokens_seen=step,
        tokens_per_second=1.0,
        eta_seconds=1.0,
    )
