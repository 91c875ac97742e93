"""Conversations rendered by a chat template, with the turns of the assistant and what the template leaves out."""

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, NamedTuple

from pocl.errors import DatasetInvalid
from pocl.prompting.frames import (
    MAX_SLOTS,
    FilledFrame,
    Frame,
    Slot,
    build_frame,
    fill_frame,
    slots_of,
    structure_of,
    with_sentinels,
)
from pocl.prompting.jinja_templates import MARK_START, MARK_STOP
from pocl.prompting.profile import TemplateProfile
from pocl.prompting.template_messages import (
    forms_of,
    is_shown,
    strings_in,
    template_messages,
    template_tools,
    texts_of_tools,
)
from pocl.prompting.template_renderer import Conversation, TemplateRenderer
from pocl.prompting.text_tokenizer import TextTokenizer
from pocl.prompting.thoughts import Thought, split_thought
from pocl.prompting.turns import SENTINEL, Turn, TurnRenderings, apply_marks, find_turn, marked_spans, turn_requests
from pocl.samples.sample import Message

_MAX_FRAMES: Final = 256
_FIELDS_OF_TURN: Final = 7


class ChatConversation(NamedTuple):
    """The messages of a sample as they are given to a template."""

    messages: tuple[Message, ...]
    tools: str = ""
    """As in :class:`~pocl.samples.sample.Sample`."""

    @property
    def has_answer(self) -> bool:
        """Whether the assistant speaks last; a prompt that waits for its answer ends otherwise."""
        return self.messages[-1].role == "assistant"


@dataclass(frozen=True)
class RenderedConversation:
    """A conversation as text, and which of its characters are the assistant's."""

    text: str
    turns: tuple[Turn, ...]
    """The turns that are trained on; the last is the answer, unless the conversation waits for one."""
    prompt_stop: int
    """Where the prompt of the last turn ends."""
    lacks_end: bool = False
    """The template writes no end behind the answer."""
    unlabelled_turns: int = 0
    """Earlier turns that are trained on and cannot be told in the text."""
    left_out: tuple[str, ...] = ()
    """What of the conversation is not in the text, by name."""
    cuttable: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    """[start, stop) of what the user says last and of the results of tools behind it, by message, as far as they can be
    told: what a prompt that is too long can do without."""


