"""Difficulty of the training samples for the student as it starts, and their order from easy to hard.

Two ranks are fused: ROUGE-L of the student's own answer (descending) and its mean cross-entropy on the
reference (ascending), 1 the easiest; score = 1/(k + rank_a) + 1/(k + rank_b) (reciprocal rank fusion,
Cormack et al. 2009; POCL, arXiv 2506.05695 section 3.1).
"""

import hashlib
import json
from bisect import bisect_left
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from pocl.errors import DiskFull
from pocl.manifest import replace_file
from pocl.reuse import ReuseStore

KIND = "rankings"
RANKING_FILE = "ranking.jsonl"
INPUTS_FILE = "ranking.json"


@dataclass(frozen=True)
class Measured:
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


@dataclass(frozen=True)
class Ranked(Measured):
    rank: int
    """1 is the easiest."""
    score: float
    rank_rouge_l: int
    rank_cross_entropy: int


class RankingInputs(BaseModel):
    """All that a ranking depends on; equal inputs give an equal ranking."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    student: str
    """Digest of the student's weights and config."""
    data: str
    """Digest of the encoded samples, in file order."""
    template: str
    rrf_k: int
    max_new_tokens: int
    batch_size: int
    """Rows that were answered together, which rounding depends on."""
    precision: str
    machine: str

    @property
    def key(self) -> str:
        """SHA-256 over the inputs."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


def rank(measured: Sequence[Measured], *, k: int = 60) -> list[Ranked]:
    """Order samples from easy to hard.

    Equal values share a rank, and equal scores are ordered by cross-entropy and then by digest, so that the
    order of the data file has no say. Rows of equal content are interchangeable.
    """
    rouge_ranks = _competition_ranks([-sample.rouge_l for sample in measured])
    ce_ranks = _competition_ranks([sample.cross_entropy for sample in measured])
    scored = [
        (1 / (k + a) + 1 / (k + b), a, b, sample) for a, b, sample in zip(rouge_ranks, ce_ranks, measured, strict=True)
    ]
    scored.sort(key=lambda item: (-item[0], item[3].cross_entropy, item[3].digest, item[3].row))
    return [
        Ranked(**asdict(sample), rank=place, score=score, rank_rouge_l=a, rank_cross_entropy=b)
        for place, (score, a, b, sample) in enumerate(scored, start=1)
    ]


def load_or_rank(
    directory: Path, inputs: RankingInputs, measure: Callable[[], Sequence[Measured]], store: ReuseStore
) -> tuple[list[Ranked], bool]:
    """The ranking of these inputs: from `directory`, or from what another run left in `store`, or else a new one.

    It is in both places afterwards. Returns the ranking and whether `directory` had it.
    """
    found = _read(directory, inputs)
    if found is not None:
        return found, True
    shared = store.find(KIND, inputs.key)
    ranking = None if shared is None else _read(shared, inputs)
    if ranking is None:
        ranking = rank(measure(), k=inputs.rrf_k)
        with suppress(DiskFull), store.add(KIND, inputs.key) as scratch:
            _write(scratch, inputs, ranking)
    _write(directory, inputs, ranking)
    return ranking, False


def _write(directory: Path, inputs: RankingInputs, ranking: Sequence[Ranked]) -> None:
    text = "".join(json.dumps(asdict(sample), ensure_ascii=False) + "\n" for sample in ranking)
    replace_file(directory / RANKING_FILE, text)
    # Written last: it vouches for the file above, by its digest too.
    seal = {"key": inputs.key, "sha256": hashlib.sha256(text.encode()).hexdigest(), "inputs": inputs.model_dump()}
    replace_file(directory / INPUTS_FILE, json.dumps(seal, indent=1) + "\n")


def _read(directory: Path, inputs: RankingInputs) -> list[Ranked] | None:
    try:
        seal = json.loads((directory / INPUTS_FILE).read_bytes())
        content = (directory / RANKING_FILE).read_bytes()
    except (OSError, ValueError):
        return None
    if seal.get("key") != inputs.key or seal.get("sha256") != hashlib.sha256(content).hexdigest():
        return None
    return [Ranked(**json.loads(line)) for line in content.splitlines()]


def _competition_ranks(values: Sequence[float]) -> list[int]:
    """1 + the number of strictly smaller values."""
    ordered = sorted(values)
    return [bisect_left(ordered, value) + 1 for value in values]
