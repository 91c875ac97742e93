"""One optimiser step over rows as long as Dolly's: forward, backward, clipping and AdamW."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch.optim import AdamW

from bench import ours
from bench.agreement import difference, require_agreement
from bench.lengths import random_samples, representative_lengths
from bench.machine import Machine
from bench.memory import peak_memories
from bench.protocol import OURS, Rival, Work, add_timing_arguments, precision_of, time_interleaved
from bench.report import Figure, Report, timing_rows
from bench.rivals import DISTILLATION, GKD, PUBLISHED
from bench.rivals.published import PublishedStep
from bench.rivals.trl_distillation import DistillationStep, chunked_divergence
from bench.rivals.trl_gkd import GKDStep, gkd_trainer
from bench.sizes import SIZES, ModelPair
from pocl.data.batches import EncodedSample, collate
from pocl.models.precision import Precision
from pocl.spec import DistillationSpec
from pocl.teacher.signal import TeacherSignal, teacher_logits
from pocl.train.checkpoint import MetricRow

FILL = "teacher cache, filled once"
TEMPERATURE, KD_WEIGHT = 1.0, 0.7
"""Of the first stage: at temperature 1 all rivals have one divergence."""
VISITS = 20
"""How often a sample is visited on average in the paper: E (n + 1) / 2, E = 8 epochs, n = 4 stages."""
FP32_LIMIT = 1e-4


@dataclass
class StepFixture:
    """Models, optimiser and rows, shared by all rivals. The learning rate leaves the weights as they are."""

    pair: ModelPair
    precision: Precision
    rows: Sequence[EncodedSample]
    last: dict[str, Any] = field(default_factory=dict)
    """What each rival's last step returned."""

    @cached_property
    def spec(self) -> DistillationSpec:
        return ours.step_spec(len(self.rows))

    @cached_property
    def optimizer(self) -> AdamW:
        return ours.optimizer_of(self.pair.student, self.spec)

    @cached_property
    def stored(self) -> TeacherSignal:
        return self.fill()

    def fill(self) -> TeacherSignal:
        return ours.stored_teacher(self.pair.teacher, self.rows, self.precision)

    def work(self, name: str, step: Callable[[Sequence[EncodedSample]], object]) -> Work:
        def once() -> None:
            self.last[name] = step(self.rows)

        return once


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_timing_arguments(parser)
    parser.add_argument("--size", choices=SIZES, default="ci", help="models; a round of `lab` takes minutes in fp32")
    parser.add_argument("--rows", type=int, default=8, help="of the step (default 8)")


def rivals(args: argparse.Namespace) -> list[Rival]:
    return _rivals(_set_of(args))


def run(args: argparse.Namespace) -> Report:
    machine = Machine.measure()
    shared = _set_of(args)
    fill = Rival(FILL, lambda: shared.fill)
    timings = time_interleaved([*_rivals(shared), fill], args.rounds)
    filled = timings.pop(FILL)
    checks = _agreement(shared)
    require_agreement(FP32_LIMIT if shared.precision.name == "fp32" else None, checks)
    share_of_fill = filled.median / VISITS
    results = timing_rows(timings, peak_memories(args, list(timings)), once=share_of_fill)
    _add_rates(results, shared, machine.peak_gflops[shared.precision.name])
    return Report(
        "step",
        {
            "size": args.size,
            "V": shared.pair.size.vocabulary,
            "rows": args.rows,
            "tokens": _tokens(shared.rows),
            "response tokens": _response_tokens(shared.rows),
            "dtype": shared.precision.name,
            "rounds": args.rounds,
            "cache fill s": round(filled.median, 3),
        },
        results,
        machine,
        checks,
        notes=(
            f"The ratios charge us a {VISITS}th of the cache fill: a sample is visited {VISITS} times in the paper.",
            "Share of peak: products that the step needs, padding left out and the teacher's body run once in "
            f"{VISITS} visits, over the time, over the matrix peak.",
            "The published recipe pads to 512; the two of TRL pad to the longest row and compute no cross-entropy.",
        ),
    )


