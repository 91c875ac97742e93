"""The models below the model roots, as specifications name them, with what their files say.

The roots are searched anew for each page, within bounds; what the files of a model say is remembered as long as their
sizes and times stay as they are.
"""

import hashlib
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from threading import Lock
from types import MappingProxyType
from typing import Final

import orjson

from domain.db import KeysetPage
from domain.errors import ApiError, NotFound
from domain.file_states import file_states
from domain.model_paths import locate_model
from pocl.errors import PoclError
from pocl.inspect import ModelFacts, ModelWarning, explain_unselectable_layers, inspect_model

_MAX_DEPTH: Final = 5
"""Directories below a root that lie deeper are not searched: a Hub cache has its models four deep."""
_MAX_ENTRIES: Final = 20_000
_MAX_PATH_LENGTH: Final = 1024
_CACHED: Final = 2000
_MARKERS: Final = frozenset({"config.json", "adapter_config.json"})


class ModelNotListed(NotFound):
    """There is no model of this path below the model roots."""

    code = "model_not_found"


@dataclass(frozen=True)
class ModelDescription:
    """What the files of a model say about it, without its tokens."""

    facts: ModelFacts = field(repr=False)
    """The facts; their `tokens` are empty here, since a vocabulary takes tens of megabytes."""
    tokens: int
    """How many tokens the tokenizer knows."""
    vocabulary_sha256: str
    """SHA-256 over all tokens with their ids: equal for models whose tokenizers have the same vocabulary."""
    layers_selectable: bool
    """Whether a student can be made of some of its layers."""


@dataclass(frozen=True)
class ModelRefusal:
    """Why a model can be neither teacher nor student."""

    code: str
    message: str


@dataclass(frozen=True)
class ListedModel:
    """A model below the model roots."""

    path: str
    """Relative to its root: what `path` of a teacher or a student may be."""
    description: ModelDescription | None = None
    """Null where the model is refused, or its files have not been read yet."""
    refusal: ModelRefusal | None = None
    """Null where the model can be used, or its files have not been read yet."""


@dataclass(frozen=True)
class ModelListing:
    """A page of models, in the order of their paths."""

    page: KeysetPage[ListedModel]
    complete: bool
    """Whether the roots were searched to the end."""


