"""The directories below which the service may read models."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from domain.errors import EngineRefusal, PathOutsideModelRoots
from pocl.errors import FieldError, ModelNotFound


def locate_model(roots: Sequence[Path], path: str, *, pointer: str) -> Path:
    """The real path of a model that a specification names, with every symbolic link followed.

    A relative path is looked for below each root in turn. The check is on where a path leads, not on how it is spelled,
    and covers the links in a model's directory, of which a Hub cache is full.

    Args:
        path: the path as the client wrote it.
        pointer: the field with the path, for the error.

    Raises:
        PathOutsideModelRoots: the path does not lead below a root, whether or not something is there; or a file of the
            model does not.
        EngineRefusal: the path leads below a root, and nothing is there (`model_not_found`).
    """
    try:
        real_roots = [root.resolve() for root in roots]
        candidates = [(root / path).resolve() for root in real_roots]
        inside = [candidate for candidate in candidates if _is_below(candidate, real_roots)]
        model = next((candidate for candidate in inside if candidate.exists()), None)
        if model is not None and not all(_is_below(target, real_roots) for target in _link_targets(model)):
            inside, model = [], None
    except (OSError, RuntimeError, ValueError):
        # A name too long, a circle of links, a NUL: nothing can be there.
        inside, model = [Path()], None
    if model is not None:
        return model
    if inside:
        raise EngineRefusal(ModelNotFound("There is no model at this path: check its spelling."), pointer=pointer)
    code, detail = PathOutsideModelRoots.code, str(PathOutsideModelRoots.__doc__)
    raise PathOutsideModelRoots(field_errors=[FieldError(pointer, code, detail)])


def _is_below(path: Path, roots: Sequence[Path]) -> bool:
    return any(path.is_relative_to(root) for root in roots)


def _link_targets(model: Path) -> Iterator[Path]:
    """The targets of the links in a model's directory."""
    if model.is_dir():
        with os.scandir(model) as entries:
            yield from (Path(entry.path).resolve() for entry in entries if entry.is_symlink())