def _set_of(args: argparse.Namespace) -> StepFixture:
    precision, size = precision_of(args), SIZES[args.size]
    return StepFixture(
        ModelPair(size, precision.weights),
        precision,
        random_samples(representative_lengths(args.rows), size.vocabulary),
    )


def _rivals(shared: StepFixture) -> list[Rival]:
    return [
        Rival(OURS, partial(_ours, shared)),
        Rival(PUBLISHED, partial(_published, shared)),
        Rival(GKD, partial(_gkd, shared)),
        Rival(DISTILLATION, partial(_distillation, shared)),
    ]


def _ours(shared: StepFixture) -> Work:
    step = ours.OurStep(
        shared.pair.student,
        shared.stored,
        shared.optimizer,
        shared.spec,
        shared.precision,
        temperature=TEMPERATURE,
        kd_weight=KD_WEIGHT,
    )
    return shared.work(OURS, step)


def _published(shared: StepFixture) -> Work:
    step = PublishedStep(
        shared.pair.student,
        shared.pair.teacher,
        shared.optimizer,
        shared.precision,
        temperature=TEMPERATURE,
        kd_weight=KD_WEIGHT,
    )
    return shared.work(PUBLISHED, step)


def _gkd(shared: StepFixture) -> Work:
    gkd_trainer()
    return shared.work(GKD, GKDStep(shared.pair.student, shared.pair.teacher, shared.optimizer, shared.precision))


def _distillation(shared: StepFixture) -> Work:
    chunked_divergence()
    step = DistillationStep(shared.pair.student, shared.pair.teacher, shared.optimizer, shared.precision)
    return shared.work(DISTILLATION, step)


def _agreement(shared: StepFixture) -> dict[str, float]:
    """The losses of the last steps. All saw the same weights, which no step moves."""
    mine: MetricRow = shared.last[OURS]
    assert mine.divergence is not None  # The method has one.
    left_out = KD_WEIGHT * _teacher_entropy(shared)
    return {
        f"{PUBLISHED}: loss differs by": difference(mine.loss, shared.last[PUBLISHED] - left_out),
        f"{GKD}: divergence differs by": difference(mine.divergence, shared.last[GKD]),
        f"{DISTILLATION}: divergence differs by": difference(mine.divergence, shared.last[DISTILLATION]),
    }


def _teacher_entropy(shared: StepFixture) -> float:
    """Nats per response token at temperature 1: what the published loss carries besides the divergence."""
    total = 0.0
    for row in shared.rows:
        log_p = torch.log_softmax(teacher_logits(shared.stored, collate([row])), dim=-1)
        total -= (log_p.exp() * log_p).sum().item()
    return total / _response_tokens(shared.rows)


def _add_rates(results: Sequence[dict[str, Figure]], shared: StepFixture, peak: float | None) -> None:
    flops = _useful_flops(shared)
    for row in results:
        seconds = row["median_s"]
        assert isinstance(seconds, float)  # timing_rows made it.
        row["tokens_per_s"] = _tokens(shared.rows) / seconds
        row["share_of_peak_%"] = None if peak is None else 100 * flops / seconds / 1e9 / peak


def _useful_flops(shared: StepFixture) -> float:
    """Products with weights: 6 per student weight and token, 2 per teacher weight; heads at response tokens only."""
    student, teacher = shared.pair.student, shared.pair.teacher
    heads = [model.get_input_embeddings().get_parameter("weight").numel() for model in (student, teacher)]
    bodies = [model.num_parameters() - head for model, head in zip((student, teacher), heads, strict=True)]
    tokens, response = _tokens(shared.rows), _response_tokens(shared.rows)
    return (6 * bodies[0] + 2 * bodies[1] / VISITS) * tokens + (6 * heads[0] + 2 * heads[1]) * response


def _tokens(rows: Sequence[EncodedSample]) -> int:
    return sum(len(row.input_ids) for row in rows)


def _response_tokens(rows: Sequence[EncodedSample]) -> int:
    return sum(len(row.reference_ids) for row in rows)
