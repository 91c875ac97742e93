"""Difficulty of the training samples for the model that ranks, and their order from easy to hard.

Two ranks are fused: ROUGE-L of the model's own answer (descending) and its mean cross-entropy on the
reference (ascending), 1 the easiest; score = 1/(k + rank_a) + 1/(k + rank_b) (reciprocal rank fusion,
Cormack et al. 2009; POCL, arXiv 2506.05695 section 3.1).
"""

import hashlib
import json
import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pocl.curriculum.journal import DifficultyMeasurement, Journal
from pocl.curriculum.measurement_cache import MeasurementCache, MeasurementKey
from pocl.errors import LossDiverged
from pocl.layout import PARTIAL_RANKING_FILE, RANKING_FILE, RANKING_INPUTS_FILE
from pocl.storage.manifest import replace_file
from pocl.storage.shared_cache import SharedCache


@dataclass(frozen=True)
class RankedSample:
    """A sample with its place in the ranking, and its measurement where a model ranked."""

    row: int
    """The position of the sample among the training samples, counted from 0."""
    digest: str
    """SHA-256 of the sample's content."""
    rouge_l: float | None
    cross_entropy: float | None
    response: str | None
    """The measurement, as :class:`~pocl.curriculum.journal.DifficultyMeasurement` has it."""
    rank: int
    """1 is the easiest."""
    score: float
    """The fused score, of which the easiest sample has the highest; or the difficulty that the row has."""
    rank_rouge_l: int | None
    """The rank by ROUGE-L, descending; equal values share a rank."""
    rank_cross_entropy: int | None
    """The rank by cross-entropy, ascending; equal values share a rank."""
    unfinished_thought: bool = False
    """Whether the answer of the model that ranks ended inside its thought, and so says nothing."""


class RankingKey(MeasurementKey):
    """All that a ranking depends on: equal keys have equal rankings."""

    data: str
    """Digest of the encoded samples, in file order."""
    rrf_k: int

    @property
    def measurement_key(self) -> MeasurementKey:
        """What the measurement of each sample depends on."""
        return MeasurementKey(**{name: getattr(self, name) for name in MeasurementKey.model_fields})

    def equals_but_for_rounding(self, other: "RankingKey") -> bool:
        """Whether the two rankings are of the same inputs, on whatever machine and with whatever sizes."""
        rounding = {name: getattr(self, name) for name in ("machine", "batch_size", "scoring_tokens", "chunk_tokens")}
        return self == other.model_copy(update=rounding)


def rank(measurements: Sequence[DifficultyMeasurement], *, k: int = 60) -> list[RankedSample]:
    """Order samples from easy to hard by reciprocal rank fusion.

    Equal values share a rank, and equal scores are ordered by cross-entropy and then by digest, so that the order
    of the data file does not matter. Samples of equal content are interchangeable.

    Raises:
        LossDiverged: a cross-entropy is not finite, so that it has no rank.
    """
    for sample in measurements:
        if not math.isfinite(sample.cross_entropy):
            raise LossDiverged(f"the loss of the model that ranks is not finite on sample {sample.digest[:12]}")
    rouge_ranks = _competition_ranks([-sample.rouge_l for sample in measurements])
    ce_ranks = _competition_ranks([sample.cross_entropy for sample in measurements])
    scored = [
        (1 / (k + a) + 1 / (k + b), a, b, sample)
        for a, b, sample in zip(rouge_ranks, ce_ranks, measurements, strict=True)
    ]
    scored.sort(key=lambda item: (-item[0], item[3].cross_entropy, item[3].digest, item[3].row))
    return [
        RankedSample(**asdict(sample), rank=place, score=score, rank_rouge_l=a, rank_cross_entropy=b)
        for place, (score, a, b, sample) in enumerate(scored, start=1)
    ]


