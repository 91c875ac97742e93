"""Rivals in interleaved rounds, of which one may fail without ending the comparison."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from bench.protocol import Rival, Timing, Work, time_interleaved

Value = TypeVar("Value")


@dataclass
class Contender:
    """A rival that is timed until it fails."""

    rival: Rival
    failure: str | None = None
    """Why it has no figures: it is not installed, ran out of memory, or failed otherwise."""
    timing: Timing | None = None
    work: Work | None = field(default=None, repr=False)
    """One unit of its work, once it is prepared and has not failed."""

    @property
    def name(self) -> str:
        return self.rival.name

    @property
    def timed_work(self) -> Work:
        """The work that was timed.

        Raises:
            LookupError: it was not prepared.
        """
        if self.work is None:
            raise LookupError(self.name)
        return self.work

    def attempt(self, act: Callable[[], Value]) -> Value | None:
        """What `act` returns; None where it raises, which becomes the failure, and where the rival failed before."""
        if self.failure is not None:
            return None
        try:
            return act()
        except ImportError as error:
            self._fail(f"not installed: {error.name}")
        except torch.OutOfMemoryError:
            self._fail("out of memory")
        except Exception as error:  # noqa: BLE001  # A rival may fail in any way; the others are measured all the same.
            self._fail(f"failed: {type(error).__name__}: {' '.join(str(error).split())[:120]}")
        return None

    def _fail(self, reason: str) -> None:
        self.failure, self.work = reason, None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def time_contenders(rivals: Sequence[Rival], rounds: int) -> list[Contender]:
    """Time `rounds` interleaved rounds of all rivals that do not fail, after a warm-up."""
    contenders = [Contender(rival) for rival in rivals]
    timings = time_interleaved([_guarded(contender) for contender in contenders], rounds)
    for contender in contenders:
        if contender.failure is None:
            contender.timing = timings[contender.name]
    return contenders


def _guarded(contender: Contender) -> Rival:
    """The rival, whose exceptions become failures of its contender."""

    def keep_work() -> None:
        contender.work = contender.rival.prepare()

    def prepare() -> Work:
        contender.attempt(keep_work)
        return lambda: contender.attempt(lambda: contender.timed_work())

    return Rival(contender.name, prepare)
