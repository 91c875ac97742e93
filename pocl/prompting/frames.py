"""The rendering of conversations of one structure, with places for what they say.

Most conversations of a data set have the same roles in the same order. Their template is rendered once with sentinels
for contents; what it writes around them is the frame, in which the turns of the assistant are found. A conversation
fits the frame if its own rendering is the frame with its contents put in: then its turns are known, and every text of
it is seen to be there.
"""

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from pocl.prompting.template_messages import SENTINELS, forms_of
from pocl.prompting.turns import Turn
from pocl.samples.sample import Message

MAX_SLOTS: Final = len(SENTINELS) - 64
_ANY_SENTINEL: Final = re.compile("Zq([0-9]{4})w7Yk")


class Slot(NamedTuple):
    """A place for a text of a conversation."""

    message: int
    field: str
    """`content` or `reasoning`."""


@dataclass(frozen=True)
class Frame:
    """What a template writes around the contents of conversations of one structure."""

    literals: tuple[str, ...]
    """The texts before, between and behind the slots."""
    slots: tuple[Slot, ...]
    """The slots in the order of the text; one may occur twice."""
    starts: tuple[int, ...]
    """Where each literal begins in the text with sentinels."""
    turns: tuple[Turn | None, ...]
    """The turns of the assistant's messages, in the text with sentinels; None for one that cannot be told."""


class FilledFrame(NamedTuple):
    """A frame with the contents of a conversation."""

    turns: tuple[Turn | None, ...]
    places: dict[Slot, tuple[int, int]]
    """[start, stop) of each slot."""


def slots_of(messages: Sequence[Message]) -> list[Slot]:
    """The places for the texts of a conversation; a text of spaces alone has none."""
    slots: list[Slot] = []
    for index, message in enumerate(messages):
        if (message.reasoning or "").strip():
            slots.append(Slot(index, "reasoning"))
        if message.content.strip():
            slots.append(Slot(index, "content"))
    return slots


def structure_of(messages: Sequence[Message]) -> tuple[object, ...]:
    """What conversations have in common whose frame is the same: all but the texts of :func:`slots_of`."""
    return tuple(
        message._replace(
            content="" if message.content.strip() else f"={message.content}",
            reasoning=None if message.reasoning is None else "" if message.reasoning.strip() else "=",
            train=True,
        )
        for message in messages
    )


def with_sentinels(messages: Sequence[Message]) -> list[Message]:
    """The conversation with a sentinel in each slot, numbered in the order of :func:`slots_of`."""
    replaced = list(messages)
    for number, slot in enumerate(slots_of(messages)):
        message = replaced[slot.message]
        sentinel = SENTINELS[number]
        replaced[slot.message] = (
            message._replace(content=sentinel) if slot.field == "content" else message._replace(reasoning=sentinel)
        )
    return replaced


def build_frame(text: str, messages: Sequence[Message], turns: Sequence[Turn | None]) -> Frame:
    """The frame that a rendering with sentinels is."""
    slots = slots_of(messages)
    literals, found, starts, position = [], [], [0], 0
    for match in _ANY_SENTINEL.finditer(text):
        literals.append(text[position : match.start()])
        found.append(slots[int(match[1])])
        position = match.end()
        starts.append(position)
    return Frame((*literals, text[position:]), tuple(found), tuple(starts), tuple(turns))


def fill_frame(frame: Frame, text: str, messages: Sequence[Message]) -> FilledFrame | None:
    """The places of a conversation's contents in its rendering; None where it is not the frame with the contents."""
    anchors = [0]
    places: dict[Slot, tuple[int, int]] = {}
    if not text.startswith(frame.literals[0]):
        return None
    position = len(frame.literals[0])
    for slot, behind, is_last in zip(
        frame.slots, frame.literals[1:], [*[False] * (len(frame.slots) - 1), True], strict=True
    ):
        given = getattr(messages[slot.message], slot.field)
        form = _form_at(text, position, given, behind, is_last)
        if form is None:
            return None
        places[slot] = (position, position + len(form))
        position += len(form)
        anchors.append(position)
        position += len(behind)
    if position != len(text):
        return None

    def moved(place: int) -> int:
        literal = bisect_right(frame.starts, place) - 1
        return anchors[literal] + place - frame.starts[literal]

    turns = tuple(
        None if turn is None else Turn(turn.message, moved(turn.start), moved(turn.answer_stop), moved(turn.stop))
        for turn in frame.turns
    )
    return FilledFrame(turns, places)


def _form_at(text: str, position: int, given: str, behind: str, is_last: bool) -> str | None:
    """The form of a text that stands at a position with `behind` following it; None where none does."""
    for form in forms_of(given):
        stop = position + len(form)
        if text.startswith(form, position) and text.startswith(behind, stop):
            if is_last and stop + len(behind) != len(text):
                continue
            return form
    return None
