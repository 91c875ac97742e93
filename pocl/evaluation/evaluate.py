"""Scores of a model on held-out rows: ROUGE-L and exact match of its answers, cross-entropy, divergence."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from statistics import fmean, stdev

import torch
from pydantic import BaseModel, ConfigDict, TypeAdapter
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pocl.data.batches import Batch, EncodedSample, collate
from pocl.errors import DiskFull, RunStopped
from pocl.evaluation.generate import eos_token_ids_of, generate
from pocl.evaluation.rouge import exact_match, rouge_l
from pocl.evaluation.sampling import Sampler
from pocl.events import SampledScores, SeedStats
from pocl.models.precision import Precision
from pocl.progress import OnProgress
from pocl.spec import ForwardKL, Sampling
from pocl.storage.shared_cache import SharedCache
from pocl.teacher.distillation_loss import CrossEntropyLoss, DistillationLoss
from pocl.teacher.signal import TeacherSignal

ShouldStop = Callable[[], bool]
_LOGITS_AT_ONCE = 1 << 25
"""Tokens x vocabulary of a scored batch, unless a single row exceeds it: 128 MiB in fp32."""


@dataclass(frozen=True)
class Scores:
    """The fields of :class:`~pocl.events.Evaluated` that are measured."""

    rows: int
    rouge_l: float
    """Mean F1 of the greedy answers over rows, 0 to 100."""
    exact_match: float
    """Per cent of rows, greedy answers."""
    cross_entropy: float
    """Nats per response token."""
    divergence: float | None
    """Forward KL to the teacher at temperature 1, nats per response token."""
    sampled: SampledScores | None = None


_SCORES = TypeAdapter(Scores)
_KIND, _SCORES_FILE = "scores", "scores.json"


@dataclass(frozen=True)
class EncodedDataset:
    """Samples encoded once, with the references that answers to them are compared with."""

    samples: tuple[EncodedSample, ...]
    references: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class GenerationSettings:
    """How answers are generated."""

    max_new_tokens: int
    batch_size: int
    end_id: int
    """The token that ends a response in the data's template; the model's own ends end an answer too."""


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: EncodedDataset,
    *,
    generation: GenerationSettings,
    precision: Precision,
    sampling: Sampling | None = None,
    teacher: TeacherSignal | None = None,
    shared_vocabulary: int | None = None,
    on_progress: OnProgress | None = None,
    should_stop: ShouldStop = lambda: False,
) -> Scores:
    """Score `model`: greedy answers, and with `sampling` drawn ones too; without a teacher there is no divergence.

    `on_progress` is called with (answers given, answers to give), over all seeds.

    Raises:
        RunStopped: when `should_stop` turns true; it is asked before each batch and each generated token.
        ValueError: without a row.
    """
    samplers = _samplers(sampling)
    figures = []
    for at, sampler in enumerate((None, *samplers)):
        answers = generate_answers(
            model,
            tokenizer,
            dataset.samples,
            generation=generation,
            precision=precision,
            sampler=sampler,
            on_progress=_part_of(on_progress, at, 1 + len(samplers)),
            should_stop=should_stop,
        )
        figures.append(text_scores(answers, dataset.references))
    cross_entropy, kl = token_scores(
        model,
        dataset.samples,
        batch_size=generation.batch_size,
        precision=precision,
        teacher=teacher,
        shared_vocabulary=shared_vocabulary,
        should_stop=should_stop,
    )
    return Scores(
        rows=len(dataset.samples),
        rouge_l=figures[0][0],
        exact_match=figures[0][1],
        cross_entropy=cross_entropy,
        divergence=kl,
        sampled=None if sampling is None else _sampled(sampling, figures[1:]),
    )


class ScoreCacheKey(BaseModel):
    """All that the scores of a model depend on; equal inputs give equal scores."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    """Digest of weights and config."""
    data: str
    """Digest of the encoded rows."""
    references: str
    """Digest of what the answers are compared with."""
    end_ids: tuple[int, ...]
    """Tokens that end an answer, ascending."""
    max_new_tokens: int
    batch_size: int
    sampling: Sampling | None
    precision: str
    machine: str


def load_or_score(store: SharedCache, inputs: ScoreCacheKey, score: Callable[[], Scores]) -> Scores:
    """The scores of these inputs, from another run that left them in `store`, or else new ones, left there."""
    key = hashlib.sha256(inputs.model_dump_json().encode()).hexdigest()
    found = store.find(_KIND, key)
    if found is not None:
        return _SCORES.validate_json((found / _SCORES_FILE).read_bytes())
    scores = score()
    # Without room for them they are merely not there for the next run.
    with suppress(DiskFull, OSError), store.add(_KIND, key) as scratch:
        (scratch / _SCORES_FILE).write_bytes(_SCORES.dump_json(scores))
    return scores


def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    encoded: Sequence[EncodedSample],
    *,
    generation: GenerationSettings,
    precision: Precision,
    sampler: Sampler | None = None,
    on_progress: OnProgress | None = None,
    should_stop: ShouldStop = lambda: False,
) -> list[str]:
    """Answers to the prompts, as text, in the order of `encoded`: greedy, or drawn by `sampler`.

    What a row draws follows from the sampler's seed and the row's digest.

    Raises:
        RunStopped: when `should_stop` turns true.
    """
    with precision.autocast():
        ids = generate(
            model,
            [row.prompt_ids for row in encoded],
            max_new_tokens=generation.max_new_tokens,
            batch_size=generation.batch_size,
            eos_token_ids=stop_token_ids(model, tokenizer, generation),
            pad_id=generation.end_id,
            sampler=sampler,
            keys=[row.digest for row in encoded],
            on_progress=on_progress,
            should_stop=should_stop,
        )
    return [str(tokenizer.decode(one, skip_special_tokens=True)).strip() for one in ids]


def stop_token_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, generation: GenerationSettings
) -> frozenset[int]:
    """Every token that ends an answer."""
    return eos_token_ids_of(model, tokenizer) | {generation.end_id}


def generation_batches(encoded: Sequence[EncodedSample], size: int) -> list[list[int]]:
    """Batches for generation, as indices: rows of like prompt length, longest first.

    Their composition follows from the rows and the size alone, whatever their order: bits depend on it.
    """
    order = sorted(range(len(encoded)), key=lambda i: (-encoded[i].prompt_length, encoded[i].digest, i))
    return [order[start : start + size] for start in range(0, len(order), size)]


def text_scores(answers: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, float]:
    """Mean ROUGE-L F1, 0 to 100, and exact match in per cent."""
    pairs = list(zip(answers, references, strict=True))
    return fmean(rouge_l(*pair) for pair in pairs), 100 * fmean(exact_match(*pair) for pair in pairs)


def token_scores(
    model: PreTrainedModel,
    encoded: Sequence[EncodedSample],
    *,
    batch_size: int,
    precision: Precision,
    teacher: TeacherSignal | None = None,
    shared_vocabulary: int | None = None,
    should_stop: ShouldStop = lambda: False,
) -> tuple[float, float | None]:
    """Cross-entropy, and forward KL to the teacher at temperature 1; nats per response token.

    Raises:
        RunStopped: when `should_stop` turns true.
    """
    scores = _token_scorer(model, teacher, shared_vocabulary, precision)
    ce_sum = kl_sum = 0.0
    tokens = 0
    for _, batch in scoring_batches(encoded, batch_size, model):
        if should_stop():
            raise RunStopped
        cross_entropies, *divergences = scores(batch)
        ce_sum += cross_entropies.sum().item()
        kl_sum += sum(divergence.sum().item() for divergence in divergences)
        tokens += batch.tokens
    return ce_sum / max(1, tokens), kl_sum / max(1, tokens) if teacher is not None else None


def last_turn_cross_entropy(
    model: PreTrainedModel,
    encoded: Sequence[EncodedSample],
    *,
    batch_size: int,
    precision: Precision,
    should_stop: ShouldStop = lambda: False,
) -> list[float]:
    """Mean cross-entropy of each row's last assistant turn, in nats per token, in the order of `encoded`.

    Raises:
        RunStopped: when `should_stop` turns true.
    """
    loss = CrossEntropyLoss(model, precision)
    means = [0.0] * len(encoded)
    for indices, batch in scoring_batches(encoded, batch_size, model):
        if should_stop():
            raise RunStopped
        losses = loss.scores(batch)
        of_row = batch.predicts.nonzero()[:, 0]
        counted = batch.last_turn.to(losses.dtype)
        zeros = torch.zeros(len(indices), dtype=losses.dtype, device=losses.device)
        sums = zeros.index_add(0, of_row, losses * counted)
        counts = zeros.index_add(0, of_row, counted)
        for index, mean in zip(indices, (sums / counts.clamp(min=1)).tolist(), strict=True):
            means[index] = mean
    return means


def scoring_batches(
    encoded: Sequence[EncodedSample], size: int, model: PreTrainedModel, *, logits_at_once: int = _LOGITS_AT_ONCE
) -> Iterator[tuple[list[int], Batch]]:
    """Batches of rows of similar length, each with the indices of its rows, made as they are asked for.

    At most `size` rows each, and fewer where response tokens times vocabulary would exceed `logits_at_once`,
    down to one. The composition follows from the rows, these two and the vocabulary alone.
    """
    order = sorted(range(len(encoded)), key=lambda i: (len(encoded[i].input_ids), encoded[i].digest, i))
    max_tokens = logits_at_once // model.config.get_text_config().vocab_size
    pieces: list[list[int]] = []
    tokens = 0
    for index in order:
        more = sum(encoded[index].label_mask)
        if not pieces or len(pieces[-1]) == size or tokens + more > max_tokens:
            pieces.append([])
            tokens = 0
        pieces[-1].append(index)
        tokens += more
    return ((piece, collate([encoded[i] for i in piece], device=model.device)) for piece in pieces)


def _token_scorer(
    model: PreTrainedModel, teacher: TeacherSignal | None, shared_vocabulary: int | None, precision: Precision
) -> Callable[[Batch], tuple[Tensor, ...]]:
    """From a batch to the cross-entropy of its response tokens, `[T]`, and with a teacher their forward KL, `[T]`."""
    if teacher is None:
        cross_entropy = CrossEntropyLoss(model, precision)
        return lambda batch: (cross_entropy.scores(batch),)
    loss = DistillationLoss(model, teacher, ForwardKL(), shared_vocabulary=shared_vocabulary, precision=precision)
    return loss.scores


def _samplers(sampling: Sampling | None) -> list[Sampler]:
    if sampling is None:
        return []
    return [Sampler(temperature=sampling.temperature, top_p=sampling.top_p, seed=seed) for seed in sampling.seeds]


def _sampled(sampling: Sampling, figures: Sequence[tuple[float, float]]) -> SampledScores:
    rouge, exact = zip(*figures, strict=True)
    return SampledScores(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seeds=sampling.seeds,
        rouge_l=_spread(rouge),
        exact_match=_spread(exact),
    )


def _spread(values: tuple[float, ...]) -> SeedStats:
    return SeedStats(values=values, mean=fmean(values), sd=stdev(values) if len(values) > 1 else None)


def _part_of(on_progress: OnProgress | None, part: int, parts: int) -> OnProgress | None:
    """Progress of one of several equal parts, as progress of the whole."""
    if on_progress is None:
        return None
    return lambda done, total: on_progress(part * total + done, parts * total)
