"""Difficulty of the training samples for the student as it starts, and their order from easy to hard.

Two ranks are fused: ROUGE-L of the student's own answer (descending) and its mean cross-entropy on the
reference (ascending), 1 the easiest; score = 1/(k + rank_a) + 1/(k + rank_b) (reciprocal rank fusion,
Cormack et al. 2009; POCL, arXiv 2506.05695 section 3.1).
"""

import hashlib
import json
import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from pocl.curriculum.journal import DifficultyMeasurement, Journal
from pocl.errors import DiskFull, LossDiverged
from pocl.layout import PARTIAL_RANKING_FILE, RANKING_FILE, RANKING_INPUTS_FILE
from pocl.storage.manifest import replace_file
from pocl.storage.shared_cache import SharedCache

KIND = "rankings"
BATCHING = 1
"""Version of how samples are put into batches and answered; raised when the same inputs get other bits."""


@dataclass(frozen=True)
class RankedSample(DifficultyMeasurement):
    rank: int
    """1 is the easiest."""
    score: float
    rank_rouge_l: int
    rank_cross_entropy: int


class RankingCacheKey(BaseModel):
    """All that a ranking depends on; equal inputs give an equal ranking."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    student: str
    """Digest of the student's weights and config."""
    data: str
    """Digest of the encoded samples, in file order."""
    template: str
    end_ids: tuple[int, ...]
    """Tokens that end an answer, ascending."""
    rrf_k: int
    max_new_tokens: int
    sampling: Literal["greedy"] = "greedy"
    batch_size: int
    batching: int = BATCHING
    precision: str
    machine: str
    """Versions, instruction set, device, threads: what bits depend on besides."""

    @property
    def key(self) -> str:
        """SHA-256 over the inputs."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    def equal_but_for_the_machine(self, other: "RankingCacheKey") -> bool:
        """Whether the two rankings differ by rounding at most."""
        return self == other.model_copy(update={"machine": self.machine})


def rank(measured: Sequence[DifficultyMeasurement], *, k: int = 60) -> list[RankedSample]:
    """Order samples from easy to hard.

    Equal values share a rank, and equal scores are ordered by cross-entropy and then by digest, so that the
    order of the data file has no say. Rows of equal content are interchangeable.

    Raises:
        LossDiverged: a cross-entropy is not finite, so that it has no rank.
    """
    for sample in measured:
        if not math.isfinite(sample.cross_entropy):
            raise LossDiverged(f"the untrained student's loss on sample {sample.digest[:12]} is not finite")
    rouge_ranks = _competition_ranks([-sample.rouge_l for sample in measured])
    ce_ranks = _competition_ranks([sample.cross_entropy for sample in measured])
    scored = [
        (1 / (k + a) + 1 / (k + b), a, b, sample) for a, b, sample in zip(rouge_ranks, ce_ranks, measured, strict=True)
    ]
    scored.sort(key=lambda item: (-item[0], item[3].cross_entropy, item[3].digest, item[3].row))
    return [
        RankedSample(**asdict(sample), rank=place, score=score, rank_rouge_l=a, rank_cross_entropy=b)
        for place, (score, a, b, sample) in enumerate(scored, start=1)
    ]


def load_or_rank(
    directory: Path,
    inputs: RankingCacheKey,
    measure: Callable[[Journal], Sequence[DifficultyMeasurement]],
    store: SharedCache,
) -> tuple[list[RankedSample], bool]:
    """The ranking of these inputs, saved in `directory`: the one that is there, one of another run, or a new one.

    The one in `directory` counts even if another machine made it, since a run that goes on must not change its
    order of samples. A new one is measured with a journal in `directory`, and left in `store` for other runs.

    Returns the ranking, and whether `directory` held it already.

    Raises:
        DiskFull: when `directory` has no space.
    """
    ranking = _read(directory, inputs.equal_but_for_the_machine)
    found = ranking is not None
    if ranking is None:
        ranking = _of_another_run(store, inputs)
        if ranking is None:
            with Journal(directory / PARTIAL_RANKING_FILE, inputs.key) as journal:
                ranking = rank(measure(journal), k=inputs.rrf_k)
            # Without room for it, it is merely not there for the next run.
            with suppress(DiskFull, OSError), store.add(KIND, inputs.key) as scratch:
                _write(scratch, inputs, ranking)
        _write(directory, inputs, ranking)
    (directory / PARTIAL_RANKING_FILE).unlink(missing_ok=True)
    return ranking, found


def _write(directory: Path, inputs: RankingCacheKey, ranking: Sequence[RankedSample]) -> None:
    text = "".join(json.dumps(asdict(sample), ensure_ascii=False) + "\n" for sample in ranking)
    replace_file(directory / RANKING_FILE, text)
    # Written last: it vouches for the file above, by its digest too.
    seal = {"key": inputs.key, "sha256": hashlib.sha256(text.encode()).hexdigest(), "inputs": inputs.model_dump()}
    replace_file(directory / RANKING_INPUTS_FILE, json.dumps(seal, indent=1) + "\n")


def _read(directory: Path, fits: Callable[[RankingCacheKey], bool]) -> list[RankedSample] | None:
    try:
        seal: dict[str, Any] = json.loads((directory / RANKING_INPUTS_FILE).read_bytes())
        content = (directory / RANKING_FILE).read_bytes()
        inputs = RankingCacheKey.model_validate(seal["inputs"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    whole = seal.get("sha256") == hashlib.sha256(content).hexdigest()
    if not whole or seal.get("key") != inputs.key or not fits(inputs):
        return None
    return [RankedSample(**json.loads(line)) for line in content.splitlines()]


def _of_another_run(store: SharedCache, inputs: RankingCacheKey) -> list[RankedSample] | None:
    found = store.find(KIND, inputs.key)
    return None if found is None else _read(found, lambda other: other == inputs)


def _competition_ranks(values: Sequence[float]) -> list[int]:
    """1 + the number of strictly smaller values."""
    ordered = sorted(values)
    return [bisect_left(ordered, value) + 1 for value in values]
