"""Thoughts that answers begin with, and answers without them."""

import re
from typing import Final, NamedTuple

_TAG: Final = r"(<[^<>\s/][^<>\s]{0,40}>|\[[A-Z_]{1,40}\])"
_CLOSING_TAG: Final = r"(</?[^<>\s]{1,40}>|\[/[A-Z_]{1,40}\])"
_LAST_TAG: Final = re.compile(_TAG + r"\s*$")
_FIRST_CLOSING_TAG: Final = re.compile(r"\s*" + _CLOSING_TAG)


class Thought(NamedTuple):
    """The texts around a thought."""

    start: str
    stop: str


def thought_between(before: str, behind: str) -> Thought | None:
    """The tags around a thought that stands between two texts; None where there are none."""
    start, stop = _LAST_TAG.search(before), _FIRST_CLOSING_TAG.match(behind)
    return Thought(start[1], stop[1]) if start and stop else None


def thought_opened_in(text: str) -> Thought | None:
    """The thought that a text opens and does not close; None where it opens none."""
    start = _LAST_TAG.search(text)
    if start is None:
        return None
    tag = start[1]
    return Thought(tag, f"{tag[0]}/{tag[1:]}")


def visible_answer(text: str, thought: Thought | None) -> str:
    """An answer without the thought that it begins with: what is compared with a reference.

    An answer that ends inside its thought says nothing. Where the prompt has opened the thought, only its end stands in
    the answer.
    """
    if thought is None:
        return text
    begins_with_thought = text.lstrip().startswith(thought.start)
    before, closed, behind = text.partition(thought.stop)
    if closed and (begins_with_thought or thought.start not in before):
        return behind.strip()
    return "" if begins_with_thought else text
