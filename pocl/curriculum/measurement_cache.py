"""Difficulty measurements that other runs have made already, kept by sample and apart from their fusion to a ranking.

An entry of the shared cache holds the measurements that one run had to make; a run takes each sample from whichever
entry has it. Another constant of the fusion, a subset or one more sample measures only what is missing.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from pocl.curriculum.journal import DifficultyMeasurement
from pocl.errors import DiskFull
from pocl.evaluation.rouge import METRICS_VERSION
from pocl.storage.shared_cache import SharedCache

BATCHING_VERSION = 2
"""Version of how samples are batched and answered; to be raised when equal inputs get other bits."""
_MEASUREMENTS = "measurements.jsonl"


class MeasurementKey(BaseModel):
    """All that the measurement of a sample depends on besides the sample: equal keys have equal measurements."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    """Digest of the model that is measured."""
    template: str
    end_ids: tuple[int, ...]
    """The tokens that end an answer, ascending."""
    max_new_tokens: int
    sampling: str = "greedy"
    """`greedy`, or the temperature and seed of sampled answers."""
    no_repeat_ngram: int | None = None
    """The size of the n-grams that no answer repeats."""
    batch_size: int
    scoring_tokens: int
    chunk_tokens: int
    batching: int = BATCHING_VERSION
    metrics: int = METRICS_VERSION
    generator: str
    """What generated the answers: the engine's own loop, or vLLM."""
    precision: str
    machine: str
    """What bits depend on besides: versions, hardware and threads."""

    @property
    def digest(self) -> str:
        """SHA-256 over all fields."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


@dataclass(frozen=True)
class MeasurementCache:
    """The measurements under one key; where the cache cannot be used, nothing is found and nothing is kept."""

    shared_cache: SharedCache
    key: MeasurementKey

    @property
    def kind(self) -> str:
        """The kind of its entries."""
        return f"measurements-{self.key.digest}"

    def find(self, digests: Sequence[str]) -> list[DifficultyMeasurement]:
        """The measurements of those samples that another run has measured, by their row here.

        Args:
            digests: The digest of each sample with its references, by row.
        """
        found: dict[str, DifficultyMeasurement] = {}
        with suppress(OSError), self.shared_cache.holder() as holder:
            # What is read is held, so that it is not evicted meanwhile.
            for entry in sorted(holder.hold(self.kind, self.shared_cache.keys(self.kind))):
                if holder.verify(self.kind, entry) is None:
                    found |= _read(self.shared_cache.path(self.kind, entry), set(digests) - found.keys())
        return [replace(found[digest], row=row) for row, digest in enumerate(digests) if digest in found]

    def add(self, measurements: Sequence[DifficultyMeasurement], digests: Sequence[str]) -> None:
        """Keep measurements for other runs; without room, the next run merely makes them again."""
        by_digest = {digests[each.row]: each for each in measurements}
        if not by_digest:
            return
        content = "".join(_line(digest, each) for digest, each in sorted(by_digest.items())).encode()
        entry = hashlib.sha256("".join(sorted(by_digest)).encode()).hexdigest()
        with suppress(DiskFull, OSError), self.shared_cache.add(self.kind, entry, len(content)) as scratch:
            (scratch / _MEASUREMENTS).write_bytes(content)


def _line(digest: str, measurement: DifficultyMeasurement) -> str:
    return json.dumps({"sample": digest, "measured": asdict(measurement)}) + "\n"


def _read(entry: Path, digests: set[str]) -> Mapping[str, DifficultyMeasurement]:
    lines = map(json.loads, (entry / _MEASUREMENTS).read_bytes().splitlines())
    return {line["sample"]: DifficultyMeasurement(**line["measured"]) for line in lines if line["sample"] in digests}
