"""Scores of a model on the reference responses, token by token (teacher forcing): cross-entropy and divergence."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pocl.callbacks import ShouldStop
from pocl.data.batches import Batch, EncodedSample, collate, pack
from pocl.data.micro_batches import indices_by_length
from pocl.errors import RunStopped
from pocl.losses.buffers import LossExecution
from pocl.models.packed import can_pack
from pocl.models.precision import Precision
from pocl.out_of_memory import limited_by
from pocl.spec import SFT, ForwardKL
from pocl.teacher.distillation_loss import CrossEntropyLoss, TrainingLoss, training_loss
from pocl.teacher.signal import TeacherSignal


@dataclass(frozen=True)
class ScoringSizes:
    """How much is scored at once."""

    tokens: int
    """The most tokens of a batch, padding included where it is not packed; a longer sample is alone in its batch."""
    chunk_tokens: int
    """The most response tokens whose logits exist at a time, where the head is fused with the loss."""


class TokenScores(NamedTuple):
    """Scores of the response tokens of some samples."""

    cross_entropy: float
    """The mean over all response tokens, in nats."""
    divergence: float | None
    """The mean forward KL to the teacher at temperature 1, in nats per response token; None without a teacher."""
    cross_entropy_sums: tuple[float, ...]
    """The cross-entropy of each sample, summed over its response tokens, in the order of the samples."""


def token_scores(
    model: PreTrainedModel,
    samples: Sequence[EncodedSample],
    *,
    sizes: ScoringSizes,
    precision: Precision,
    teacher: TeacherSignal | None = None,
    shared_vocabulary: int | None = None,
    should_stop: ShouldStop = lambda: False,
) -> TokenScores:
    """Cross-entropy, and with a teacher the divergence from it.

    Raises:
        RunStopped: when `should_stop` turns true.
        SizeTooLarge: memory ran out.
    """
    tokens = 0
    order: list[int] = []
    sums_by_batch = []
    with limited_by("scoring_tokens"):
        loss = training_loss(
            model,
            teacher,
            SFT() if teacher is None else ForwardKL(),
            shared_vocabulary=shared_vocabulary,
            precision=precision,
            execution=LossExecution(sizes.chunk_tokens),
        )
        # Read once at the end: each read would wait for the device.
        sums = torch.zeros(2, dtype=torch.float64, device=model.device)
        packed = _packs(loss, model, samples, precision)
        for indices, batch in scoring_batches(samples, sizes.tokens, model.device, packed=packed):
            if should_stop():
                raise RunStopped
            for place, scores in enumerate(_scores(loss, batch)):
                sums[place] += scores.sum(dtype=torch.float64)
                if place == 0:
                    order += indices
                    sums_by_batch.append(_sample_sums(scores.double(), batch))
            tokens += batch.tokens
        cross_entropy, divergence = (sums / max(1, tokens)).tolist()
        by_sample = torch.cat(sums_by_batch).tolist() if sums_by_batch else []
    sum_of = dict(zip(order, by_sample, strict=True))
    return TokenScores(
        cross_entropy,
        divergence if teacher is not None else None,
        tuple(sum_of[index] for index in range(len(samples))),
    )


def last_turn_cross_entropy(
    model: PreTrainedModel,
    samples: Sequence[EncodedSample],
    *,
    sizes: ScoringSizes,
    precision: Precision,
    should_stop: ShouldStop = lambda: False,
) -> list[float]:
    """Mean cross-entropy of each sample's last assistant turn, in nats per token, in the order of `samples`.

    Raises:
        RunStopped: when `should_stop` turns true.
        SizeTooLarge: memory ran out.
    """
    order: list[int] = []
    means = []
    with limited_by("scoring_tokens"):
        loss = CrossEntropyLoss(model, precision, execution=LossExecution(sizes.chunk_tokens))
        packed = _packs(loss, model, samples, precision)
        for indices, batch in scoring_batches(samples, sizes.tokens, model.device, packed=packed):
            if should_stop():
                raise RunStopped
            order += indices
            means.append(_last_turn_means(loss.scores(batch), batch))
        # Read once at the end: each read would wait for the device.
        mean_of = dict(zip(order, torch.cat(means).tolist() if means else [], strict=True))
    return [mean_of[index] for index in range(len(samples))]


def scoring_batches(
    samples: Sequence[EncodedSample], max_tokens: int, device: torch.device, *, packed: bool
) -> Iterator[tuple[list[int], Batch]]:
    """Batches of samples of similar length, packed or padded, each with the indices of its samples, made lazily.

    The composition follows from the set of samples and `max_tokens`, the most tokens of a batch with its padding.
    """
    batches = indices_by_length(samples, max_samples=len(samples), max_tokens=max_tokens, packed=packed)
    batch_of = pack if packed else collate
    return ((indices, batch_of([samples[i] for i in indices], device=device)) for indices in batches)


def _last_turn_means(entropies: Tensor, batch: Batch) -> Tensor:
    """The mean over the last turn of each sample of the batch, `[samples]` float64.

    `entropies` are those of its response tokens, `[T]`, which come sample by sample.
    """
    is_last_turn = batch.last_turn.double()
    sums = _sample_sums(entropies.double() * is_last_turn, batch)
    return sums / _sample_sums(is_last_turn, batch).clamp(min=1)


def _sample_sums(values: Tensor, batch: Batch) -> Tensor:
    """The sums over each sample of the batch, `[samples]` float64, of the values of its response tokens, `[T]`."""
    counts = torch.tensor([sample.predicted_tokens for sample in batch.samples])
    sample_of_token = torch.arange(len(counts)).repeat_interleave(counts).to(values.device, non_blocking=True)
    zeros = torch.zeros(len(counts), dtype=torch.float64, device=values.device)
    return zeros.index_add(0, sample_of_token, values)


def _packs(loss: TrainingLoss, model: PreTrainedModel, samples: Sequence[EncodedSample], precision: Precision) -> bool:
    """Whether samples are packed: the head is fused with the loss, and the model, tried in eval mode, allows it."""
    if not loss.is_fused:
        return False
    was_training = model.training
    model.train(False)
    try:
        return can_pack(model, max((len(sample.input_ids) for sample in samples), default=1), precision)
    finally:
        model.train(was_training)


def _scores(loss: TrainingLoss, batch: Batch) -> tuple[Tensor, ...]:
    """The cross-entropy of the response tokens of `batch`, `[T]`, and with a teacher their forward KL, `[T]`."""
    scores = loss.scores(batch)
    return (scores,) if isinstance(scores, Tensor) else scores
