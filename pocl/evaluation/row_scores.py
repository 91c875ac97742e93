"""The scores of each sample of an evaluation: what intervals are computed from, and answers to read."""

from collections.abc import Sequence
from typing import Final

from pydantic import BaseModel, ConfigDict

MAX_ROWS: Final = 10_000
"""The most samples of an evaluation set whose scores are kept one by one, the first of the file."""
MAX_SHOWN: Final = 5
"""The most samples of an evaluation set whose answers are kept to be read."""
MAX_SHOWN_CHARACTERS: Final = 600


class ShownAnswer(BaseModel):
    """An answer to read, beside what it answers; long texts are cut."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    prompt: str
    """The end of the prompt."""
    reference: str | None
    """The beginning of the first reference; null where the sample has none."""
    answer: str
    """The beginning of the answer."""
    unfinished_thought: bool = False
    """Whether the answer ended inside its thought, and so says nothing."""


class RowScores(BaseModel):
    """The scores of each sample that has a reference, in the order of the file; the first :data:`MAX_ROWS` of them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rouge_l: tuple[float, ...]
    """ROUGE-L of the greedy answer, 0 to 100."""
    exact_match: tuple[float, ...]
    """100 for a greedy answer that matches a reference, else 0."""
    cross_entropy: tuple[float, ...]
    """The cross-entropy of the response tokens, in nats, summed over them."""
    tokens: tuple[int, ...]
    """The number of response tokens."""
    unfinished_thoughts: tuple[bool, ...] = ()
    """Whether the greedy answer ended inside its thought, so that its ROUGE-L is 0; empty where this was not kept."""
    shown: tuple[ShownAnswer, ...] = ()
    """The answers to the first samples, those without a reference included."""


def shown(prompt: str, references: Sequence[str], answer: str, *, unfinished_thought: bool) -> ShownAnswer:
    """An answer with its texts cut to what is shown."""
    reference = _beginning(references[0]) if references else None
    prompt = prompt if len(prompt) <= MAX_SHOWN_CHARACTERS else "… " + prompt[-MAX_SHOWN_CHARACTERS:]
    return ShownAnswer(
        prompt=prompt, reference=reference, answer=_beginning(answer), unfinished_thought=unfinished_thought
    )


def _beginning(text: str) -> str:
    return text if len(text) <= MAX_SHOWN_CHARACTERS else text[:MAX_SHOWN_CHARACTERS] + " …"
