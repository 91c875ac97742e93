"""The ban of repeated n-grams: no token may complete a sequence of n tokens that prompt or answer already has.

Greedy answers of base models often loop; the published difficulty measurer bans repeated 6-grams (the
`no_repeat_ngram_size` of transformers' `generate`, which this agrees with).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class RepeatedNgrams:
    """The tokens of rows so far, and which token may not come next; advanced on the device, in place."""

    size: int
    """n, at least 2."""
    tokens: Tensor
    """`[rows, width]` int64: prompt and answer of each row from the left; the last column is never a row's own."""
    lengths: Tensor
    """`[rows]` int64: how many tokens each row has."""

    @classmethod
    def empty(cls, size: int, rows: int, max_length: int, device: torch.device) -> "RepeatedNgrams":
        """Rows without tokens; `max_length` is the most that one will have, prompt and answer."""
        # At least one window of n tokens.
        tokens = torch.zeros(rows, max(max_length + 1, size), dtype=torch.long, device=device)
        return cls(size, tokens, torch.zeros(rows, dtype=torch.long, device=device))

    def begin(self, rows: Sequence[int], prompts: Sequence[Sequence[int]]) -> None:
        """Let these rows begin with a prompt each."""
        device = self.tokens.device
        for row, prompt in zip(rows, prompts, strict=True):
            self.tokens[row, : len(prompt)] = torch.tensor(prompt, device=device)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        self.lengths.index_copy_(0, torch.tensor(rows, device=device), lengths)

    def banned(self, logits: Tensor) -> Tensor:
        """`logits` of the next token, `[rows, V]`, with minus infinity for each that would repeat an n-gram."""
        before = self.size - 1
        last = (self.lengths.unsqueeze(1) + torch.arange(-before, 0, device=logits.device)).clamp(min=0)
        windows = self.tokens.unfold(1, self.size, 1)
        repeats = (windows[:, :, :before] == self.tokens.gather(1, last).unsqueeze(1)).all(-1)
        ends = torch.arange(self.size, self.tokens.shape[1] + 1, device=logits.device)
        repeats &= ends <= self.lengths.unsqueeze(1)
        # What repeats nothing is written into a column beyond the vocabulary.
        vocabulary = logits.shape[1]
        ids = torch.where(repeats, windows[:, :, before], vocabulary)
        is_banned = torch.zeros(len(logits), vocabulary + 1, dtype=torch.bool, device=logits.device)
        is_banned.scatter_(1, ids, True)
        return logits.masked_fill(is_banned[:, :vocabulary], float("-inf"))

    def append(self, chosen: Tensor, going_on: Tensor) -> None:
        """Append a token to each row that goes on; both are `[rows]`, int64 and bool."""
        column = self.lengths.masked_fill(~going_on, self.tokens.shape[1] - 1)
        self.tokens.scatter_(1, column.unsqueeze(1), chosen.unsqueeze(1))
        self.lengths.add_(going_on)

    def select(self, rows: Tensor) -> "RepeatedNgrams":
        """These rows alone, in this order, as a copy."""
        return RepeatedNgrams(self.size, self.tokens[rows], self.lengths[rows])
