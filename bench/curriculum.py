"""A whole distillation with all its overhead: ranking, teacher, four stages, evaluations, checkpoints.

Ours is `pocl.run.run`. The published recipe does the same work by its own means: see `rivals.published_run`.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bench.lengths import MAX_LENGTH, MAX_PROMPT_LENGTH, representative_lengths
from bench.machine import Machine
from bench.protocol import OURS, Rival, Work, add_timing_arguments, precision_of, time_interleaved
from bench.report import Figure, Report, timing_rows
from bench.rivals import PUBLISHED
from bench.rivals.published_run import published_run
from bench.sizes import SIZES, Size, build_model, llama
from pocl.data.prompting import Prompting, assistant_turns, token_ids
from pocl.data.samples import read_samples
from pocl.events import Event, PhaseChanged
from pocl.models.loading import save_model
from pocl.plan import stage_table
from pocl.run import run as distil
from pocl.spec import DistillationSpec
from pocl.spec.presets import resolve

STAGES = 4
_SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")

Phases = dict[str, float]
"""Seconds."""


class Stopwatch:
    """Sums the seconds of each phase."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._since = clock()
        self._phase = "loading"
        self.seconds: Phases = {}

    def enter(self, phase: str) -> None:
        now = self._clock()
        self.seconds[self._phase] = self.seconds.get(self._phase, 0.0) + now - self._since
        self._phase, self._since = phase, now

    def sink(self, event: Event) -> None:
        if isinstance(event, PhaseChanged):
            self.enter(event.phase)


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
    size = SIZES[args.size]
    tokenizer = word_tokenizer(size.vocabulary)
    for seed, (name, shape) in enumerate((("student", size.student), ("teacher", size.teacher))):
        save_model(build_model(llama(shape, size.vocabulary), seed), tokenizer, scratch / name)
    _write_samples(scratch / "train.jsonl", args.rows, size, tokenizer, seed=0)
    _write_samples(scratch / "validation.jsonl", args.validation_rows, size, tokenizer, seed=1)
    return resolve(
        {
            "teacher": {"path": str(scratch / "teacher")},
            "student": {"path": str(scratch / "student")},
            "data": {
                "train": {"path": str(scratch / "train.jsonl")},
                "validation": {"path": str(scratch / "validation.jsonl")},
                "template": "alpaca",
                "max_length": MAX_LENGTH,
                "max_prompt_length": MAX_PROMPT_LENGTH,
            },
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


def word_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each of the words w4, w5, ..., and one token for all others."""
    words = [*_SPECIAL, *(f"w{at}" for at in range(len(_SPECIAL), vocabulary))]
    backend = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def _write_samples(path: Path, count: int, size: Size, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
    """Write samples of random words, as long in tokens as Dolly's under the Alpaca template."""
    generator = torch.Generator().manual_seed(seed)

    def words(length: int) -> str:
        ids = torch.randint(len(_SPECIAL), size.vocabulary, (max(1, length),), generator=generator)
        return " ".join(f"w{at}" for at in ids.tolist())

    def line(prompt: int, response: int) -> str:
        row: dict[str, Any] = {"instruction": words(prompt), "input": "", "output": words(response)}
        return json.dumps(row) + "\n"

    path.write_text(line(1, 1))
    (turn,) = assistant_turns(read_samples(path)[0], tokenizer, Prompting.ALPACA, 0)
    template_tokens = len(token_ids(tokenizer, turn.prompt)) - 1
    path.write_text(
        "".join(line(prompt - template_tokens, response - 1) for prompt, response in representative_lengths(count))
    )
