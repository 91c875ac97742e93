"""What changes when the files of a model do: keys of what is remembered about them."""

import hashlib
import json
import os
from pathlib import Path
from typing import Final

_MAX_FILES: Final = 1000


def file_states(model: Path, *, weights: bool) -> str:
    """A digest over path, size, number and times of a model's file, or of the files of its directory.

    Args:
        weights: Whether the files with weights count too, which say nothing about tokens.
    """
    states: list[list[object]] = [[str(model)]]
    try:
        if model.is_file():
            states.append(_state(model.name, model.stat()))
        else:
            with os.scandir(model) as entries:
                for entry in sorted(entries, key=lambda each: each.name)[:_MAX_FILES]:
                    if weights or not entry.name.endswith(".safetensors"):
                        states.append(_state(entry.name, entry.stat()))
    except OSError:
        # One that vanished meanwhile: whoever reads it says so.
        states.append([])
    return hashlib.sha256(json.dumps(states).encode()).hexdigest()


def _state(name: str, state: os.stat_result) -> list[object]:
    return [name, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns]