class ChatRendering:
    """Renders conversations by one template."""

    def __init__(self, renderer: TemplateRenderer, profile: TemplateProfile, tokenizer: TextTokenizer) -> None:
        self.renderer = renderer
        self.profile = profile
        self._tokenizer = tokenizer
        self._frames: OrderedDict[tuple[object, ...], Frame | None] = OrderedDict()

    def render(self, conversations: Sequence[ChatConversation], names: Sequence[str]) -> list[RenderedConversation]:
        """Render conversations, in their order.

        Args:
            names: how sentences call each of them.

        Raises:
            DatasetInvalid: the template refuses a conversation, or what it renders of it cannot be told apart.
            SpecInvalid: the template takes more time or memory than a template may.
        """
        # The prompt of a conversation that waits for its answer is what would stand before any answer.
        answered = [
            each if each.has_answer else each._replace(messages=(*each.messages, Message("assistant", SENTINEL)))
            for each in conversations
        ]
        results = self.renderer.render([self._whole(conversation) for conversation in answered])
        rendered = []
        for given, conversation, name, result in zip(conversations, answered, names, results, strict=True):
            if result.error is not None:
                raise self._refused(name, result.error)
            frame = self._frame(conversation)
            filled = None if frame is None else fill_frame(frame, result.text, conversation.messages)
            if filled is None:
                filled = self._without_frame(conversation, result.text, name)
            whole = self._checked(conversation, result.text, filled, name)
            rendered.append(whole if given.has_answer else _up_to_answer(whole))
        return rendered

    def _whole(self, conversation: ChatConversation, *, marks: bool = False) -> Conversation:
        messages = template_messages(conversation.messages, self.profile.shape)
        return Conversation(messages, template_tools(conversation.tools), marks=marks)

    def _frame(self, conversation: ChatConversation) -> Frame | None:
        """The frame of the conversation's structure; None where the template refuses contents that say nothing."""
        key = (structure_of(conversation.messages), conversation.tools)
        if key in self._frames:
            self._frames.move_to_end(key)
            return self._frames[key]
        frame = None
        if len(slots_of(conversation.messages)) <= MAX_SLOTS:
            sentinels = conversation._replace(messages=tuple(with_sentinels(conversation.messages)))
            (result,) = self.renderer.render([self._whole(sentinels)])
            if result.error is None:
                frame = build_frame(result.text, conversation.messages, self._find_turns(sentinels, result.text))
        self._frames[key] = frame
        if len(self._frames) > _MAX_FRAMES:
            self._frames.popitem(last=False)
        return frame

    def _without_frame(self, conversation: ChatConversation, text: str, name: str) -> FilledFrame:
        """The turns of a conversation that the template renders otherwise because of what it says."""
        if self.profile.marks_answers and (MARK_START in text or MARK_STOP in text):
            raise self._refused(name, "it holds the characters U+10FFFC or U+10FFFD, which mark the answers")
        places: dict[Slot, tuple[int, int]] = {}
        for slot in slots_of(conversation.messages):
            given = getattr(conversation.messages[slot.message], slot.field)
            # A text that is in another one as well is found at the last of its places: only cuts look at them.
            form = next((form for form in forms_of(given) if form in text), None)
            if form is not None:
                places[slot] = (text.rindex(form), text.rindex(form) + len(form))
        return FilledFrame(tuple(self._find_turns(conversation, text)), places)

    def _find_turns(self, conversation: ChatConversation, text: str) -> list[Turn | None]:
        """The turns of the assistant in the rendering of a conversation; None for one that cannot be told."""
        messages, tools = conversation.messages, template_tools(conversation.tools)
        assistants = [index for index, message in enumerate(messages) if message.role == "assistant"]
        requests = [request for index in assistants for request in turn_requests(messages, index, tools, self.profile)]
        marked = [self._whole(conversation, marks=True)] if self.profile.marks_answers else []
        rendered = self.renderer.render([*requests, *marked])
        turns: list[Turn | None] = []
        for number, index in enumerate(assistants):
            renderings = TurnRenderings(*rendered[number * _FIELDS_OF_TURN : (number + 1) * _FIELDS_OF_TURN])
            turns.append(find_turn(text, messages[index], index, renderings, self.profile, self._tokenizer))
        if marked:
            without_marks, spans = marked_spans(rendered[-1].text)
            if without_marks == text:
                turns = apply_marks(turns, spans)
        return turns

    def _checked(
        self, conversation: ChatConversation, text: str, filled: FilledFrame, name: str
    ) -> RenderedConversation:
        messages = conversation.messages
        trained = [turn for turn in filled.turns if turn is not None and messages[turn.message].train]
        expected = [index for index, message in enumerate(messages) if message.role == "assistant" and message.train]
        if not trained or trained[-1].message != len(messages) - 1:
            raise self._refused(name, "it cannot be told which part of what it renders is the last answer")
        answer = trained[-1]
        left_out = _left_out(conversation, text, filled, self.profile.answer.thought)
        if "user" in left_out:
            raise self._refused(name, "it leaves out what the user says")
        last_user = max((index for index, message in enumerate(messages) if message.role == "user"), default=0)
        cuttable = {
            index: filled.places[Slot(index, "content")]
            for index, message in enumerate(messages)
            if index >= last_user and message.role in ("user", "tool") and Slot(index, "content") in filled.places
        }
        return RenderedConversation(
            text,
            tuple(trained),
            prompt_stop=answer.start,
            lacks_end=not self._is_ended(text, answer, has_calls=bool(messages[-1].tool_calls)),
            unlabelled_turns=len(expected) - len({turn.message for turn in trained}),
            left_out=left_out,
            cuttable=cuttable,
        )

    def _is_ended(self, text: str, answer: Turn, *, has_calls: bool) -> bool:
        """Whether the template writes an end behind an answer, and not only the calls of tools."""
        if answer.stop > answer.answer_stop and not has_calls:
            return True
        tokens = {self._tokenizer.token_of(token) for token in self._tokenizer.end_ids}
        if has_calls:
            # Calls may have an end of their own, a special token that ends no other answer.
            tokens |= {token.content for token in self._tokenizer.added_tokens.values() if token.special}
        ends = (*self.profile.end_texts, *(token for token in tokens if token))
        return any(text.endswith(end, answer.start, answer.stop) for end in ends)

    def _refused(self, name: str, reason: str) -> DatasetInvalid:
        return DatasetInvalid(f"The chat template {self.renderer.name} cannot render {name}: {reason}.")


def _up_to_answer(whole: RenderedConversation) -> RenderedConversation:
    """The prompt of a conversation to which an answer was added."""
    return replace(whole, text=whole.text[: whole.prompt_stop], turns=whole.turns[:-1], lacks_end=False)


def _left_out(
    conversation: ChatConversation, text: str, filled: FilledFrame, thought: Thought | None
) -> tuple[str, ...]:
    """What of a conversation is not in its rendering, by name, each once."""
    missing: list[str] = []
    for slot in slots_of(conversation.messages):
        if slot in filled.places:
            continue
        message = conversation.messages[slot.message]
        if slot.field == "reasoning":
            missing.append("reasoning_content")
        elif message.role == "assistant":
            # A template may write the thought that a content begins with in its own way, or leave it out alone.
            parts = zip(("reasoning_content", message.role), split_thought(message.content, thought), strict=True)
            missing += [name for name, part in parts if not is_shown(part, text)]
        else:
            missing.append(message.role)
    for message in conversation.messages:
        calls = [[call.name, json.loads(call.arguments)] for call in message.tool_calls]
        ids = [message.tool_call_id, *(call.id for call in message.tool_calls)]
        named: dict[str, list[str | None]] = {
            "tool_calls": [*strings_in(calls)], "tool_call_id": ids, "name": [message.name],
        }  # fmt: skip
        missing += [name for name, parts in named.items() if not all(is_shown(part, text) for part in parts if part)]
    if not all(is_shown(part, text) for part in texts_of_tools(template_tools(conversation.tools))):
        missing.append("tools")
    return tuple(dict.fromkeys(missing))
