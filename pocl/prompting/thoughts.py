"""What stands around what an answer says: the thought that it begins with, and the marks that a template writes around
the answer itself.

A thought is found by rendering (:mod:`pocl.prompting.profile`), and where a template shows none by the tags that the
families of reasoning models have: a model that learnt them before writes them under any template.
"""

import re
from collections.abc import Collection
from typing import Final, NamedTuple

_OPENING: Final = (
    r"<\|channel\|>\w+<\|message\|>|<\|channel>\w+|<\|(?:START_|begin_of_|start_?of_?)\w*(?i:think|thought|reason)\w*\|>"
    r"|<\|inner_prefix\|>|<\|?(?i:think\w*|thought\w*|reason\w*)\|>"
    r"|<[A-Za-z][\w.-]{0,30}(?::[\w.-]{1,30})?>|\[[A-Z_]{1,40}\]|◁[^◁▷\s/]{1,40}▷"
)
"""A tag that may open a thought: `<think>`, `<seed:think>`, `[THINK]`, `◁think▷`, `<|START_THINKING|>`, ..."""
_LAST_OPENING: Final = re.compile(rf"({_OPENING})\s*$")
_FIRST_TAG: Final = re.compile(r"\s*(</?[^<>\s]{1,40}>|\[/?[A-Z_]{1,40}\]|◁/?[^◁▷\s]{1,40}▷)")
_ANY_TAG: Final = re.compile(r"<[^<>\s]{1,40}>|\[/?[A-Z_]{1,40}\]|◁[^◁▷\s]{1,40}▷")
_EMPTY: Final = re.compile(rf"({_OPENING})\s*({_FIRST_TAG.pattern})\s*$")
_PAIRS_OF_WORDS: Final = (("START_", "END_"), ("start", "end"), ("begin", "end"), ("prefix", "suffix"))


class Thought(NamedTuple):
    """The texts around a thought."""

    start: str
    stop: str


KNOWN_THOUGHTS: Final = tuple(
    Thought(start, stop)
    for start, stop in (
        ("<think>", "</think>"),
        ("<thought>", "</thought>"),
        ("<thinking>", "</thinking>"),
        ("<reasoning>", "</reasoning>"),
        ("<seed:think>", "</seed:think>"),
        ("[THINK]", "[/THINK]"),
        ("◁think▷", "◁/think▷"),
        ("<|START_THINKING|>", "<|END_THINKING|>"),
        ("<|begin_of_thought|>", "<|end_of_thought|>"),
        ("<|inner_prefix|>", "<|inner_suffix|>"),
        ("<|channel>thought", "<channel|>"),
    )
)
"""The tags of the families of reasoning models."""


class VisibleAnswer(NamedTuple):
    """What an answer says."""

    text: str
    """Empty where the answer ends inside its thought."""
    in_thought: bool = False
    """The answer ends inside its thought, and so says nothing."""


class AnswerForm(NamedTuple):
    """What is generated around what an answer says."""

    thought: Thought | None = None
    """How answers begin with a thought; None where nothing is known of one."""
    opening: str = ""
    """The tags before what the answer says, with a thought or without, as `<|channel|>final<|message|>` or `<answer>`;
    empty where there are none."""
    closings: tuple[str, ...] = ()
    """Texts behind what the answer says that are no tokens which end generation, as `</answer>`."""

    def read(self, generated: str, *, prompt: str = "") -> VisibleAnswer:
        """What a generated answer says: behind its thought and its opening, and before the first of the closings.

        Args:
            prompt: the end of what was answered, which may have opened the thought.
        """
        visible = self._behind_thought(generated, prompt)
        stops = [place for closing in self.closings if (place := visible.text.find(closing)) >= 0]
        return visible._replace(text=visible.text[: min(stops)]) if stops else visible

    def read_reference(self, reference: str) -> str:
        """What a reference says, which may hold a thought."""
        return self._behind_thought(reference, "").text

    def _behind_thought(self, text: str, prompt: str) -> VisibleAnswer:
        thought = self.thought
        if thought is not None:
            begins_with_thought = any(
                (prompt.rstrip().endswith(thought.start), text.lstrip().startswith(thought.start))
            )
            before, closed, behind = text.partition(thought.stop)
            if closed and (begins_with_thought or thought.start not in before):
                text = behind.strip()
            elif begins_with_thought:
                return VisibleAnswer("", in_thought=True)
        _, opened, behind = text.partition(self.opening) if self.opening else ("", "", "")
        return VisibleAnswer(behind.strip() if opened else text)


PLAIN: Final = AnswerForm()
"""Nothing is generated around what an answer says."""


def split_thought(text: str, thought: Thought | None) -> tuple[str, str]:
    """The thought that a text begins with, without its tags, and what stands behind it; no thought is empty."""
    if thought is None or not text.lstrip().startswith(thought.start) or thought.stop not in text:
        return "", text
    inside, _, behind = text.lstrip().removeprefix(thought.start).partition(thought.stop)
    return inside.strip(), behind.strip()


def thought_around(start: str, behind: str) -> Thought | None:
    """The thought between two texts, the second up to what the answer says; None where they are no tags."""
    stop = _FIRST_TAG.match(behind)
    return Thought(start, stop[1]) if stop and has_tag(start) else None


def thought_opened_in(text: str) -> Thought | None:
    """The thought that a text opens and does not close; None where it opens none."""
    start = _LAST_OPENING.search(text)
    return None if start is None else Thought(start[1], _closing_of(start[1]))


def empty_thought_in(text: str) -> Thought | None:
    """The thought of spaces alone that a text ends with; None where it ends with none."""
    found = _EMPTY.search(text)
    if found is None:
        return None
    thought = Thought(found[1], found[3])
    return thought if thought.stop == _closing_of(thought.start) or thought in KNOWN_THOUGHTS else None


def known_thought(source: str, tokens: Collection[str]) -> Thought | None:
    """The tags of a family that a template's source has, or else those that are tokens of their own; None where there
    are none.

    Args:
        tokens: the added tokens of the vocabulary.
    """
    in_source = (thought for thought in KNOWN_THOUGHTS if thought.stop in source)
    in_tokens = (thought for thought in KNOWN_THOUGHTS if thought.start in tokens and thought.stop in tokens)
    return next(in_source, None) or next(in_tokens, None)


def has_tag(text: str) -> bool:
    """Whether something in a text is a tag in angle or square brackets."""
    return _ANY_TAG.search(text) is not None


def _closing_of(tag: str) -> str:
    for start, stop in _PAIRS_OF_WORDS:
        if tag.startswith("<|") and start in tag:
            return tag.replace(start, stop)
    if tag.startswith("<|channel>"):
        return "<channel|>"
    if tag.startswith("<|channel|>"):
        return "<|end|>"
    return f"<|/{tag[2:]}" if tag.startswith("<|") else f"{tag[0]}/{tag[1:]}"
