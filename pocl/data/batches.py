"""Samples to token ids with their response tokens marked, and those to padded batches.

Labels are shifted in one place, :func:`collate`: `predicts` marks the positions whose next token is a
response token, and `labels` are those next tokens. Whoever uses them must not shift again.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pocl.data.prompting import Prompting, end_of_response_id, token_ids, turns_of
from pocl.data.records import Sample

__all__ = ["Batch", "Encoded", "Prompting", "collate", "encode", "end_of_response_id", "pack"]


@dataclass(frozen=True)
class Encoded:
    """One sample as token ids: a prompt and its response."""

    digest: str
    """The sample's."""
    input_ids: tuple[int, ...]
    prompt_length: int
    """Tokens before the last turn's response."""
    earlier: tuple[tuple[int, int], ...] = ()
    """[start, stop) of the responses of earlier turns, inside the prompt."""

    @cached_property
    def content(self) -> str:
        """SHA-256 over token ids and label mask: to a model, rows of equal content are the same."""
        return hashlib.sha256(f"{self.input_ids} {self.spans}".encode()).hexdigest()

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """[start, stop) of the responses of all turns."""
        return (*self.earlier, (self.prompt_length, len(self.input_ids)))

    @property
    def predicted(self) -> int:
        """Response tokens that some position predicts; the first token of a row is predicted by none."""
        return sum(stop - max(start, 1) for start, stop in self.spans if stop > max(start, 1))

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """What generation of the last turn starts from; always the beginning of `input_ids`."""
        return self.input_ids[: self.prompt_length]

    @property
    def reference_ids(self) -> tuple[int, ...]:
        """The last turn's response, with its end token unless it was cut."""
        return self.input_ids[self.prompt_length :]

    @property
    def labelled(self) -> tuple[bool, ...]:
        """For each token whether it is a response token, of any turn, its end token included."""
        mask = [False] * len(self.input_ids)
        for start, stop in self.spans:
            mask[start:stop] = [True] * (stop - start)
        return tuple(mask)

    @property
    def last_turn_mask(self) -> tuple[bool, ...]:
        """For each token whether it belongs to the last turn's response."""
        return tuple(at >= self.prompt_length for at in range(len(self.input_ids)))


@dataclass(frozen=True)
class Batch:
    """Samples padded on the right, or packed. B rows of L positions, T predicting positions in all."""

    input_ids: Tensor
    """[B, L] int64."""
    attention_mask: Tensor
    """[B, L] int64: 1 for tokens, 0 for padding."""
    predicts: Tensor
    """[B, L] bool: the next token is a response token. `hidden[predicts]` is [T, width], in row-major order."""
    labels: Tensor
    """[T] int64: those next tokens, in the order of `hidden[predicts]`."""
    last_turn: Tensor
    """[T] bool: the label belongs to the last turn."""
    tokens: int
    """T."""
    rows: tuple[Encoded, ...]
    """The samples, in the order of the batch."""
    lengths: tuple[int, ...] | None = None
    """Of a packed batch, where the rows lie one behind the other and B is 1: the tokens of each."""


def encode(
    sample: Sample,
    tokenizer: PreTrainedTokenizerBase,
    prompting: Prompting,
    *,
    max_length: int,
    max_prompt_length: int,
    eos_token_id: int,
) -> Encoded:
    """Turn a sample into token ids.

    The prompt is all before the last response. Where it has more than `max_prompt_length` tokens it is cut
    from its left, so that the response marker stays; a begin-of-sequence token that the tokenizer adds by
    itself stays too. The first reference follows, closed by `eos_token_id` (see :func:`end_of_response_id`);
    what exceeds `max_length` is cut from its end, and the end token goes first.

    Raises:
        ValueError: unless 1 <= max_prompt_length < max_length.
        DatasetInvalid: if the chat template refuses the sample.
    """
    if not 1 <= max_prompt_length < max_length:
        raise ValueError("max_prompt_length must be at least 1 and below max_length")
    ids: list[int] = []
    spans: list[tuple[int, int]] = []
    for turn in turns_of(sample, tokenizer, prompting, eos_token_id):
        prompt, answer = _prompt_and_answer(tokenizer, turn.prompt, turn.answer)
        start = len(ids) + len(prompt)
        ids += [*prompt, *answer, *([eos_token_id] if turn.ends else [])]
        spans.append((start, len(ids)))

    last_start, _ = spans.pop()
    begin = _begin_ids(tokenizer, prompting)[: max_prompt_length - 1]
    cut = max(0, len(begin) + last_start - max_prompt_length)
    shift = len(begin) - cut
    kept = [(max(start + shift, len(begin)), stop + shift) for start, stop in spans if stop > cut]
    return Encoded(
        digest=sample.digest,
        input_ids=tuple([*begin, *ids[cut:]][:max_length]),
        prompt_length=last_start + shift,
        earlier=tuple(kept),
    )


