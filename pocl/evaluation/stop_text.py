"""The plain text that ends an answer, for which no token stands: generation ends at the token that completes it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

_MORE_TOKENS: Final = 8
"""Tokens that are decoded beyond those that the text can fill: a character may be cut at their border."""


@dataclass(frozen=True)
class StopText:
    """A text that ends an answer, found by decoding a bounded number of its last tokens."""

    text: str
    decode: Callable[[Sequence[int]], str] = field(repr=False, compare=False)
    """The text of token ids, special tokens included."""

    @property
    def window(self) -> int:
        """Enough tokens for the text: a token has at least one byte of it."""
        return len(self.text.encode()) + _MORE_TOKENS

    def length_with(self, ids: Sequence[int], before: int = 0) -> int | None:
        """The number of tokens with which an answer first holds the text; None where it does not hold it.

        Args:
            before: This many tokens are known not to hold it.
        """
        lengths = range(before + 1, len(ids) + 1)
        return next(
            (length for length in lengths if self.text in self.decode(ids[max(0, length - self.window) : length])), None
        )

    def cut(self, ids: list[int]) -> list[int]:
        """An answer up to the token that completes the text."""
        return ids[: self.length_with(ids)]
