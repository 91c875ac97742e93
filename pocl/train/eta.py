"""How fast a run goes and when it will end."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

_MEMORY = 0.9
"""Weight of the past in the moving averages: about the last ten steps count."""


@dataclass
class EtaEstimator:
    """Moving averages of step and evaluation times. `clock` gives seconds and can be replaced by a fake."""

    clock: Callable[[], float] = field(default=time.perf_counter)
    seconds_per_step: float = 0.0
    mean_deviation: float = 0.0
    """Mean distance of a step's time from `seconds_per_step`."""
    seconds_per_evaluation: float = 0.0
    tokens_per_second: float = 0.0

    @contextmanager
    def step(self, tokens: int) -> Iterator[None]:
        """Time one optimiser step over `tokens` prompt and response tokens."""
        start = self.clock()
        yield
        seconds = max(self.clock() - start, 1e-9)
        if self.seconds_per_step > 0:
            self.mean_deviation = _MEMORY * self.mean_deviation + (1 - _MEMORY) * abs(seconds - self.seconds_per_step)
        self.seconds_per_step = _blend(self.seconds_per_step, seconds)
        self.tokens_per_second = _blend(self.tokens_per_second, tokens / seconds)

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        start = self.clock()
        yield
        self.seconds_per_evaluation = _blend(self.seconds_per_evaluation, self.clock() - start)

    def seconds_left(self, *, steps: int, evaluations: int) -> float:
        return steps * self.seconds_per_step + evaluations * self.seconds_per_evaluation

    def seconds_left_range(self, *, steps: int, evaluations: int) -> tuple[float, float]:
        """Least and most seconds to expect. Steps drift together, as rows grow longer or others want the machine, so
        their distances add up.
        """
        middle, off = self.seconds_left(steps=steps, evaluations=evaluations), steps * self.mean_deviation
        return max(0.0, middle - off), middle + off


def _blend(past: float, new: float) -> float:
    return new if past == 0 else _MEMORY * past + (1 - _MEMORY) * new
