"""What the files of models say about them, remembered as long as the files stay as they are."""

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from threading import BoundedSemaphore, Lock
from typing import Final

from domain.file_states import file_states
from pocl.inspect import ModelFacts, inspect_model

_MAX_TOKENS: Final = 1_000_000
"""Of the vocabularies that are remembered, all models together: some hundred megabytes."""
_INSPECTIONS: Final = 2
"""Each may take some hundred megabytes for a moment, and more of them at once would be no faster."""


class ModelFactsCache:
    """Inspects models and remembers the least long ago asked for, by the path, size, number and times of their files.

    Args:
        inspect: reads the files of a model.
        max_tokens: of the vocabularies that are remembered, all models together. The newest model always is.
    """

    def __init__(self, inspect: Callable[[Path], ModelFacts] = inspect_model, *, max_tokens: int = _MAX_TOKENS) -> None:
        self._inspect = inspect
        self._max_tokens = max_tokens
        self._facts: OrderedDict[str, ModelFacts] = OrderedDict()
        self._tokens = 0
        self._lock = Lock()
        self._in_progress: dict[str, Lock] = {}
        """Held by whoever inspects the model of a key."""
        self._inspections = BoundedSemaphore(_INSPECTIONS)

    def facts_of(self, model: Path) -> ModelFacts:
        """The facts of a model directory or of a `.gguf` file.

        Raises:
            ModelNotFound, ModelUnsupported: see :func:`pocl.inspect.inspect_model`. That is found anew each time.
        """
        key = file_states(model, weights=True)
        facts = self._find(key)
        if facts is not None:
            return facts
        with self._lock:
            turn = self._in_progress.setdefault(key, Lock())
        with turn:
            # Another request may have inspected it while this one waited.
            facts = self._find(key)
            if facts is None:
                try:
                    with self._inspections:
                        facts = self._inspect(model)
                    self._remember(key, facts)
                finally:
                    with self._lock:
                        self._in_progress.pop(key, None)
        return facts

    def _find(self, key: str) -> ModelFacts | None:
        with self._lock:
            facts = self._facts.get(key)
            if facts is not None:
                self._facts.move_to_end(key)
            return facts

    def _remember(self, key: str, facts: ModelFacts) -> None:
        with self._lock:
            if key in self._facts:
                return
            self._facts[key] = facts
            self._tokens += len(facts.tokens)
            while self._tokens > self._max_tokens and len(self._facts) > 1:
                _, forgotten = self._facts.popitem(last=False)
                self._tokens -= len(forgotten.tokens)
