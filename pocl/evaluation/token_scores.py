"""Scores of a model on the reference responses, token by token (teacher forcing): cross-entropy and divergence."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pocl.callbacks import ShouldStop
from pocl.data.batches import Batch, EncodedSample, collate
from pocl.data.micro_batches import indices_by_length
from pocl.errors import RunStopped
from pocl.losses.buffers import LossExecution
from pocl.models.precision import Precision
from pocl.out_of_memory import limited_by
from pocl.spec import ForwardKL
from pocl.teacher.distillation_loss import CrossEntropyLoss, DistillationLoss
from pocl.teacher.signal import TeacherSignal


@dataclass(frozen=True)
class ScoringSizes:
    """How much is scored at once."""

    tokens: int
    """The most tokens of a batch, padding included; a longer sample is alone in its batch."""
    chunk_tokens: int
    """The most response tokens whose logits exist at a time, where the head is fused with the loss."""


def token_scores(
    model: PreTrainedModel,
    samples: Sequence[EncodedSample],
    *,
    sizes: ScoringSizes,
    precision: Precision,
    teacher: TeacherSignal | None = None,
    shared_vocabulary: int | None = None,
    should_stop: ShouldStop = lambda: False,
) -> tuple[float, float | None]:
    """Mean cross-entropy, and mean forward KL to the teacher at temperature 1; both in nats per response token.

    Without a teacher there is no KL.

    Raises:
        RunStopped: when `should_stop` turns true.
        SizeTooLarge: memory ran out.
    """
    ce_sum = kl_sum = 0.0
    tokens = 0
    with limited_by("scoring_tokens"):
        score_batch = _batch_scorer(model, teacher, shared_vocabulary, precision, sizes.chunk_tokens)
        for _, batch in scoring_batches(samples, sizes.tokens, model.device):
            if should_stop():
                raise RunStopped
            cross_entropies, *divergences = score_batch(batch)
            ce_sum += cross_entropies.sum().item()
            kl_sum += sum(divergence.sum().item() for divergence in divergences)
            tokens += batch.tokens
    return ce_sum / max(1, tokens), kl_sum / max(1, tokens) if teacher is not None else None


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
    means = [0.0] * len(samples)
    with limited_by("scoring_tokens"):
        loss = CrossEntropyLoss(model, precision, execution=LossExecution(sizes.chunk_tokens))
        for indices, batch in scoring_batches(samples, sizes.tokens, model.device):
            if should_stop():
                raise RunStopped
            for index, mean in zip(indices, _last_turn_means(loss.scores(batch), batch), strict=True):
                means[index] = mean
    return means


def scoring_batches(
    samples: Sequence[EncodedSample], max_tokens: int, device: torch.device
) -> Iterator[tuple[list[int], Batch]]:
    """Batches of samples of similar length, each with the indices of its samples, collated lazily.

    The composition follows from the set of samples and `max_tokens`, the most tokens of a batch with its padding.
    """
    batches = indices_by_length(samples, max_samples=len(samples), max_tokens=max_tokens, packed=False)
    return ((indices, collate([samples[i] for i in indices], device=device)) for indices in batches)


def _last_turn_means(entropies: Tensor, batch: Batch) -> list[float]:
    """The mean over the last turn of each sample of the batch; `entropies` are those of its response tokens, `[T]`."""
    row_of_token = batch.predicting // batch.predicts.shape[1]
    is_last_turn = batch.last_turn.to(entropies.dtype)
    zeros = torch.zeros(len(batch.samples), dtype=entropies.dtype, device=entropies.device)
    sums = zeros.index_add(0, row_of_token, entropies * is_last_turn)
    tokens = zeros.index_add(0, row_of_token, is_last_turn)
    means: list[float] = (sums / tokens.clamp(min=1)).tolist()
    return means


def _batch_scorer(
    model: PreTrainedModel,
    teacher: TeacherSignal | None,
    shared_vocabulary: int | None,
    precision: Precision,
    chunk_tokens: int,
) -> Callable[[Batch], tuple[Tensor, ...]]:
    """From a batch to the cross-entropy of its response tokens, `[T]`, and with a teacher their forward KL, `[T]`."""
    if teacher is None:
        cross_entropy = CrossEntropyLoss(model, precision, execution=LossExecution(chunk_tokens))
        return lambda batch: (cross_entropy.scores(batch),)
    return DistillationLoss(
        model,
        teacher,
        ForwardKL(),
        shared_vocabulary=shared_vocabulary,
        precision=precision,
        execution=LossExecution(chunk_tokens),
    ).scores
