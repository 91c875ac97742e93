"""The difficulty measurer: how well a model does on the training samples."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pocl.callbacks import OnProgress, ShouldStop, throttle
from pocl.curriculum.journal import DifficultyMeasurement, Journal
from pocl.curriculum.ranking import RankingKey
from pocl.evaluation.answers import (
    GenerationSettings,
    generate_answers,
    generation_batches,
    stop_token_ids,
)
from pocl.evaluation.dataset import EncodedDataset
from pocl.evaluation.rouge import rouge_l
from pocl.evaluation.sampling import Sampler
from pocl.evaluation.token_scores import ScoringSizes, last_turn_cross_entropy
from pocl.models.precision import machine_fingerprint


@dataclass(frozen=True)
class MeasuredModel:
    """The model that the samples are easy or hard for."""

    digest: str
    """Equal digests mean equal answers."""
    structure: PreTrainedModel
    """The model with its configs; its weights need not be there."""
    ready: Callable[[], AbstractContextManager[PreTrainedModel]]
    """The model with all that it answers with, for the length of a block; entered only where something is measured."""
    origin: Mapping[str, str | None] | None = None
    """Where it came from, for a model that does nothing else."""


@dataclass(frozen=True)
class DifficultyMeasurer:
    """Scores a model's answers and its cross-entropy on the last turns of the samples."""

    ranker: MeasuredModel
    tokenizer: PreTrainedTokenizerBase
    dataset: EncodedDataset
    template: str
    """The name of the template that the samples are encoded with."""
    rrf_k: int
    """The constant of reciprocal rank fusion."""
    generation: GenerationSettings
    sampler: Sampler | None
    """Draws the answers; None takes the likeliest tokens."""
    scoring: ScoringSizes
    on_progress: OnProgress
    """Called with (samples measured, samples), once a second at most."""
    should_stop: ShouldStop

    @property
    def cache_key(self) -> RankingKey:
        """All that the ranking by these measurements depends on."""
        generation = self.generation
        return RankingKey(
            model=self.ranker.digest,
            data=self.dataset.digest,
            template=self.template,
            end_ids=tuple(sorted(stop_token_ids(self.ranker.structure, self.tokenizer, generation))),
            rrf_k=self.rrf_k,
            max_new_tokens=generation.max_new_tokens,
            sampling=_sampling_name(self.sampler),
            no_repeat_ngram=generation.no_repeat_ngram,
            batch_size=generation.batch_size,
            generator=generation.generator,
            scoring_tokens=self.scoring.tokens,
            chunk_tokens=self.scoring.chunk_tokens,
            precision=generation.precision.name,
            machine=machine_fingerprint(generation.precision.device),
        )

    def measure(self, journal: Journal) -> list[DifficultyMeasurement]:
        """Measure, batch by batch, what `journal` lacks; what it has reused forms no batch.

        Raises:
            RunStopped: when `should_stop` turns true; finished batches are in the journal.
            SizeTooLarge: memory ran out.
        """
        reused = journal.reused or {}
        missing = [row for row in range(len(self.dataset.samples)) if row not in reused]
        batches = generation_batches([self.dataset.samples[row] for row in missing], self.generation.samples_at_once)
        report = throttle(self.on_progress)
        measured = len(reused)

        def on_batch(done: int, _: int) -> None:
            nonlocal measured
            measured = len(reused) + done
            report(measured, len(self.dataset.samples))

        rows = [[missing[index] for index in batch] for batch in batches]
        if not rows:
            return list(reused.values())
        with self.ranker.ready() as model:

            def measure_batch(indices: Sequence[int]) -> list[DifficultyMeasurement]:
                return self._measure_batch(
                    model, indices, lambda answered, _: report(measured + answered, len(self.dataset.samples))
                )

            return [*reused.values(), *measure_batches(rows, measure_batch, journal, on_batch)]

    def _measure_batch(
        self, model: PreTrainedModel, indices: Sequence[int], on_progress: OnProgress
    ) -> list[DifficultyMeasurement]:
        samples = [self.dataset.samples[i] for i in indices]
        answers = generate_answers(
            model,
            self.tokenizer,
            samples,
            generation=self.generation,
            sampler=self.sampler,
            on_progress=on_progress,
            should_stop=self.should_stop,
        )
        entropies = last_turn_cross_entropy(
            model,
            samples,
            sizes=self.scoring,
            precision=self.generation.precision,
            should_stop=self.should_stop,
        )
        return [
            DifficultyMeasurement(
                row=index,
                digest=self.dataset.samples[index].digest,
                rouge_l=rouge_l(answer.text, self.dataset.references[index]),
                cross_entropy=entropy,
                response=answer.text,
                unfinished_thought=answer.in_thought,
            )
            for index, answer, entropy in zip(indices, answers, entropies, strict=True)
        ]


def _sampling_name(sampler: Sampler | None) -> str:
    """How answers are drawn, as it enters the key of measurements."""
    return "greedy" if sampler is None else f"temperature {sampler.temperature}, seed {sampler.seed}"


def measure_batches(
    batches: Sequence[Sequence[int]],
    measure_batch: Callable[[Sequence[int]], Sequence[DifficultyMeasurement]],
    journal: Journal,
    on_progress: OnProgress | None = None,
) -> list[DifficultyMeasurement]:
    """Measure what `journal` lacks; `on_progress` is called with (samples measured, samples) after each batch.

    A batch is measured whole or not at all: its samples share their rounding, so an interruption changes no bit.
    """
    total = sum(map(len, batches))
    measurements: list[DifficultyMeasurement] = []
    for indices in batches:
        batch = journal.get(indices)
        if batch is None:
            batch = list(measure_batch(indices))
            journal.append(batch)
        measurements += batch
        if on_progress is not None:
            on_progress(len(measurements), total)
    return measurements
