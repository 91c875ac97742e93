"""What encoding the samples of a data set cut, left out and met: one class for dry run, preview, events and result."""

from collections.abc import Mapping
from typing import Self, TypeVar

from pydantic import BaseModel, ConfigDict

KeyT = TypeVar("KeyT", str, int)


class EncodingCounts(BaseModel):
    """Counts over the samples of a data set as tokens."""

    # Fields may be added: a reader of an older version ignores them.
    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)

    rows: int = 0
    """The samples that were encoded."""
    tokens: int = 0
    """The tokens of all samples as they are trained, after cuts."""
    prompt_tokens: int = 0
    """Those of them before the last answers."""
    trained_tokens: int = 0
    """Those of them that are trained on: answers with their ends."""
    rows_too_long: int = 0
    """The samples of which something was cut or dropped because they were too long."""
    prompts_cut: int = 0
    """The samples whose prompt was longer than `data.max_prompt_length`."""
    turns_dropped: int = 0
    """The answers of earlier turns that were dropped, with their questions, from prompts that were too long."""
    questions_lost: int = 0
    """The samples whose prompt, cut from its left, has nothing left of the last question."""
    answers_cut: int = 0
    """The samples whose last answer was cut at `data.max_length`."""
    ends_lost: int = 0
    """The samples whose last answer lost its end token, so that they do not teach where to stop."""
    tokens_cut: int = 0
    """The tokens that cuts and dropped turns took away."""
    ends_added: int = 0
    """The samples whose template writes no end after the last answer, so that the end-of-sequence token was added."""
    tokenised_apart: int = 0
    """The samples in which prompt and answer are tokenised apart, because tokens would merge across their border."""
    turns_unlabelled: int = 0
    """The answers of earlier turns that are not trained on, because the template renders them otherwise than given."""
    left_out: Mapping[str, int] = {}
    """The samples of which the template leaves something out, by the name of what is left out."""
    lengths: Mapping[int, int] = {}
    """The samples by their length in tokens before any cut: the number of those of at most so many tokens, a power of
    two, and of more than half as many."""

    def __add__(self, other: Self) -> Self:
        """The counts of both sets of samples together."""
        numbers = {
            name: getattr(self, name) + getattr(other, name)
            for name in type(self).model_fields
            if name not in ("left_out", "lengths")
        }
        return type(self)(
            **numbers,
            left_out={name: a + b for name, a, b in _joined(self.left_out, other.left_out)},
            lengths={bound: a + b for bound, a, b in _joined(self.lengths, other.lengths)},
        )


def length_bucket(tokens: int) -> int:
    """The key of `lengths` that a sample of so many tokens is counted under: the next power of two."""
    return 1 << max(0, tokens - 1).bit_length()


def _joined(mine: Mapping[KeyT, int], theirs: Mapping[KeyT, int]) -> list[tuple[KeyT, int, int]]:
    keys = sorted(set(mine) | set(theirs))
    return [(key, mine.get(key, 0), theirs.get(key, 0)) for key in keys]
