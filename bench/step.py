"""One optimiser step over samples as long as Dolly's: forward, backward, clipping and AdamW."""

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
from bench.machine import Machine, synchronize
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
from pocl.train.state import MetricRow

FILL = "teacher cache, filled once"
TEMPERATURE, KD_WEIGHT = 1.0, 0.7
"""The values of the first stage: at temperature 1 all rivals have the same divergence."""
VISITS = 20
"""The mean number of visits of a sample in the paper: E (n + 1) / 2, with E = 8 epochs and n = 4 stages."""
FP32_LIMIT = 1e-4


@dataclass
class StepFixture:
    """Models, optimiser and samples, shared by all rivals. The learning rate leaves the weights as they are."""

    pair: ModelPair
    precision: Precision
    samples: Sequence[EncodedSample]
    rows_at_once: int | None = None
    """Samples of a micro-batch of the others; None for all in one. Ours cuts its own."""
    last_results: dict[str, Any] = field(default_factory=dict)
    """What the last step of each rival returned."""

    @cached_property
    def spec(self) -> DistillationSpec:
        return ours.step_spec(len(self.samples))

    @cached_property
    def optimizer(self) -> AdamW:
        return ours.optimizer_of(self.pair.student, self.spec)

    @cached_property
    def stored(self) -> TeacherSignal:
        return self.fill()

    def fill(self) -> TeacherSignal:
        """Fill a new teacher cache."""
        return ours.stored_teacher(self.pair.teacher, self.samples, self.precision)

    def work(self, name: str, step: Callable[[Sequence[EncodedSample]], object]) -> Work:
        """A step of the rival `name` over the samples, whose result is noted."""

        def run_step() -> None:
            self.last_results[name] = step(self.samples)
            synchronize(self.precision.device)

        return run_step


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_timing_arguments(parser)
    parser.add_argument(
        "--size",
        choices=SIZES,
        default="ci",
        help="size of the models; a round of `lab` takes minutes in fp32 (default ci)",
    )
    parser.add_argument("--rows", type=int, default=8, help="number of samples of the step (default 8)")


def rivals(args: argparse.Namespace) -> list[Rival]:
    return step_rivals(_fixture(args))


def run(args: argparse.Namespace) -> Report:
    machine = Machine.measure()
    fixture = _fixture(args)
    fill = Rival(FILL, lambda: fixture.fill)
    timings = time_interleaved([*step_rivals(fixture), fill], args.rounds)
    filled = timings.pop(FILL)
    checks = agreement(fixture)
    require_agreement(FP32_LIMIT if fixture.precision.name == "fp32" else None, checks)
    share_of_fill = filled.median / VISITS
    results = timing_rows(timings, peak_memories(args, list(timings)), once=share_of_fill)
    _add_rates(results, fixture, machine.peak_gflops[fixture.precision.name])
    return Report(
        "step",
        {
            "size": args.size,
            "V": fixture.pair.size.vocabulary,
            "rows": args.rows,
            "tokens": _tokens(fixture.samples),
            "response tokens": _response_tokens(fixture.samples),
            "dtype": fixture.precision.name,
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
            "The published recipe pads to 512; the two of TRL pad to the longest sample and compute no cross-entropy.",
        ),
    )


def _fixture(args: argparse.Namespace) -> StepFixture:
    precision, size = precision_of(args), SIZES[args.size]
    return StepFixture(
        ModelPair(size, precision.weights),
        precision,
        random_samples(representative_lengths(args.rows), size.vocabulary),
    )


def step_rivals(fixture: StepFixture) -> list[Rival]:
    return [
        Rival(OURS, partial(_ours, fixture)),
        Rival(PUBLISHED, partial(_published, fixture)),
        Rival(GKD, partial(_gkd, fixture)),
        Rival(DISTILLATION, partial(_distillation, fixture)),
    ]


def compiled_steps(fixture: StepFixture) -> list[Rival]:
    """Ours with what is off unless it is asked for, and is for a GPU alone."""
    switches = {"compiled": (True, False), "compiled, CUDA graphs": (True, True)}
    return [
        Rival(
            f"{OURS}, {name}",
            partial(
                _ours,
                fixture,
                f"{OURS}, {name}",
                ours.step_spec(len(fixture.samples), compiled=compiled, graphs=graphs),
            ),
        )
        for name, (compiled, graphs) in switches.items()
    ]


