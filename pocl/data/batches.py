"""Padded and packed batches of encoded samples.

Labels are shifted in one place, for padded and packed batches alike: `predicts` marks the positions whose next token is
a response token, and `labels` are those next tokens. Callers must not shift them again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from pocl.data.packing import Packing, PackingLayout
from pocl.data.transfer import Array, to_device
from pocl.prompting.encoded_sample import EncodedSample

__all__ = ["Batch", "EncodedSample", "FixedShape", "Packing", "collate", "pack"]


@dataclass(frozen=True)
class Batch:
    """Samples padded on the right, or packed. B rows of L positions, T predicting positions in all."""

    input_ids: Tensor
    """[B, L] int64."""
    attention_mask: Tensor
    """[B, L] int64: 1 for tokens, 0 for padding."""
    predicts: Tensor
    """[B, L] bool: the next token is a response token."""
    predicting: Tensor
    """[T] int64: the positions that `predicts` marks, as ascending indices into the B x L positions."""
    labels: Tensor
    """[T] int64: those next tokens, in the order of `predicting`."""
    last_turn: Tensor
    """[T] bool: the label belongs to the last turn."""
    tokens: int
    """T."""
    samples: tuple[EncodedSample, ...]
    """The samples, in the order of the batch."""
    packing: Packing | None = None
    """Where the samples of a packed batch are, which are concatenated, with B = 1; None where padded."""


def collate(
    samples: Sequence[EncodedSample],
    pad_id: int = 0,
    *,
    device: torch.device | str | None = None,
    length: int | None = None,
) -> Batch:
    """Pad samples on the right to the longest, or to `length`, and shift their labels by one.

    `pad_id` may be any id, that of the end token too: which tokens count is known by position.

    Raises:
        ValueError: without a sample, or if a sample is longer than `length`.
    """
    if not samples:
        raise ValueError("a batch needs a sample")
    longest = max(len(sample.input_ids) for sample in samples)
    width = longest if length is None else length
    if longest > width:
        raise ValueError(f"a sample has {longest} tokens, more than {width}")
    arrays = _arrays(samples, range(0, len(samples) * width, width), (len(samples), width), pad_id)
    return _batch(samples, to_device(arrays, device))


@dataclass(frozen=True)
class FixedShape:
    """The shape of packed batches that are to be alike, for compiled layers and CUDA graphs."""

    tokens: int
    """Of a batch; what its samples leave is filled up."""
    sequences: int
    """Of a batch: its samples and what fills it up."""
    max_length: int
    """Tokens of a sequence."""

    def fill(self, lengths: Sequence[int]) -> tuple[int, ...]:
        """The lengths of the sequences that fill a batch of samples of these lengths up; the last ones may be empty.

        Raises:
            ValueError: where the samples, or what fills the batch up, do not fit.
        """
        left = self.tokens - sum(lengths)
        full, rest = divmod(left, self.max_length)
        filling = [self.max_length] * full + [rest] * (rest > 0)
        empty = self.sequences - len(lengths) - len(filling)
        if left < 0 or empty < 0 or max(lengths) > self.max_length:
            raise ValueError(f"samples of {sum(lengths)} tokens, {len(lengths)} in all, do not fit {self}")
        return (*filling, *[0] * empty)


def pack(
    samples: Sequence[EncodedSample], *, device: torch.device | str | None = None, shape: FixedShape | None = None
) -> Batch:
    """Concatenate samples without padding to a batch of one row (sequence packing), with labels as in :func:`collate`.

    With `shape` the batch is filled up to it by sequences of token 0, which predict nothing: they are in neither the
    loss nor the gradient. Their attention mask is 0.

    Raises:
        ValueError: without a sample, or where the samples do not fit `shape`.
    """
    if not samples:
        raise ValueError("a batch needs a sample")
    lengths = [len(sample.input_ids) for sample in samples]
    starts = [0, *accumulate(lengths)][:-1]
    filling = () if shape is None else shape.fill(lengths)
    layout = PackingLayout.of([*lengths, *filling], None if shape is None else shape.max_length)
    arrays = _arrays(samples, starts, (1, sum(layout.lengths)), pad_id=0)
    tensors = to_device(arrays | layout.arrays, device)
    return _batch(samples, tensors, layout.packing(tensors))


def _arrays(
    samples: Sequence[EncodedSample], starts: Sequence[int], shape: tuple[int, int], pad_id: int
) -> dict[str, Array]:
    """The arrays of a batch of `shape`, by their names in :class:`Batch`; each sample begins at its place of `starts`
    among all positions in row-major order.
    """
    size = shape[0] * shape[1]
    input_ids = np.full(size, pad_id, dtype=np.int64)
    attention_mask = np.zeros(size, dtype=np.int64)
    # One position more than there are, after which the last one has a next one too.
    labelled, last_turn = (np.zeros(size + 1, dtype=np.bool_) for _ in range(2))
    for sample, start in zip(samples, starts, strict=True):
        stop = start + len(sample.input_ids)
        input_ids[start:stop] = sample.input_ids
        attention_mask[start:stop] = 1
        last_turn[start + sample.prompt_length : start + sample.response_stop] = True
        for first, end in sample.response_spans:
            # No position of its own sample predicts a sample's first token.
            labelled[start + max(first, 1) : start + end] = True

    # The shift: position t predicts token t + 1.
    predicts = labelled[1:]
    predicting = np.flatnonzero(predicts)
    return {
        "input_ids": input_ids.reshape(shape),
        "attention_mask": attention_mask.reshape(shape),
        "predicts": predicts.reshape(shape),
        "predicting": predicting,
        "labels": input_ids[predicting + 1],
        "last_turn": last_turn[predicting + 1],
    }


def _batch(samples: Sequence[EncodedSample], tensors: dict[str, Tensor], packing: Packing | None = None) -> Batch:
    return Batch(
        input_ids=tensors["input_ids"],
        attention_mask=tensors["attention_mask"],
        predicts=tensors["predicts"],
        predicting=tensors["predicting"],
        labels=tensors["labels"],
        last_turn=tensors["last_turn"],
        tokens=len(tensors["labels"]),
        samples=tuple(samples),
        packing=packing,
    )
