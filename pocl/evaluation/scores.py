"""Scores of a model on held-out samples: ROUGE-L and exact match of its answers, cross-entropy and divergence."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pocl.callbacks import OnProgress, ShouldStop
from pocl.evaluation.answers import GenerationSettings, generate_answers
from pocl.evaluation.dataset import EncodedDataset
from pocl.evaluation.rouge import exact_match, rouge_l
from pocl.evaluation.sampling import Sampler
from pocl.evaluation.token_scores import ScoringSizes, token_scores
from pocl.events import SampledScores, SeedStats
from pocl.spec import Sampling
from pocl.teacher.signal import TeacherSignal


@dataclass(frozen=True)
class Scores:
    """The fields of :class:`~pocl.events.Evaluated` that are measured."""

    rows: int
    """The number of samples."""
    rouge_l: float
    """Mean F1 of the greedy answers, 0 to 100."""
    exact_match: float
    """Per cent of the greedy answers that match a reference."""
    cross_entropy: float
    """Nats per response token."""
    divergence: float | None
    """Forward KL to the teacher at temperature 1, nats per response token; None without a teacher."""
    sampled: SampledScores | None = None


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: EncodedDataset,
    *,
    generation: GenerationSettings,
    scoring: ScoringSizes,
    teacher: TeacherSignal | None = None,
    shared_vocabulary: int | None = None,
    on_progress: OnProgress | None = None,
    should_stop: ShouldStop = lambda: False,
) -> Scores:
    """Score greedy answers, sampled answers where `generation` asks for them, and the reference responses.

    Args:
        teacher: The model whose distributions the divergence is from; without one there is no divergence.
        on_progress: Called with (answers given, answers to give), over all seeds.
        should_stop: Polled before each batch and each generated token.

    Raises:
        RunStopped: when `should_stop` turns true.
        SizeTooLarge: memory ran out.
        ValueError: without a sample.
    """
    samplers = _samplers(generation.sampling)
    scores_by_sampler = []
    for index, sampler in enumerate((None, *samplers)):
        answers = generate_answers(
            model,
            tokenizer,
            dataset.samples,
            generation=generation,
            sampler=sampler,
            on_progress=_part_of(on_progress, index, 1 + len(samplers)),
            should_stop=should_stop,
        )
        scores_by_sampler.append(text_scores(answers, dataset.references))
    cross_entropy, divergence = token_scores(
        model,
        dataset.samples,
        sizes=scoring,
        precision=generation.precision,
        teacher=teacher,
        shared_vocabulary=shared_vocabulary,
        should_stop=should_stop,
    )
    greedy, *sampled = scores_by_sampler
    return Scores(
        rows=len(dataset.samples),
        rouge_l=greedy[0],
        exact_match=greedy[1],
        cross_entropy=cross_entropy,
        divergence=divergence,
        sampled=None if generation.sampling is None else _summarize(generation.sampling, sampled),
    )


def text_scores(answers: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, float]:
    """Mean ROUGE-L F1, 0 to 100, and exact match in per cent."""
    pairs = list(zip(answers, references, strict=True))
    return fmean(rouge_l(*pair) for pair in pairs), 100 * fmean(exact_match(*pair) for pair in pairs)


def _samplers(sampling: Sampling | None) -> list[Sampler]:
    if sampling is None:
        return []
    return [Sampler(temperature=sampling.temperature, top_p=sampling.top_p, seed=seed) for seed in sampling.seeds]


def _summarize(sampling: Sampling, scores_by_seed: Sequence[tuple[float, float]]) -> SampledScores:
    rouge, exact = zip(*scores_by_seed, strict=True)
    return SampledScores(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seeds=sampling.seeds,
        rouge_l=_seed_stats(rouge),
        exact_match=_seed_stats(exact),
    )


def _seed_stats(values: tuple[float, ...]) -> SeedStats:
    return SeedStats(values=values, mean=fmean(values), sd=stdev(values) if len(values) > 1 else None)


def _part_of(on_progress: OnProgress | None, part: int, parts: int) -> OnProgress | None:
    """Report the progress of one of several equal parts as progress of the whole."""
    if on_progress is None:
        return None
    return lambda done, total: on_progress(part * total + done, parts * total)
