"""Floating-point operations of each visit of a sample, counted on the training code itself: no clock, no noise.

The paper's geometry, GPT-2 XL to GPT-2 base with 50257 tokens, is counted exactly without being run whole:
operations are affine in the layers of student and teacher and in the vocabulary. They are counted at one and two
layers and at two small vocabularies, and extrapolated. Widths, heads and samples are the real ones. All of the step is
run but the products themselves.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from transformers import PreTrainedModel

from bench import ours
from bench.counting import count_flops
from bench.lengths import random_samples, representative_lengths
from bench.protocol import OURS
from bench.report import Figure, Report
from bench.rivals import DISTILLATION, GKD, PUBLISHED
from bench.rivals.published import PublishedStep
from bench.rivals.trl_distillation import DistillationStep
from bench.rivals.trl_gkd import GKDStep
from bench.sizes import build_model, gpt2, set_mode
from bench.step import KD_WEIGHT, TEMPERATURE, VISITS
from pocl.data.batches import EncodedSample
from pocl.models.precision import Precision, choose_device
from pocl.teacher.signal import TeacherSignal

BATCH, PER_DEVICE = 64, 16
"""Samples of an optimiser step in the paper, and of one device's part of it."""
_SMALL_VOCABULARY = 512


@dataclass(frozen=True)
class Geometry:
    """The sizes of a pair of GPT-2 models."""

    student_layers: int
    teacher_layers: int
    vocabulary: int
    student_width: int = 768
    teacher_width: int = 1600
    student_heads: int = 12
    teacher_heads: int = 25

    def models(self) -> tuple[PreTrainedModel, PreTrainedModel]:
        """The student in train mode, and the teacher in eval mode."""
        student = build_model(gpt2(self.student_layers, self.student_width, self.student_heads, self.vocabulary))
        teacher = build_model(gpt2(self.teacher_layers, self.teacher_width, self.teacher_heads, self.vocabulary))
        return set_mode(student, train=True), set_mode(teacher, train=False).requires_grad_(False)


PAPER = Geometry(student_layers=12, teacher_layers=48, vocabulary=50257)
Count = Callable[[Geometry], float]
"""The operations of a visit, counted at a geometry."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rows", type=int, default=BATCH, help=f"number of samples of our optimiser step (default {BATCH})"
    )
    parser.add_argument("--without-trl", action="store_true", help="count only ours and the published recipe")


def run(args: argparse.Namespace) -> Report:
    lengths = representative_lengths(args.rows)
    counts: dict[str, Count] = {OURS: partial(count_ours, lengths), PUBLISHED: count_published}
    if not args.without_trl:
        part = representative_lengths(min(args.rows, PER_DEVICE))
        counts[GKD] = partial(_count_rival, lambda *models: GKDStep(*models), part)
        counts[DISTILLATION] = partial(_count_rival, lambda *models: DistillationStep(*models), part)
    figures = {name: extrapolate(count, PAPER) for name, count in counts.items()}
    results: list[dict[str, Figure]] = [
        {"name": name, "GFLOP_per_visit": figure / 1e9, "times_ours": figure / figures[OURS]}
        for name, figure in figures.items()
    ]
    return Report(
        "flops",
        {
            "student": "GPT-2 base",
            "teacher": "GPT-2 XL",
            "V": PAPER.vocabulary,
            "rows": args.rows,
            "visits": VISITS,
        },
        results,
        notes=(
            f"Ours: the student's step and a {VISITS}th of the teacher's only pass over the sample.",
            "Counted at one and two layers and at small vocabularies, and extrapolated: the count is affine in each.",
            f"TRL pads to the longest of {PER_DEVICE} samples, a device's part of the paper's batch.",
        ),
    )


def extrapolate(count: Count, geometry: Geometry, small: int = _SMALL_VOCABULARY) -> float:
    """`count(geometry)` from counts at one and two layers and at the vocabularies `small` and `2 * small`.

    Exact, since no operation mixes the three sizes.
    """
    smallest = replace(geometry, student_layers=1, teacher_layers=1, vocabulary=small)
    base = count(smallest)
    student = count(replace(smallest, student_layers=2)) - base
    teacher = count(replace(smallest, teacher_layers=2)) - base
    token = (count(replace(smallest, vocabulary=2 * small)) - base) / small
    return (
        base
        + student * (geometry.student_layers - 1)
        + teacher * (geometry.teacher_layers - 1)
        + token * (geometry.vocabulary - small)
    )


def count_ours(lengths: Sequence[tuple[int, int]], geometry: Geometry) -> float:
    """The operations of our step with the teacher's hidden states cached, and its share of filling the cache."""
    student, teacher = geometry.models()
    samples, precision, spec = random_samples(lengths, geometry.vocabulary), _precision(), ours.step_spec(len(lengths))
    stored: list[TeacherSignal] = []
    filling = count_flops(lambda: stored.append(ours.stored_teacher(teacher, samples, precision)))
    step = ours.OurStep(
        student,
        stored[0],
        ours.optimizer_of(student, spec),
        spec,
        precision,
        temperature=TEMPERATURE,
        kd_weight=KD_WEIGHT,
    )
    return (count_flops(partial(step, samples)) + filling / VISITS) / len(samples)


def count_published(geometry: Geometry) -> float:
    """The operations of the published step; all samples cost the same, since they are padded to 512 tokens."""
    return _count_rival(
        partial(PublishedStep, temperature=TEMPERATURE, kd_weight=KD_WEIGHT), representative_lengths(1), geometry
    )


def _count_rival(make_step: Callable[..., Any], lengths: Sequence[tuple[int, int]], geometry: Geometry) -> float:
    student, teacher = geometry.models()
    samples: list[EncodedSample] = random_samples(lengths, geometry.vocabulary)
    optimizer = ours.optimizer_of(student, ours.step_spec(len(samples)))
    step = make_step(student, teacher, optimizer, _precision())
    return count_flops(partial(step, samples)) / len(samples)


def _precision() -> Precision:
    return Precision("fp32", choose_device("cpu"))
