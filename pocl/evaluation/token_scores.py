"""Scores of a model on the reference responses, token by token (teacher forcing): cross-entropy and divergence."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pocl.callbacks import ShouldStop
from pocl.data.batches import Batch, EncodedSample, collate
from pocl.errors import RunStopped
from pocl.models.precision import Precision
from pocl.spec import ForwardKL
from pocl.teacher.distillation_loss import CrossEntropyLoss, DistillationLoss
from pocl.teacher.signal import TeacherSignal

_MAX_LOGITS = 1 << 25
"""Response tokens x vocabulary of a batch, unless a single sample exceeds it: 128 MiB in fp32."""


def token_scores(
    model: PreTrainedModel,
    samples: Sequence[EncodedSample],
    *,
    batch_size: int,
    precision: Precision,
    teacher: TeacherSignal | None = None,
    shared_vocabulary: int | None = None,
    should_stop: ShouldStop = lambda: False,
) -> tuple[float, float | None]:
    """Mean cross-entropy, and mean forward KL to the teacher at temperature 1; both in nats per response token.

    Without a teacher there is no KL.

    Raises:
        RunStopped: when `should_stop` turns true.
    """
    score_batch = _batch_scorer(model, teacher, shared_vocabulary, precision)
    ce_sum = kl_sum = 0.0
    tokens = 0
    for _, batch in scoring_batches(samples, batch_size, model):
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
    batch_size: int,
    precision: Precision,
    should_stop: ShouldStop = lambda: False,
) -> list[float]:
    """Mean cross-entropy of each sample's last assistant turn, in nats per token, in the order of `samples`.

    Raises:
        RunStopped: when `should_stop` turns true.
    """
    loss = CrossEntropyLoss(model, precision)
    means = [0.0] * len(samples)
    for indices, batch in scoring_batches(samples, batch_size, model):
        if should_stop():
            raise RunStopped
        entropies = loss.scores(batch)
        row_of_token = batch.predicts.nonzero()[:, 0]
        is_last_turn = batch.last_turn.to(entropies.dtype)
        zeros = torch.zeros(len(indices), dtype=entropies.dtype, device=entropies.device)
        sums = zeros.index_add(0, row_of_token, entropies * is_last_turn)
        tokens = zeros.index_add(0, row_of_token, is_last_turn)
        for index, mean in zip(indices, (sums / tokens.clamp(min=1)).tolist(), strict=True):
            means[index] = mean
    return means


def scoring_batches(
    samples: Sequence[EncodedSample], size: int, model: PreTrainedModel, *, max_logits: int = _MAX_LOGITS
) -> Iterator[tuple[list[int], Batch]]:
    """Batches of samples of similar length, each with the indices of its samples, collated lazily.

    At most `size` samples each, and fewer where response tokens times vocabulary would exceed `max_logits`, down to
    one. The composition follows from the samples, these two bounds and the vocabulary alone.
    """
    order = sorted(range(len(samples)), key=lambda i: (len(samples[i].input_ids), samples[i].digest, i))
    max_tokens = max_logits // model.config.get_text_config().vocab_size
    batches: list[list[int]] = []
    tokens = 0
    for index in order:
        response_tokens = sum(samples[index].label_mask)
        if not batches or len(batches[-1]) == size or tokens + response_tokens > max_tokens:
            batches.append([])
            tokens = 0
        batches[-1].append(index)
        tokens += response_tokens
    return ((indices, collate([samples[i] for i in indices], device=model.device)) for indices in batches)


def _batch_scorer(
    model: PreTrainedModel, teacher: TeacherSignal | None, shared_vocabulary: int | None, precision: Precision
) -> Callable[[Batch], tuple[Tensor, ...]]:
    """From a batch to the cross-entropy of its response tokens, `[T]`, and with a teacher their forward KL, `[T]`."""
    if teacher is None:
        cross_entropy = CrossEntropyLoss(model, precision)
        return lambda batch: (cross_entropy.scores(batch),)
    return DistillationLoss(
        model, teacher, ForwardKL(), shared_vocabulary=shared_vocabulary, precision=precision
    ).scores
