"""How fast a run goes and when it will end (its ETA)."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

_DECAY = 0.9
"""Weight of the past in the exponential moving averages: about the last ten steps count."""


@dataclass
class EtaEstimator:
    """Exponential moving averages of the times that steps and evaluations take."""

    clock: Callable[[], float] = field(default=time.perf_counter)
    """Gives seconds; replaced by a fake in tests."""
    seconds_per_step: float = 0.0
    mean_deviation: float = 0.0
    """Mean absolute deviation of a step's time from `seconds_per_step`, in seconds."""
    seconds_per_evaluation: dict[str, float] = field(default_factory=dict)
    """By kind of evaluation: those of a kind score the same samples alike."""
    tokens_per_second: float = 0.0
    """Prompt and response tokens that training passes a second."""

    @contextmanager
    def step(self, tokens: int) -> Iterator[None]:
        """Time one optimiser step over `tokens` prompt and response tokens."""
        start = self.clock()
        yield
        seconds = max(self.clock() - start, 1e-9)
        if self.seconds_per_step > 0:
            deviation = abs(seconds - self.seconds_per_step)
            self.mean_deviation = _DECAY * self.mean_deviation + (1 - _DECAY) * deviation
        self.seconds_per_step = _moving_average(self.seconds_per_step, seconds)
        self.tokens_per_second = _moving_average(self.tokens_per_second, tokens / seconds)

    @contextmanager
    def evaluation(self, kind: str) -> Iterator[None]:
        """Time one evaluation of a kind."""
        start = self.clock()
        yield
        past = self.seconds_per_evaluation.get(kind, 0.0)
        self.seconds_per_evaluation[kind] = _moving_average(past, self.clock() - start)

    def seconds_left(self, *, steps: int, evaluations: Mapping[str, int]) -> float:
        """The seconds that so many steps, and so many evaluations of each kind, are expected to take.

        A kind that was not timed yet, as after a resume, is taken to be like the others.
        """
        known = self.seconds_per_evaluation
        unknown = sum(known.values()) / max(1, len(known))
        seconds = (count * known.get(kind, unknown) for kind, count in evaluations.items())
        return steps * self.seconds_per_step + sum(seconds)

    def seconds_left_range(self, *, steps: int, evaluations: Mapping[str, int]) -> tuple[float, float]:
        """The lowest and the highest number of seconds to expect.

        Step times drift together, as samples grow longer or other processes take the machine, so deviations add up.
        """
        expected, deviation = self.seconds_left(steps=steps, evaluations=evaluations), steps * self.mean_deviation
        return max(0.0, expected - deviation), expected + deviation


def _moving_average(past: float, new: float) -> float:
    return new if past == 0 else _DECAY * past + (1 - _DECAY) * new
