"""What the student as it starts makes of the training samples: the measurements behind a ranking."""

from collections.abc import Callable, Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pocl.curriculum.journal import DifficultyMeasurement, Journal
from pocl.evaluation.evaluate import (
    EncodedDataset,
    GenerationSettings,
    ShouldStop,
    generate_answers,
    generation_batches,
    last_turn_cross_entropy,
)
from pocl.evaluation.rouge import rouge_l
from pocl.models.precision import Precision
from pocl.progress import OnProgress


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: EncodedDataset,
    journal: Journal,
    *,
    generation: GenerationSettings,
    precision: Precision,
    on_progress: OnProgress | None = None,
    should_stop: ShouldStop = lambda: False,
) -> list[DifficultyMeasurement]:
    """Greedy answers and cross-entropies of the last turns, batch by batch as `journal` lacks them.

    Raises:
        RunStopped: when `should_stop` turns true; finished batches are in the journal.
    """

    def of_batch(indices: Sequence[int]) -> list[DifficultyMeasurement]:
        encoded = [rows.samples[i] for i in indices]
        answers = generate_answers(
            model, tokenizer, encoded, generation=generation, precision=precision, should_stop=should_stop
        )
        entropies = last_turn_cross_entropy(
            model, encoded, batch_size=generation.batch_size, precision=precision, should_stop=should_stop
        )
        return [
            DifficultyMeasurement(
                row=i,
                digest=rows.samples[i].digest,
                rouge_l=rouge_l(text, rows.references[i]),
                cross_entropy=entropy,
                response=text,
            )
            for i, text, entropy in zip(indices, answers, entropies, strict=True)
        ]

    batches = generation_batches(rows.samples, generation.batch_size)
    return measure_batches(batches, of_batch, journal, on_progress)


def measure_batches(
    batches: Sequence[Sequence[int]],
    of_batch: Callable[[Sequence[int]], Sequence[DifficultyMeasurement]],
    journal: Journal,
    on_progress: OnProgress | None = None,
) -> list[DifficultyMeasurement]:
    """Measure what `journal` lacks; `on_progress` is called with (samples done, samples) after each batch.

    A batch is measured whole or not at all: its rows share their rounding, so an interruption changes no bit.
    """
    total = sum(map(len, batches))
    measured: list[DifficultyMeasurement] = []
    for rows in batches:
        batch = journal.found(rows)
        if batch is None:
            batch = list(of_batch(rows))
            journal.append(batch)
        measured += batch
        if on_progress is not None:
            on_progress(len(measured), total)
    return measured
