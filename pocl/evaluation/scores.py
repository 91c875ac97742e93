"""What a model scores on held-out samples: ROUGE-L and exact match of its answers, cross-entropy and divergence."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from statistics import fmean, stdev
from typing import Any, NamedTuple, Self

from pocl.evaluation.dataset import EncodedDataset
from pocl.evaluation.rouge import exact_match, rouge_l
from pocl.evaluation.row_scores import RowScores
from pocl.events import SampledScores, SeedStats
from pocl.spec import Sampling


@dataclass(frozen=True)
class Scores:
    """The fields of :class:`~pocl.events.Evaluated` that are measured, and the scores of each sample."""

    rows: int
    """The number of samples that have a reference; where it is 0 nothing is measured, and all figures are 0."""
    rouge_l: float
    """Mean F1 of the greedy answers, 0 to 100."""
    exact_match: float
    """Per cent of the greedy answers that match a reference."""
    cross_entropy: float
    """Nats per response token."""
    divergence: float | None
    """Forward KL to the teacher at temperature 1, nats per response token; None without a teacher."""
    unfinished_thoughts: int = 0
    """The greedy answers that end inside their thought, and so say nothing."""
    sampled: SampledScores | None = None
    by_row: RowScores | None = None
    """Scores of each sample, and some of the answers."""
    answers: tuple[str, ...] = ()
    """The greedy answers to all samples, those without a reference included."""
    in_thought: tuple[bool, ...] = ()
    """For each of `answers` whether it ended inside its thought, and so says nothing."""

    @property
    def reported(self) -> dict[str, Any]:
        """The fields of the event, by name."""
        names = {field.name for field in fields(self)} - {"by_row", "answers", "in_thought"}
        return {name: getattr(self, name) for name in names}


class AnswerScores(NamedTuple):
    """The scores of the answers to the samples that have a reference, in their order."""

    rouge_l: tuple[float, ...]
    exact_match: tuple[float, ...]

    @classmethod
    def of(cls, answers: Sequence[str], scored: EncodedDataset) -> Self:
        """The scores of the answers to the samples of `scored`, each of which has a reference."""
        pairs = list(zip(answers, scored.references, strict=True))
        return cls(tuple(rouge_l(*pair) for pair in pairs), tuple(100.0 * exact_match(*pair) for pair in pairs))

    @property
    def means(self) -> tuple[float, float]:
        """The mean of both over the samples; 0 without a sample."""
        return (fmean(self.rouge_l), fmean(self.exact_match)) if self.rouge_l else (0.0, 0.0)


def summarise_seeds(sampling: Sampling, scores_by_seed: Sequence[AnswerScores]) -> SampledScores:
    """The scores of sampled answers over the seeds of `sampling`, of which there is at least one."""
    rouge, exact = zip(*(scores.means for scores in scores_by_seed), strict=True)
    return SampledScores(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seeds=sampling.seeds,
        rouge_l=_seed_stats(rouge),
        exact_match=_seed_stats(exact),
    )


def _seed_stats(values: tuple[float, ...]) -> SeedStats:
    return SeedStats(values=values, mean=fmean(values), sd=stdev(values) if len(values) > 1 else None)