def rank_by_column(
    difficulties: Sequence[float], digests: Sequence[str], *, easiest: Literal["lowest", "highest"]
) -> list[RankedSample]:
    """Order samples from easy to hard by difficulties that their rows have; equal ones by their digests.

    Args:
        difficulties: Of each sample, by row.
        digests: Of the content of each sample, by row.
    """
    sign = 1 if easiest == "lowest" else -1
    order = sorted(range(len(digests)), key=lambda row: (sign * difficulties[row], digests[row], row))
    return [
        RankedSample(
            row, digests[row], None, None, None, rank=place, score=difficulties[row], rank_rouge_l=None,
            rank_cross_entropy=None,
        )
        for place, row in enumerate(order, start=1)
    ]  # fmt: skip


def save_column_ranking(directory: Path, ranking: Sequence[RankedSample]) -> bool:
    """Write a ranking of :func:`rank_by_column`, which is made again at each start; whether it was there already.

    Raises:
        DiskFull: `directory` has no space.
    """
    text = _lines(ranking)
    path = directory / RANKING_FILE
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return True
    replace_file(path, text)
    return False


def load_or_rank(
    directory: Path,
    key: RankingKey,
    digests: Sequence[str],
    measure: Callable[[Journal], Sequence[DifficultyMeasurement]],
    cache: SharedCache,
) -> tuple[list[RankedSample], bool]:
    """The ranking under `key`, saved in `directory`: loaded from there, or made of measurements.

    The one in `directory` counts even if another machine or other sizes made it: a run that continues must not change
    its order of samples, not even where memory made it halve a size since. For a new one, what other runs have measured
    is taken from `cache`, and only the rest is measured and left there. The journal in `directory` begins with what was
    taken, so that a killed ranking goes on with the same rest, whatever becomes of the cache.

    Args:
        digests: The digest of each sample with its references, by row.
        measure: Gives the measurement of every sample, measuring what the journal lacks.

    Returns:
        The ranking, and whether it was loaded from `directory`.

    Raises:
        DiskFull: when `directory` has no space.
    """
    ranking = loaded = _read(directory, key.equals_but_for_rounding)
    if ranking is None:
        measured_before = MeasurementCache(cache, key.measurement_key)
        with Journal(directory / PARTIAL_RANKING_FILE, key.digest) as journal:
            if journal.reused is None:
                journal.reuse(measured_before.find(digests))
            measurements = measure(journal)
            taken = journal.reused or {}
        ranking = rank(measurements, k=key.rrf_k)
        measured_before.add([each for each in measurements if each.row not in taken], digests)
        _write(directory, key, ranking)
    (directory / PARTIAL_RANKING_FILE).unlink(missing_ok=True)
    return ranking, loaded is not None


def _write(directory: Path, key: RankingKey, ranking: Sequence[RankedSample]) -> None:
    text = _lines(ranking)
    replace_file(directory / RANKING_FILE, text)
    # Written last: the seal vouches for the ranking file, by its digest too.
    seal = {"key": key.digest, "sha256": hashlib.sha256(text.encode()).hexdigest(), "inputs": key.model_dump()}
    replace_file(directory / RANKING_INPUTS_FILE, json.dumps(seal, indent=1) + "\n")


def _lines(ranking: Sequence[RankedSample]) -> str:
    return "".join(json.dumps(asdict(sample), ensure_ascii=False) + "\n" for sample in ranking)


def _read(directory: Path, matches: Callable[[RankingKey], bool]) -> list[RankedSample] | None:
    """The ranking in `directory`; None where there is none, it is damaged, or its key does not match."""
    try:
        seal: dict[str, Any] = json.loads((directory / RANKING_INPUTS_FILE).read_bytes())
        content = (directory / RANKING_FILE).read_bytes()
        key = RankingKey.model_validate(seal["inputs"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    is_whole = seal.get("sha256") == hashlib.sha256(content).hexdigest()
    if not is_whole or seal.get("key") != key.digest or not matches(key):
        return None
    return [RankedSample(**json.loads(line)) for line in content.splitlines()]


def _competition_ranks(values: Sequence[float]) -> list[int]:
    """1 + the number of strictly smaller values."""
    ordered = sorted(values)
    return [bisect_left(ordered, value) + 1 for value in values]