def collate(
    rows: Sequence[Encoded],
    pad_id: int = 0,
    *,
    device: torch.device | str | None = None,
    length: int | None = None,
) -> Batch:
    """Pad rows on the right to the longest, or to `length`, and shift their labels by one.

    `pad_id` may be any id, that of the end token too: which tokens count is known by position.

    Raises:
        ValueError: without a row, or if a row is longer than `length`.
    """
    if not rows:
        raise ValueError("a batch needs a row")
    longest = max(len(row.input_ids) for row in rows)
    width = longest if length is None else length
    if longest > width:
        raise ValueError(f"a row has {longest} tokens, more than {width}")
    input_ids = np.full((len(rows), width), pad_id, dtype=np.int64)
    attention_mask = np.zeros((len(rows), width), dtype=np.int64)
    labelled, last_turn = (np.zeros((len(rows), width), dtype=np.bool_) for _ in range(2))
    for at, row in enumerate(rows):
        tokens = len(row.input_ids)
        input_ids[at, :tokens] = row.input_ids
        attention_mask[at, :tokens] = 1
        last_turn[at, row.prompt_length : tokens] = True
        for start, stop in row.spans:
            labelled[at, start:stop] = True

    # The shift: position t predicts token t + 1, and the last position predicts nothing.
    predicts = np.zeros_like(labelled)
    shifted = labelled[:, 1:]
    predicts[:, :-1] = shifted
    labels = input_ids[:, 1:][shifted]

    def tensor(array: npt.NDArray[np.int64] | npt.NDArray[np.bool_]) -> Tensor:
        return torch.from_numpy(array).to(device)

    return Batch(
        input_ids=tensor(input_ids),
        attention_mask=tensor(attention_mask),
        predicts=tensor(predicts),
        labels=tensor(labels),
        last_turn=tensor(last_turn[:, 1:][shifted]),
        tokens=len(labels),
        rows=tuple(rows),
    )


def pack(rows: Sequence[Encoded], *, device: torch.device | str | None = None) -> Batch:
    """Rows one behind the other, without padding, as a batch of one long row; labels as :func:`collate`.

    Raises:
        ValueError: without a row.
    """
    alone = [collate([row]) for row in rows]
    if not alone:
        raise ValueError("a batch needs a row")

    def joined(name: str, dim: int) -> Tensor:
        return torch.cat([getattr(each, name) for each in alone], dim).to(device)

    return Batch(
        input_ids=joined("input_ids", 1),
        attention_mask=joined("attention_mask", 1),
        predicts=joined("predicts", 1),
        labels=joined("labels", 0),
        last_turn=joined("last_turn", 0),
        tokens=sum(each.tokens for each in alone),
        rows=tuple(rows),
        lengths=tuple(each.input_ids.shape[1] for each in alone),
    )


def _prompt_and_answer(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    # Generation starts from the prompt's own ids, so they must begin the joint ids; a tokenizer that merges
    # across the border has its two sides tokenised apart.
    prompt_ids, joint = token_ids(tokenizer, prompt), token_ids(tokenizer, prompt + answer)
    if joint[: len(prompt_ids)] == prompt_ids:
        return prompt_ids, joint[len(prompt_ids) :]
    return prompt_ids, token_ids(tokenizer, answer)


def _begin_ids(tokenizer: PreTrainedTokenizerBase, prompting: Prompting) -> list[int]:
    """The begin-of-sequence token where the tokenizer adds one; a chat template writes its own."""
    if prompting is Prompting.CHAT or tokenizer.bos_token_id is None:
        return []
    ids: list[int] = tokenizer("a")["input_ids"]
    return ids[:1] if ids[0] == tokenizer.bos_token_id and len(ids) > 1 else []
