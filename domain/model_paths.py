"""Where the service may read models from."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from domain.errors import ModelMissing, PathOutsideModelRoots
from pocl.errors import FieldError


def locate_model(roots: Sequence[Path], written: str, *, pointer: str) -> Path:
    """The place of a model that a specification names, with every symbolic link followed.

    A relative path is looked for below each root in turn. Where it leads is checked, not how it is spelled; so are
    the links in a model's directory, of which a Hub cache is full.

    Args:
        written: as the client wrote it.
        pointer: the field that it stands in, for the error.

    Raises:
        PathOutsideModelRoots: it does not lead below a root, whether or not something is there; or a file of the
            model does not.
        ModelMissing: it does, and nothing is there.
    """
    try:
        real_roots = [root.resolve() for root in roots]
        places = [(root / written).resolve() for root in real_roots]
        inside = [place for place in places if _is_below(place, real_roots)]
        found = next((place for place in inside if place.exists()), None)
        if found is not None and not all(_is_below(file, real_roots) for file in _linked(found)):
            inside, found = [], None
    except (OSError, RuntimeError, ValueError):
        # A name too long, a circle of links, a NUL: nothing can be there.
        inside, found = [Path()], None
    if found is not None:
        return found
    refusal = ModelMissing if inside else PathOutsideModelRoots
    raise refusal(field_errors=[FieldError(pointer, refusal.code, str(refusal.__doc__))])


def _is_below(place: Path, roots: Sequence[Path]) -> bool:
    return any(place.is_relative_to(root) for root in roots)


def _linked(model: Path) -> Iterator[Path]:
    """Where the links in a model's directory lead."""
    if model.is_dir():
        with os.scandir(model) as entries:
            yield from (Path(entry.path).resolve() for entry in entries if entry.is_symlink())