class ModelCatalog:
    """Lists the models below the roots, and remembers what their files say.

    Args:
        seconds: how long one page may read files of models; those that are left are read for the next.
        inspect: reads the files of a model; it raises errors of the engine.
    """

    def __init__(
        self,
        roots: Sequence[Path],
        *,
        seconds: float = 10,
        inspect: Callable[[Path], ModelFacts] = inspect_model,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._roots = roots
        self._seconds = seconds
        self._inspect = inspect
        self._clock = clock
        self._cache: OrderedDict[str, ModelDescription | ModelRefusal] = OrderedDict()
        self._lock = Lock()
        # Each reading takes some hundred megabytes for a moment.
        self._reading = Lock()

    def list_models(self, *, limit: int, after: str | None = None) -> ModelListing:
        """The models whose paths come after `after`."""
        search = _Search(self._roots)
        paths = sorted(path for path in search.paths() if after is None or path > after)
        deadline = self._clock() + self._seconds
        models = [self._describe(path, deadline) for path in paths[:limit]]
        return ModelListing(KeysetPage(models, has_more=len(paths) > limit), search.complete)

    def get_model(self, path: str) -> ListedModel:
        """The model of this path.

        Raises:
            ModelNotListed: no model lies there below the roots.
        """
        plain = PurePosixPath(path)
        if plain.is_absolute() or plain.as_posix() != path or ".." in plain.parts or not _is_name(path):
            raise ModelNotListed
        try:
            location = locate_model(self._roots, path, pointer="")
            is_model = location.suffix == ".gguf" if location.is_file() else _is_model_directory(os.listdir(location))
        except (ApiError, OSError):
            raise ModelNotListed from None
        if not is_model:
            raise ModelNotListed
        return self._describe(path, None)

    def _describe(self, path: str, deadline: float | None) -> ListedModel:
        try:
            location = locate_model(self._roots, path, pointer="")
        except ApiError as error:
            code = error.field_errors[0].code if error.field_errors else error.code
            return ListedModel(path, refusal=ModelRefusal(code, error.detail))
        key = file_states(location, weights=True)
        with self._lock:
            known = self._cache.get(key)
        if known is None:
            with self._reading:
                if deadline is not None and self._clock() > deadline:
                    return ListedModel(path)
                known = self._read(location)
            with self._lock:
                self._cache[key] = known
                while len(self._cache) > _CACHED:
                    self._cache.popitem(last=False)
        if isinstance(known, ModelRefusal):
            return ListedModel(path, refusal=known)
        return ListedModel(path, known)

    def _read(self, location: Path) -> ModelDescription | ModelRefusal:
        try:
            facts = self._inspect(location)
        except PoclError as error:
            return ModelRefusal(error.code, error.summary)
        by_id = sorted((id_, token) for token, id_ in facts.tokens.items())
        # Names of tokens from GGUF may hold lone surrogates, which JSON encoders refuse.
        spelled = orjson.dumps([[id_, token.encode("utf-8", "surrogatepass").hex()] for id_, token in by_id])
        warnings = (*facts.warnings, *(() if facts.is_described else (_NOT_BUILT,)))
        return ModelDescription(
            facts=replace(facts, tokens=MappingProxyType({}), warnings=warnings),
            tokens=len(by_id),
            vocabulary_sha256=hashlib.sha256(spelled).hexdigest(),
            layers_selectable=explain_unselectable_layers(facts.family) is None,
        )


class _Search:
    """One search of the roots for models, bounded in depth and in entries."""

    def __init__(self, roots: Sequence[Path]) -> None:
        self._roots = [real for root in roots if (real := _real(root)) is not None]
        self._entries_left = _MAX_ENTRIES
        self._seen: set[Path] = set()
        self.complete = True
        """Whether nothing was left out for want of room; known once the search has ended."""

    def paths(self) -> set[str]:
        """The paths of all models, relative to their roots. Hidden directories and links out of the roots are passed
        over."""
        found: set[str] = set()
        for root in self._roots:
            self._seen.clear()
            found.update(self._below(root, "", 0))
        return found

    def _below(self, directory: Path, prefix: str, depth: int) -> Iterator[str]:
        real = _real(directory)
        if real is None or real in self._seen or not any(real.is_relative_to(root) for root in self._roots):
            return
        self._seen.add(real)
        files, directories = self._entries(directory)
        if prefix and _is_model_directory(files):
            yield prefix
        for name in files:
            path = f"{prefix}/{name}" if prefix else name
            if name.endswith(".gguf") and len(path) <= _MAX_PATH_LENGTH:
                yield path
        for name in directories:
            path = f"{prefix}/{name}" if prefix else name
            if depth + 1 > _MAX_DEPTH or len(path) > _MAX_PATH_LENGTH:
                self.complete = False
                continue
            yield from self._below(directory / name, path, depth + 1)

    def _entries(self, directory: Path) -> tuple[list[str], list[str]]:
        """The names of the files and of the directories of a directory."""
        files: list[str] = []
        directories: list[str] = []
        try:
            with os.scandir(directory) as entries:
                for entry in entries:
                    if self._entries_left == 0:
                        self.complete = False
                        break
                    self._entries_left -= 1
                    if entry.name.startswith(".") or not _is_name(entry.name):
                        continue
                    (directories if entry.is_dir() else files).append(entry.name)
        except OSError:
            # A directory that may not be read holds no model that could be used.
            self.complete = False
        return sorted(files), sorted(directories)


_NOT_BUILT: Final = ModelWarning(
    "model_not_built",
    "names and shapes of its weights are compared with what its config asks for in the dry run of a job, not here",
)


def _is_model_directory(names: Sequence[str]) -> bool:
    return not _MARKERS.isdisjoint(names) or any(name.endswith(".safetensors") for name in names)


def _is_name(text: str) -> bool:
    # Printable text is valid Unicode as well; a file system may hold other names.
    return text.isprintable()


def _real(path: Path) -> Path | None:
    try:
        return path.resolve()
    except (OSError, RuntimeError):
        return None
