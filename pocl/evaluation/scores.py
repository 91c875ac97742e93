"""Scores of a model on held-out samples: ROUGE-L and exact match of its answers, cross-entropy and divergence."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from statistics import fmean, stdev
from typing import Any, NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pocl.callbacks import OnProgress, ShouldStop
from pocl.evaluation.answers import GenerationSettings, generate_answers, thoughts_not_closed
from pocl.evaluation.dataset import EncodedDataset
from pocl.evaluation.rouge import exact_match, rouge_l
from pocl.evaluation.row_scores import MAX_ROWS, MAX_SHOWN, RowScores, shown
from pocl.evaluation.sampling import Sampler
from pocl.evaluation.token_scores import ScoringSizes, token_scores
from pocl.events import SampledScores, SeedStats
from pocl.spec import Sampling
from pocl.teacher.signal import TeacherSignal


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

    @property
    def reported(self) -> dict[str, Any]:
        """The fields of the event, by name."""
        names = {field.name for field in fields(self)} - {"by_row", "answers"}
        return {name: getattr(self, name) for name in names}


class _AnswerScores(NamedTuple):
    """The scores of the answers to the samples that have a reference, in their order."""

    rouge_l: tuple[float, ...]
    exact_match: tuple[float, ...]


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

    Samples without a reference are answered, once and greedily, and not scored.

    Args:
        teacher: The model whose distributions the divergence is from; without one there is no divergence.
        on_progress: Called with (answers given, answers to give), over all seeds.
        should_stop: Polled before each batch and each generated token.

    Raises:
        RunStopped: when `should_stop` turns true.
        SizeTooLarge: memory ran out.
        ValueError: without a sample.
    """
    if not dataset.samples:
        raise ValueError("an evaluation needs a sample")
    scored = dataset.scored
    samplers = _samplers(generation.sampling) if scored.samples else []
    answers_by_sampler = [
        generate_answers(
            model,
            tokenizer,
            dataset.samples if sampler is None else scored.samples,
            generation=generation,
            sampler=sampler,
            on_progress=_part_of(on_progress, index, 1 + len(samplers)),
            should_stop=should_stop,
        )
        for index, sampler in enumerate((None, *samplers))
    ]
    greedy_answers = answers_by_sampler[0]
    all_answers = tuple(answer.text for answer in greedy_answers)
    answers_by_sampler[0] = [greedy_answers[row] for row in dataset.scored_rows]
    warning = thoughts_not_closed(greedy_answers, generation.max_new_tokens, "held-out samples")
    if warning is not None:
        generation.sink(warning)
    greedy, *sampled = [_answer_scores([answer.text for answer in each], scored) for each in answers_by_sampler]
    tokens = token_scores(
        model,
        scored.samples,
        sizes=scoring,
        precision=generation.precision,
        teacher=teacher,
        shared_vocabulary=shared_vocabulary,
        should_stop=should_stop,
    )
    return Scores(
        rows=len(scored.samples),
        rouge_l=_mean(greedy.rouge_l),
        exact_match=_mean(greedy.exact_match),
        cross_entropy=tokens.cross_entropy,
        divergence=tokens.divergence,
        unfinished_thoughts=sum(answer.in_thought for answer in answers_by_sampler[0]),
        sampled=_summarize(generation.sampling, sampled) if generation.sampling is not None and sampled else None,
        by_row=RowScores(
            rouge_l=tuple(round(score, 4) for score in greedy.rouge_l[:MAX_ROWS]),
            exact_match=greedy.exact_match[:MAX_ROWS],
            cross_entropy=tuple(round(nats, 6) for nats in tokens.cross_entropy_sums[:MAX_ROWS]),
            tokens=tuple(sample.predicted_tokens for sample in scored.samples[:MAX_ROWS]),
            shown=tuple(
                shown(str(tokenizer.decode(list(sample.prompt_ids), skip_special_tokens=True)), references, answer)
                for sample, references, answer in zip(
                    dataset.samples[:MAX_SHOWN], dataset.references, all_answers, strict=False
                )
            ),
        ),
        answers=all_answers,
    )


def _answer_scores(answers: Sequence[str], dataset: EncodedDataset) -> _AnswerScores:
    pairs = list(zip(answers, dataset.references, strict=True))
    return _AnswerScores(tuple(rouge_l(*pair) for pair in pairs), tuple(100.0 * exact_match(*pair) for pair in pairs))


def _mean(values: Sequence[float]) -> float:
    return fmean(values) if values else 0.0


def _samplers(sampling: Sampling | None) -> list[Sampler]:
    if sampling is None:
        return []
    return [Sampler(temperature=sampling.temperature, top_p=sampling.top_p, seed=seed) for seed in sampling.seeds]


def _summarize(sampling: Sampling, scores_by_seed: Sequence[_AnswerScores]) -> SampledScores:
    return SampledScores(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seeds=sampling.seeds,
        rouge_l=_seed_stats(tuple(fmean(scores.rouge_l) for scores in scores_by_seed)),
        exact_match=_seed_stats(tuple(fmean(scores.exact_match) for scores in scores_by_seed)),
    )


def _seed_stats(values: tuple[float, ...]) -> SeedStats:
    return SeedStats(values=values, mean=fmean(values), sd=stdev(values) if len(values) > 1 else None)


def _part_of(on_progress: OnProgress | None, part: int, parts: int) -> OnProgress | None:
    """Report the progress of one of several equal parts as progress of the whole."""
    if on_progress is None:
        return None
    return lambda done, total: on_progress(part * total + done, parts * total)
