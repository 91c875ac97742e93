"""A whole distillation with all its overhead: ranking, teacher, four stages, evaluations, checkpoints.

Ours is `pocl.run.run`. The published recipe does the same work by its own means: see `rivals.published_run`.
"""

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from bench.machine import Machine
from bench.protocol import OURS, Rival, Work, add_timing_arguments, precision_of, time_interleaved
from bench.report import Figure, Report, timing_rows
from bench.rivals import PUBLISHED
from bench.rivals.published_run import published_run
from bench.sizes import SIZES
from bench.whole_run import Phases, Stopwatch, write_inputs
from pocl.models.precision import choose_device
from pocl.plan import stage_table
from pocl.run import run as distil
from pocl.spec import DistillationSpec
from pocl.spec.presets import resolve

STAGES = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_timing_arguments(parser, rounds=1, memory=False)
    parser.add_argument("--size", choices=SIZES, default="ci")
    parser.add_argument("--rows", type=int, default=24, help="number of training samples (default 24)")
    parser.add_argument("--validation-rows", type=int, default=8, help="number of validation samples (default 8)")
    parser.add_argument("--epochs", type=int, default=2, help="epochs of each stage; 8 in the paper (default 2)")
    parser.add_argument(
        "--new-tokens", type=int, default=64, help="most tokens of an answer; 256 in the paper (default 64)"
    )


def run(args: argparse.Namespace) -> Report:
    machine = Machine.measure()
    phases: dict[str, Phases] = {}
    with tempfile.TemporaryDirectory(prefix="pocl-bench-") as scratch:
        spec = _inputs(Path(scratch), args)
        works: dict[str, Callable[[Path, Stopwatch], object]] = {
            OURS: lambda workdir, watch: distil(spec, workdir, watch.sink),
            PUBLISHED: lambda workdir, watch: published_run(spec, workdir, watch.enter),
        }
        rivals = [
            Rival(name, partial(_timed_phases, name, work, Path(scratch), phases)) for name, work in works.items()
        ]
        timings = time_interleaved(rivals, args.rounds, warm_up=False)
    steps = sum(stage.steps for stage in stage_table(spec, args.rows))
    results = timing_rows(timings)
    for row in results:
        row.update(_phase_columns(phases[str(row["name"])], phases))
    return Report(
        "curriculum",
        {
            "size": args.size,
            "V": SIZES[args.size].vocabulary,
            "rows": args.rows,
            "stages": STAGES,
            "epochs": args.epochs,
            "steps": steps,
            "new tokens": args.new_tokens,
            "dtype": spec.training.precision,
            "rounds": args.rounds,
        },
        results,
        machine,
        notes=(
            "Phases are those of the last round, in seconds.",
            f"A sample is visited {args.epochs * (STAGES + 1) / 2:g} times on average, 20 times in the paper: "
            "the more visits, the less our one pass of the teacher weighs.",
        ),
    )


def _phase_columns(seconds: Phases, phases: dict[str, Phases]) -> dict[str, Figure]:
    names = dict.fromkeys(name for each in phases.values() for name in each)
    return {f"{name}_s": seconds.get(name) for name in names}


def _timed_phases(
    name: str, work: Callable[[Path, Stopwatch], object], scratch: Path, phases: dict[str, Phases]
) -> Work:
    """Do `work` in a new directory, and put the seconds of its phases into `phases`."""

    def run_once() -> None:
        watch = Stopwatch()
        with tempfile.TemporaryDirectory(dir=scratch) as workdir:
            work(Path(workdir), watch)
            watch.enter("end")
        phases[name] = watch.seconds

    return run_once


def _inputs(scratch: Path, args: argparse.Namespace) -> DistillationSpec:
    """Write models, tokenizer and data to disk; the specification that names them."""
    parts = write_inputs(
        scratch, SIZES[args.size], rows=args.rows, validation_rows=args.validation_rows, device=choose_device("cpu")
    )
    return resolve(
        {
            **parts,
            "curriculum": {
                "stages": STAGES,
                "epochs_per_stage": args.epochs,
                "ranking": {"max_new_tokens": args.new_tokens},
            },
            "training": {"batch_size": 8, "precision": precision_of(args).name},
            "evaluation": {"max_new_tokens": args.new_tokens, "batch_size": 16},
            "checkpoints": {"every_steps": 1_000_000, "keep": 1},
            "resources": {"device": "cpu", "threads": args.threads},
        }
    )
