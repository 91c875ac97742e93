"""A journal of difficulty measurements: a killed process loses the batch that it was measuring, and nothing else.

ranking.partial.jsonl holds one line for each finished batch, sealed with a digest over itself and the key of the
inputs. A line that is torn or damaged, or has another key, ends what is read.
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
    """How well the untrained student did on one sample."""

    row: int
    """The position of the sample in its data file, counted from 0."""
    digest: str
    """SHA-256 of the sample's content."""
    rouge_l: float
    """ROUGE-L F1 of the greedy answer, 0 to 100."""
    cross_entropy: float
    """Cross-entropy of the reference's last turn, in nats per token."""
    response: str
    """The greedy answer."""


class Journal:
    """The measurements of one set of inputs, appended to a file batch by batch.

    Raises:
        DiskFull: when a batch does not fit; those before it stay.
    """

    def __init__(self, path: Path, key: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Read what `path` holds under `key`, the digest of the inputs, and cut off the rest."""
        self._key = key
        self._clock = clock
        size, self._measurements = _read(path, key)
        with translating_disk_full():
            # The file is unbuffered: what did not fit must not be written again when it is closed.
            self._out = path.open("ab", buffering=0)
            os.truncate(self._out.fileno(), size)
        self._synced_at = clock()

    def get(self, indices: Sequence[int]) -> list[DifficultyMeasurement] | None:
        """The measurements of these samples; None unless all are in the journal."""
        batch = [self._measurements[index] for index in indices if index in self._measurements]
        return batch if len(batch) == len(indices) else None

    def append(self, batch: Sequence[DifficultyMeasurement]) -> None:
        """Write a finished batch, which survives a kill at once and a power cut after a few seconds."""
        with translating_disk_full():
            write_all(self._out, _line(self._key, [asdict(each) for each in batch]))
        self._measurements |= {each.row: each for each in batch}
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


def _line(key: str, batch: list[dict[str, Any]]) -> bytes:
    return json.dumps({"seal": _seal(key, batch), "measured": batch}).encode() + b"\n"


def _seal(key: str, batch: list[dict[str, Any]]) -> str:
    return hashlib.sha256(f"{key} {json.dumps(batch, sort_keys=True)}".encode()).hexdigest()


def _read(path: Path, key: str) -> tuple[int, dict[int, DifficultyMeasurement]]:
    """The size in bytes of the valid lines under this key, and the measurements in them by index."""
    size, measurements = 0, dict[int, DifficultyMeasurement]()
    content = path.read_bytes() if path.exists() else b""
    for line in content.splitlines(keepends=True):
        batch = _parse_line(line, key)
        if batch is None:
            break
        size += len(line)
        measurements |= {each.row: each for each in batch}
    return size, measurements


def _parse_line(line: bytes, key: str) -> list[DifficultyMeasurement] | None:
    try:
        content = json.loads(line)
        if not line.endswith(b"\n") or content["seal"] != _seal(key, content["measured"]):
            return None
        return [DifficultyMeasurement(**each) for each in content["measured"]]
    except (ValueError, KeyError, TypeError):
        return None