def _ours(fixture: StepFixture, name: str = OURS, spec: DistillationSpec | None = None) -> Work:
    step = ours.OurStep(
        fixture.pair.student,
        fixture.stored,
        fixture.optimizer,
        spec or fixture.spec,
        fixture.precision,
        temperature=TEMPERATURE,
        kd_weight=KD_WEIGHT,
    )
    return fixture.work(name, step)


def _published(fixture: StepFixture) -> Work:
    step = PublishedStep(
        fixture.pair.student,
        fixture.pair.teacher,
        fixture.optimizer,
        fixture.precision,
        temperature=TEMPERATURE,
        kd_weight=KD_WEIGHT,
        rows_at_once=fixture.rows_at_once,
    )
    return fixture.work(PUBLISHED, step)


def _gkd(fixture: StepFixture) -> Work:
    gkd_trainer()
    step = GKDStep(
        fixture.pair.student,
        fixture.pair.teacher,
        fixture.optimizer,
        fixture.precision,
        rows_at_once=fixture.rows_at_once,
    )
    return fixture.work(GKD, step)


def _distillation(fixture: StepFixture) -> Work:
    chunked_divergence()
    step = DistillationStep(
        fixture.pair.student,
        fixture.pair.teacher,
        fixture.optimizer,
        fixture.precision,
        rows_at_once=fixture.rows_at_once,
    )
    return fixture.work(DISTILLATION, step)


def agreement(fixture: StepFixture) -> dict[str, float]:
    """The differences of the rivals' last losses from ours; all had the same weights, which no step moves."""
    results = fixture.last_results
    our_step: MetricRow = results[OURS]
    assert our_step.divergence is not None  # The method has one.
    checks = {}
    if PUBLISHED in results:
        entropy_term = KD_WEIGHT * _teacher_entropy(fixture)
        checks[f"{PUBLISHED}: loss differs by"] = difference(our_step.loss, results[PUBLISHED] - entropy_term)
    for name in (GKD, DISTILLATION):
        if name in results:
            checks[f"{name}: divergence differs by"] = difference(our_step.divergence, results[name])
    return checks


def _teacher_entropy(fixture: StepFixture) -> float:
    """The teacher's entropy at temperature 1, in nats per response token, which the published loss includes."""
    total = 0.0
    for sample in fixture.samples:
        batch = collate([sample], device=fixture.precision.device)
        log_p = torch.log_softmax(teacher_logits(fixture.stored, batch), dim=-1)
        total -= (log_p.exp() * log_p).sum().item()
    return total / _response_tokens(fixture.samples)


def _add_rates(results: Sequence[dict[str, Figure]], fixture: StepFixture, peak: float | None) -> None:
    flops = _useful_flops(fixture)
    for row in results:
        seconds = row["median_s"]
        assert isinstance(seconds, float)  # timing_rows puts a float there.
        row["tokens_per_s"] = _tokens(fixture.samples) / seconds
        row["share_of_peak_%"] = None if peak is None else 100 * flops / seconds / 1e9 / peak


def _useful_flops(fixture: StepFixture) -> float:
    """Operations that the step needs: 6 per student weight and token, 2 per teacher weight; heads at labels only."""
    student, teacher = fixture.pair.student, fixture.pair.teacher
    heads = [model.get_input_embeddings().get_parameter("weight").numel() for model in (student, teacher)]
    bodies = [model.num_parameters() - head for model, head in zip((student, teacher), heads, strict=True)]
    tokens, response = _tokens(fixture.samples), _response_tokens(fixture.samples)
    return (6 * bodies[0] + 2 * bodies[1] / VISITS) * tokens + (6 * heads[0] + 2 * heads[1]) * response


def _tokens(samples: Sequence[EncodedSample]) -> int:
    return sum(len(sample.input_ids) for sample in samples)


def _response_tokens(samples: Sequence[EncodedSample]) -> int:
    return sum(len(sample.reference_ids) for sample in samples)
