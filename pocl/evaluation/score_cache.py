"""Scores that another run may have computed already."""

import hashlib
from collections.abc import Callable
from contextlib import suppress

from pydantic import BaseModel, ConfigDict, TypeAdapter

from pocl.errors import DiskFull
from pocl.evaluation.rouge import METRICS_VERSION
from pocl.evaluation.scores import Scores
from pocl.spec import Sampling
from pocl.storage.shared_cache import SharedCache

_SCORES = TypeAdapter(Scores)
_KIND, _SCORES_FILE = "scores", "scores.json"

GENERATION_VERSION = 3
"""Version of how samples are answered and scored; to be raised when equal inputs get other bits."""


class ScoreCacheKey(BaseModel):
    """All that the scores of a model depend on: equal keys have equal scores."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    """Digest of weights and config."""
    data: str
    """Digest of the encoded samples."""
    references: str
    """Digest of what the answers are compared with."""
    end_ids: tuple[int, ...]
    """The tokens that end an answer, ascending."""
    answer_form: str = ""
    """What of an answer is taken off before it is compared."""
    max_new_tokens: int
    batch_size: int
    generation: int = GENERATION_VERSION
    metrics: int = METRICS_VERSION
    generator: str
    """What generated the answers: the engine's own loop, or vLLM."""
    scoring_tokens: int
    chunk_tokens: int
    sampling: Sampling | None
    precision: str
    machine: str
    """What bits depend on besides: versions, hardware and threads."""

    @property
    def digest(self) -> str:
        """SHA-256 over all fields."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


def load_or_score(cache: SharedCache, key: ScoreCacheKey, score: Callable[[], Scores]) -> Scores:
    """The scores under `key`, which another run left in `cache`, or else computed by `score` and left there."""
    scores = find_scores(cache, key)
    if scores is None:
        scores = score()
        content = _SCORES.dump_json(scores)
        # Without room in the cache, the next run merely computes them again.
        with suppress(DiskFull, OSError), cache.add(_KIND, key.digest, len(content)) as scratch:
            (scratch / _SCORES_FILE).write_bytes(content)
    return scores


def find_scores(cache: SharedCache, key: ScoreCacheKey) -> Scores | None:
    """The scores under `key`; None where the cache has none, or cannot be used."""
    with suppress(OSError), cache.find(_KIND, key.digest) as entry:
        if entry is not None:
            return _SCORES.validate_json((entry / _SCORES_FILE).read_bytes())
    return None
