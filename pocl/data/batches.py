"""From samples to token ids with their response tokens marked, and from those to padded or packed batches.

Labels are shifted in one place, for padded and packed batches alike: `predicts` marks the positions whose next token is
a response token, and `labels` are those next tokens. Callers must not shift them again.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pocl.data.packing import Packing, PackingLayout
from pocl.data.prompting import Prompting, assistant_turns, end_of_response_id, token_ids
from pocl.data.transfer import Array, to_device
from pocl.samples.sample import Sample

__all__ = [
    "Batch",
    "EncodedSample",
    "FixedShape",
    "Packing",
    "Prompting",
    "collate",
    "encode",
    "end_of_response_id",
    "pack",
]


@dataclass(frozen=True)
class EncodedSample:
    """One sample as token ids: a prompt and its response."""

    digest: str
    """SHA-256 of the :class:`~pocl.samples.sample.Sample` that was encoded."""
    input_ids: tuple[int, ...]
    prompt_length: int
    """Tokens before the last turn's response."""
    earlier_spans: tuple[tuple[int, int], ...] = ()
    """[start, stop) of the responses of earlier turns; they lie inside the prompt."""

    @cached_property
    def content_digest(self) -> str:
        """SHA-256 over token ids and label mask; a model cannot tell samples of equal digest apart."""
        return hashlib.sha256(f"{self.input_ids} {self.response_spans}".encode()).hexdigest()

    @property
    def response_spans(self) -> tuple[tuple[int, int], ...]:
        """[start, stop) of the responses of all turns."""
        return (*self.earlier_spans, (self.prompt_length, len(self.input_ids)))

    @property
    def predicted_tokens(self) -> int:
        """Number of response tokens that some position predicts; no position predicts a sample's first token."""
        return sum(stop - max(start, 1) for start, stop in self.response_spans if stop > max(start, 1))

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """What generation of the last turn starts from; always the beginning of `input_ids`."""
        return self.input_ids[: self.prompt_length]

    @property
    def reference_ids(self) -> tuple[int, ...]:
        """The last turn's response, with its end token unless it was cut."""
        return self.input_ids[self.prompt_length :]

    @property
    def label_mask(self) -> tuple[bool, ...]:
        """For each token whether it is a response token, of any turn, its end token included."""
        mask = [False] * len(self.input_ids)
        for start, stop in self.response_spans:
            mask[start:stop] = [True] * (stop - start)
        return tuple(mask)


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


def encode(
    sample: Sample,
    tokenizer: PreTrainedTokenizerBase,
    prompting: Prompting,
    *,
    max_length: int,
    max_prompt_length: int,
    eos_token_id: int,
) -> EncodedSample:
    """Turn a sample into token ids.

    The prompt is all before the last response. Where it has more than `max_prompt_length` tokens it is cut
    from its left, so that the response marker stays; a begin-of-sequence token that the tokenizer adds by
    itself stays too. The first reference follows, closed by `eos_token_id` (see :func:`end_of_response_id`);
    what exceeds `max_length` is cut from its end, so the end token is lost first.

    Raises:
        ValueError: unless 1 <= max_prompt_length < max_length.
        DatasetInvalid: if the chat template refuses the sample.
    """
    if not 1 <= max_prompt_length < max_length:
        raise ValueError("max_prompt_length must be at least 1 and below max_length")
    ids: list[int] = []
    spans: list[tuple[int, int]] = []
    for turn in assistant_turns(sample, tokenizer, prompting, eos_token_id):
        prompt, answer = _prompt_and_answer(tokenizer, turn.prompt, turn.answer)
        start = len(ids) + len(prompt)
        ids += [*prompt, *answer, *([eos_token_id] if turn.has_end_token else [])]
        spans.append((start, len(ids)))

    last_start, _ = spans.pop()
    begin = _begin_ids(tokenizer, prompting)[: max_prompt_length - 1]
    cut = max(0, len(begin) + last_start - max_prompt_length)
    shift = len(begin) - cut
    earlier_spans = [(max(start + shift, len(begin)), stop + shift) for start, stop in spans if stop > cut]
    return EncodedSample(
        digest=sample.digest,
        input_ids=tuple([*begin, *ids[cut:]][:max_length]),
        prompt_length=last_start + shift,
        earlier_spans=tuple(earlier_spans),
    )


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
        last_turn[start + sample.prompt_length : stop] = True
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


def _prompt_and_answer(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    # Generation starts from the prompt's own ids, so they must be a prefix of the joint ids. Where the tokenizer merges
    # tokens across the border, prompt and answer are tokenised apart.
    prompt_ids, joint_ids = token_ids(tokenizer, prompt), token_ids(tokenizer, prompt + answer)
    if joint_ids[: len(prompt_ids)] == prompt_ids:
        return prompt_ids, joint_ids[len(prompt_ids) :]
    return prompt_ids, token_ids(tokenizer, answer)


def _begin_ids(tokenizer: PreTrainedTokenizerBase, prompting: Prompting) -> list[int]:
    """The begin-of-sequence token where the tokenizer adds one; with a chat template the text has its own."""
    if prompting is Prompting.CHAT or tokenizer.bos_token_id is None:
        return []
    ids: list[int] = tokenizer("a")["input_ids"]
    return ids[:1] if ids[0] == tokenizer.bos_token_id and len(ids) > 1 else []
