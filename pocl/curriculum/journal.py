"""Measurements as they are made: a killed process loses the batch that it was at, and nothing else.

ranking.partial.jsonl holds one line for each finished batch, sealed with a digest over itself and the key of the
inputs. A line that is torn or damaged ends the file, as does one of other inputs.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pocl.storage.manifest import translating_disk_full, write_all

_SECONDS_UNSYNCED = 5.0


@dataclass(frozen=True)
class DifficultyMeasurement:
    """What the student made of one sample."""

    row: int
    """Position in the data file, counted from 0."""
    digest: str
    """SHA-256 of the sample's content."""
    rouge_l: float
    """F1 of the greedy answer, 0 to 100."""
    cross_entropy: float
    """Nats per token of the reference's last turn."""
    response: str
    """The answer."""


class Journal:
    """The measurements of one set of inputs, on the disk as they come.

    Raises:
        DiskFull: when a batch does not fit; those before it stay.
    """

    def __init__(self, path: Path, key: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        """`key`: digest of the inputs. What `path` holds of the same inputs is read, and the rest cut off."""
        self._key = key
        self._clock = clock
        whole, self._found = _read(path, key)
        with translating_disk_full():
            # Unbuffered: what did not fit must not be tried again when the file is closed.
            self._out = path.open("ab", buffering=0)
            os.truncate(self._out.fileno(), whole)
        self._synced_at = clock()

    def found(self, rows: Sequence[int]) -> list[DifficultyMeasurement] | None:
        """The measurements of these rows, if all are here."""
        here = [self._found[row] for row in rows if row in self._found]
        return here if len(here) == len(rows) else None

    def append(self, batch: Sequence[DifficultyMeasurement]) -> None:
        """Write a finished batch; it survives a kill at once and a power cut within seconds."""
        with translating_disk_full():
            write_all(self._out, _line(self._key, [asdict(each) for each in batch]))
        self._found |= {each.row: each for each in batch}
        if self._clock() - self._synced_at >= _SECONDS_UNSYNCED:
            with translating_disk_full():
                os.fsync(self._out.fileno())
            self._synced_at = self._clock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._out.close()


def _line(key: str, measured: list[dict[str, Any]]) -> bytes:
    return json.dumps({"seal": _seal(key, measured), "measured": measured}).encode() + b"\n"


def _seal(key: str, measured: list[dict[str, Any]]) -> str:
    return hashlib.sha256(f"{key} {json.dumps(measured, sort_keys=True)}".encode()).hexdigest()


def _read(path: Path, key: str) -> tuple[int, dict[int, DifficultyMeasurement]]:
    """Bytes of whole lines of this key, and what they hold."""
    whole, found = 0, dict[int, DifficultyMeasurement]()
    content = path.read_bytes() if path.exists() else b""
    for line in content.splitlines(keepends=True):
        batch = _batch_of(line, key)
        if batch is None:
            break
        whole += len(line)
        found |= {each.row: each for each in batch}
    return whole, found


def _batch_of(line: bytes, key: str) -> list[DifficultyMeasurement] | None:
    try:
        content = json.loads(line)
        if not line.endswith(b"\n") or content["seal"] != _seal(key, content["measured"]):
            return None
        return [DifficultyMeasurement(**each) for each in content["measured"]]
    except (ValueError, KeyError, TypeError):
        return None
