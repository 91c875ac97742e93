"""Whether a model can be built of its files: tried in a limited process that has torch, and cached.

The service itself has no torch. It reads configs and headers by a table (:mod:`pocl.inspect`), which describes every
weight of the families whose layers are all alike. Of others, transformers alone knows which weights a config asks for.
"""

from collections import OrderedDict
from collections.abc import Callable
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from threading import BoundedSemaphore, Lock
from typing import Any, Final, Protocol

import structlog

from domain.file_states import file_states
from pocl.errors import PoclError
from pocl.inspect import ModelWarning
from pocl.limited_process import LimitedProcess, ProcessFailed
from pocl.preview.encoder import rebuild_refusal

_log = structlog.get_logger(__name__)

_MEMORY_BYTES: Final = 4 << 30
_SECONDS: Final = 60.0
"""Of the processor; a model of a thousand layers takes some ten."""
_CACHED: Final = 1000
_PROCESSES: Final = 2
"""Models that one process of the service builds at a time: each takes gigabytes for a moment."""
_WAIT_SECONDS: Final = 30

_Outcome = PoclError | tuple[ModelWarning, ...]
"""Why a run would refuse a model, or what it would warn of."""


class StructureProcess(Protocol):
    """What runs :mod:`pocl.models.structure_process`."""

    def call(self, request: Any, *, seconds: float) -> Any: ...  # Any: JSON.

    def close(self) -> None: ...


def _open_process() -> StructureProcess | None:
    """The process; None where the engine is not installed beside the service."""
    if find_spec("transformers") is None or find_spec("torch") is None:
        return None
    return LimitedProcess("pocl.models.structure_process", memory_bytes=_MEMORY_BYTES)


class StructureChecker:
    """Tries to build models and remembers the outcome as long as their files stay as they are.

    Args:
        open_process: starts the process that builds; it gives None where there is none.
        wait_seconds: how long a check may wait for others to end.
    """

    def __init__(
        self,
        open_process: Callable[[], StructureProcess | None] = _open_process,
        *,
        wait_seconds: float = _WAIT_SECONDS,
    ) -> None:
        self._open_process = open_process
        self._wait_seconds = wait_seconds
        self._processes = BoundedSemaphore(_PROCESSES)
        self._outcomes: OrderedDict[str, _Outcome] = OrderedDict()
        self._lock = Lock()

    def check(self, model: Path) -> tuple[ModelWarning, ...]:
        """What a run would warn of, and a warning where the model was not tried.

        Raises:
            ModelUnsupported: as a run would.
        """
        key = file_states(model, weights=True)
        with self._lock:
            outcome = self._outcomes.get(key)
        if outcome is None:
            process = self._open_process()
            if process is None:
                return (_not_built("the engine is not installed beside the service"),)
            if not self._processes.acquire(timeout=self._wait_seconds):
                return (_not_built("the service is building as many others as it can"),)
            try:
                with closing(process):
                    answered = process.call({"path": str(model)}, seconds=_SECONDS)
            except ProcessFailed as error:
                _log.warning("model_not_built", error=str(error), exc_info=error)
                return (_not_built(f"building it {error}"),)
            finally:
                self._processes.release()
            if "refusal" in answered:
                outcome = rebuild_refusal(answered["refusal"])
            else:
                outcome = tuple(ModelWarning(*each) for each in answered.get("warnings", ()))
            self._keep(key, outcome)
        if isinstance(outcome, PoclError):
            raise outcome
        return outcome

    def _keep(self, key: str, outcome: _Outcome) -> None:
        with self._lock:
            self._outcomes[key] = outcome
            while len(self._outcomes) > _CACHED:
                self._outcomes.popitem(last=False)


def _not_built(reason: str) -> ModelWarning:
    message = (
        f"names and shapes of its weights were not compared with what its config asks for ({reason}): the worker "
        "compares them as it loads the model, and refuses it where they differ"
    )
    return ModelWarning("model_not_built", message)
