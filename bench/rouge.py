"""ROUGE-L of answers as long as Dolly's: `pocl.evaluation.rouge` against the package `rouge_score` with its stemmer."""

import argparse
import json
import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from rouge_score.rouge_scorer import RougeScorer

from bench.lengths import dolly_lengths
from bench.machine import Machine
from bench.protocol import OURS, Rival, Work, add_timing_arguments, time_interleaved
from bench.report import Report, timing_rows
from pocl.evaluation.rouge import rouge_l

ROUGE_SCORE = "rouge_score"
_WORDS = Path(__file__).resolve().parent.parent / "examples" / "dolly-short" / "train.jsonl"
_WORDS_PER_TOKEN = 0.75
_REPEATED_SHARE = 0.5
"""The share of a reference's words that its answer repeats."""

Pairs = Sequence[tuple[str, str]]
"""(answer, reference)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_timing_arguments(parser, memory=False)
    parser.add_argument("--pairs", type=int, default=500, help="number of answers, each with a reference (default 500)")


def run(args: argparse.Namespace) -> Report:
    machine = Machine.measure()
    answers = answer_pairs(args.pairs)
    scores: dict[str, list[float]] = {}

    def prepare(name: str, score: Callable[[Pairs], list[float]]) -> Work:
        return lambda: scores.update({name: score(answers)})

    rivals = [
        Rival(OURS, partial(prepare, OURS, ours)),
        Rival(ROUGE_SCORE, partial(prepare, ROUGE_SCORE, theirs)),
    ]
    timings = time_interleaved(rivals, args.rounds)
    differ = sum(a != b for a, b in zip(scores[OURS], scores[ROUGE_SCORE], strict=True))
    if differ:
        raise SystemExit(f"{differ} of {len(answers)} scores differ from those of rouge_score")
    results = timing_rows(timings)
    for row, timing in zip(results, timings.values(), strict=True):
        row["first_call_s"] = timing.first
    words = sum(len(text.split()) for pair in answers for text in pair) / (2 * len(answers))
    return Report(
        "rouge",
        {"pairs": len(answers), "mean words": round(words), "rounds": args.rounds},
        results,
        machine,
        {"scores that differ": differ},
    )


def answer_pairs(count: int) -> Pairs:
    """Texts of real words, as long as Dolly's responses; an answer repeats about half of its reference."""
    draw = random.Random(0)
    lines = [json.loads(line) for line in _WORDS.read_text().splitlines()]
    words = " ".join(f"{line['instruction']} {line['input']} {line['output']}" for line in lines).split()
    lengths = [response for _prompt, response in dolly_lengths()]
    pairs = []
    for _ in range(count):
        reference = draw.choices(words, k=max(1, round(draw.choice(lengths) * _WORDS_PER_TOKEN)))
        answer = [word if draw.random() < _REPEATED_SHARE else draw.choice(words) for word in reference]
        pairs.append((" ".join(answer), " ".join(reference)))
    return pairs


def ours(answers: Pairs) -> list[float]:
    return [rouge_l(answer, (reference,)) for answer, reference in answers]


def theirs(answers: Pairs) -> list[float]:
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return [100 * scorer.score(reference, answer)["rougeL"].fmeasure for answer, reference in answers]
