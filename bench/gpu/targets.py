"""What each figure must reach and aims at, on one H100 or H200, and whether a run reached it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.report import Figure
from bench.rivals import DISTILLATION, PUBLISHED

NOT_RUN = "not run"


@dataclass(frozen=True)
class Target:
    """A figure that is held to two marks: one that it must reach, and one that it aims at."""

    key: str
    """The name that the measurement is reported under."""
    text: str
    must: float
    aim: float
    unit: str
    lower_is_better: bool = False

    def outcome(self, measured: float | None) -> str:
        if measured is None:
            return NOT_RUN
        for mark, name in ((self.aim, "aim met"), (self.must, "must met")):
            if (measured <= mark) if self.lower_is_better else (measured >= mark):
                return name
        return "missed"


def step_ratio(pair: str, rival: str) -> str:
    """The key of the rival's seconds over ours for one step of a pair."""
    return f"step {pair}: {rival} over ours"


BUSY, GENERATED, OVER_TRANSFORMERS, SCORED = "busy share", "generated", "generated over transformers", "scored"
FILLED, JOB, SECOND_JOB = "filling over peak", "job", "teacher FLOPs of the second job"

TARGETS = (
    Target(step_ratio("lab", PUBLISHED), "step 135M/360M, V 49k: published recipe over ours", 4, 8, "x"),
    Target(step_ratio("lab", DISTILLATION), "step 135M/360M, V 49k: TRL Distillation over ours", 3.5, 7, "x"),
    Target(step_ratio("GPT-2 base/XL", PUBLISHED), "step GPT-2 base/XL: published recipe over ours", 8, 14, "x"),
    Target(step_ratio("GPT-2 base/XL", DISTILLATION), "step GPT-2 base/XL: TRL Distillation over ours", 5.5, 10, "x"),
    Target(step_ratio("0.5B/1.5B", PUBLISHED), "step 0.5B/1.5B, V 152k: published recipe over ours", 4, 7, "x"),
    Target(step_ratio("0.5B/1.5B", DISTILLATION), "step 0.5B/1.5B, V 152k: TRL Distillation over ours", 2.5, 4, "x"),
    Target(BUSY, "GPU busy in a step of 135M/360M, 64 rows", 70, 90, "%"),
    Target(GENERATED, "generation 135M, 256 rows in flight", 25_000, 60_000, "tokens/s"),
    Target(OVER_TRANSFORMERS, "the same over transformers, static cache and compiled", 1.5, 1.5, "x"),
    Target(SCORED, "scoring 135M", 300_000, 1_000_000, "tokens/s"),
    Target(FILLED, "cache fill GPT-2 XL, over the time of its products at the peak", 3, 2, "x", lower_is_better=True),
    Target(JOB, "the paper's job at GPT-2 XL/base shapes", 900, 480, "s", lower_is_better=True),
    Target(SECOND_JOB, "two processes and a full cache: teacher FLOPs of the second", 0, 0, "", lower_is_better=True),
)


def judge(measured: Mapping[str, float]) -> Sequence[dict[str, Figure]]:
    """A row for each target: what it must reach, what it aims at, what was measured, and the outcome."""
    return [
        {
            "figure": target.text,
            "must": f"{target.must:g} {target.unit}".strip(),
            "aim": f"{target.aim:g} {target.unit}".strip(),
            "measured": measured.get(target.key),
            "outcome": target.outcome(measured.get(target.key)),
        }
        for target in TARGETS
    ]
