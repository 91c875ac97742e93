"""A journal of difficulty measurements: a killed process loses the batch that it was measuring, and nothing else.

ranking.partial.jsonl holds one line with what other runs had measured, and one for each finished batch, each sealed
with a digest over itself and the key of the inputs. A line that is torn or damaged, or has another key, ends what is
read.
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
    """How well the model that ranks did on one sample."""

    row: int
    """The position of the sample in its data file, counted from 0."""
    digest: str
    """SHA-256 of the sample's content."""
    rouge_l: float
    """ROUGE-L F1 of the answer, 0 to 100."""
    cross_entropy: float
    """Cross-entropy of the reference's last turn, in nats per token."""
    response: str
    """The answer."""
    unfinished_thought: bool = False
    """Whether the answer ended inside its thought, and so says nothing."""


class Journal:
    """The measurements of one set of inputs, appended to a file batch by batch.

    Raises:
        DiskFull: when a batch does not fit; those before it stay.
    """

    def __init__(self, path: Path, key: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Read what `path` holds under `key`, the digest of the inputs, and cut off the rest."""
        self._key = key
        self._clock = clock
        size, self._measurements, reused = _read(path, key)
        self.reused = reused
        """Measurements that other runs had made, by row; None where they were not looked up yet."""
        with translating_disk_full():
            # The file is unbuffered: what did not fit must not be written again when it is closed.
            self._out = path.open("ab", buffering=0)
            os.truncate(self._out.fileno(), size)
        self._synced_at = clock()

    def get(self, indices: Sequence[int]) -> list[DifficultyMeasurement] | None:
        """The measurements of these samples; None unless all are in the journal."""
        batch = [self._measurements[index] for index in indices if index in self._measurements]
        return batch if len(batch) == len(indices) else None

    def reuse(self, measurements: Sequence[DifficultyMeasurement]) -> None:
        """Record what other runs had measured: whoever goes on with this journal takes the same."""
        with translating_disk_full():
            write_all(self._out, _line(self._key, [asdict(each) for each in measurements], is_reused=True))
        self.reused = {each.row: each for each in measurements}
        self._measurements |= self.reused

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


def _line(key: str, batch: list[dict[str, Any]], *, is_reused: bool = False) -> bytes:
    return json.dumps({"seal": _seal(key, batch, is_reused), "reused": is_reused, "measured": batch}).encode() + b"\n"


def _seal(key: str, batch: list[dict[str, Any]], is_reused: bool) -> str:
    return hashlib.sha256(f"{key} {is_reused} {json.dumps(batch, sort_keys=True)}".encode()).hexdigest()


def _read(
    path: Path, key: str
) -> tuple[int, dict[int, DifficultyMeasurement], dict[int, DifficultyMeasurement] | None]:
    """The size in bytes of the valid lines under this key, all measurements in them by row, and those reused."""
    size, measurements = 0, dict[int, DifficultyMeasurement]()
    reused: dict[int, DifficultyMeasurement] | None = None
    content = path.read_bytes() if path.exists() else b""
    for line in content.splitlines(keepends=True):
        parsed = _parse_line(line, key)
        if parsed is None:
            break
        size += len(line)
        is_reused, batch = parsed
        by_row = {each.row: each for each in batch}
        measurements |= by_row
        if is_reused:
            reused = by_row
    return size, measurements, reused


def _parse_line(line: bytes, key: str) -> tuple[bool, list[DifficultyMeasurement]] | None:
    try:
        content = json.loads(line)
        is_reused = bool(content["reused"])
        if not line.endswith(b"\n") or content["seal"] != _seal(key, content["measured"], is_reused):
            return None
        return is_reused, [DifficultyMeasurement(**each) for each in content["measured"]]
    except (ValueError, KeyError, TypeError):
        return None
