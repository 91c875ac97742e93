"""What a chat template does, found by rendering conversations of texts that say nothing."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from pocl.errors import FieldError, ModelUnsupported, SpecInvalid
from pocl.prompting.template_messages import SENTINELS, MessageShape, common_start, template_messages
from pocl.prompting.template_renderer import Conversation, Rendered, TemplateRenderer
from pocl.prompting.text_tokenizer import TextTokenizer
from pocl.prompting.thoughts import Thought, thought_between, thought_opened_in
from pocl.samples.sample import Message, ToolCall

SYSTEM, USER, ANSWER, NEXT_USER, NEXT_ANSWER, REASONING, TOOL, KEY, VALUE = SENTINELS[:9]


class ResponseEnd(NamedTuple):
    """What a template writes at the end of an answer."""

    text: str
    """As rendered, with the spaces before it."""
    token: int | None
    """The token that it ends with; None where it is plain text, which no token of its own stands for."""
    ids: tuple[int, ...]
    """Its tokens."""


@dataclass(frozen=True)
class TemplateProfile:
    """What a chat template does."""

    shape: MessageShape
    needs_system: bool
    """A conversation without a system message is refused."""
    knows_generation_prompt: bool
    """`add_generation_prompt` changes what is rendered."""
    marks_answers: bool
    """`{% generation %}` blocks stand around what the assistant says."""
    end: ResponseEnd | None
    """Behind the last answer; None where the template writes nothing there but spaces."""
    end_of_earlier: ResponseEnd | None
    """Behind an answer that another turn follows."""
    thought: Thought | None
    """How answers begin with a thought; None where the template knows none."""
    opens_thought: bool
    """The generation prompt opens a thought, and finished answers without one do not have that."""

    @property
    def end_texts(self) -> tuple[str, ...]:
        """What may stand behind an answer."""
        ends = (self.end, self.end_of_earlier)
        return tuple(dict.fromkeys(end.text for end in ends if end is not None))

    @property
    def end_tokens(self) -> frozenset[int]:
        """The tokens that answers end with."""
        ends = (self.end, self.end_of_earlier)
        return frozenset(end.token for end in ends if end is not None and end.token is not None)


def probe_template(renderer: TemplateRenderer, tokenizer: TextTokenizer) -> TemplateProfile:
    """Find out what a template does.

    Raises:
        SpecInvalid: it cannot render a question and an answer, naming the template and what it raises.
        ModelUnsupported: it writes no end of an answer, and the tokenizer has no end-of-sequence token.
    """
    content_parts, head = _readable_form(renderer)
    shape = MessageShape(content_parts, _wants_text_arguments(renderer, content_parts, head))
    question, answer = Message("user", USER), Message("assistant", ANSWER)
    opened, unopened, whole, two_turns, thinking = _render(
        renderer,
        shape,
        ([*head, question], True),
        ([*head, question], False),
        ([*head, question, answer], False),
        ([*head, question, answer, Message("user", NEXT_USER), Message("assistant", NEXT_ANSWER)], False),
        ([*head, question, answer._replace(reasoning=REASONING)], False),
    )
    before, _, behind = whole.text.rpartition(ANSWER)
    end = end_in(behind, tokenizer)
    if end is None and tokenizer.eos_id is None:
        raise ModelUnsupported("The tokenizer has no end-of-sequence token, and the chat template ends no answer.")
    common = common_start(opened.text, before)
    rest = opened.text[len(common) :]
    opened_thought = thought_opened_in(rest)
    return TemplateProfile(
        shape=shape,
        needs_system=bool(head),
        knows_generation_prompt=opened.error is None and opened.text != unopened.text,
        marks_answers=renderer.has_generation_blocks(),
        end=end,
        end_of_earlier=_end_of_earlier(two_turns.text, whole.text, end, tokenizer),
        thought=_thought(thinking.text, before, opened_thought),
        opens_thought=opened_thought is not None,
    )


def end_in(text: str, tokenizer: TextTokenizer) -> ResponseEnd | None:
    """The end of an answer that `text`, which follows it, begins with.

    It goes through the first token that is an added token, special or not, or that ends answers by the files of the
    tokenizer. Without one it is the text itself, less the spaces behind it; None where it is all spaces.
    """
    tokens = tokenizer.encode(text)
    for position, (token, (_, stop)) in enumerate(zip(tokens.ids, tokens.offsets, strict=True)):
        if token in tokenizer.added_tokens or token in tokenizer.end_ids:
            return ResponseEnd(text[:stop], token, tuple(tokens.ids[: position + 1]))
    plain = text.rstrip()
    return ResponseEnd(plain, None, tuple(tokenizer.encode(plain).ids)) if plain else None


def _readable_form(renderer: TemplateRenderer) -> tuple[bool, list[Message]]:
    """Whether content is given in parts, and the system message that every conversation needs.

    Raises:
        SpecInvalid: in no form does the template render a question and an answer.
    """
    talk = [Message("user", USER), Message("assistant", ANSWER)]
    heads: tuple[list[Message], ...] = ([], [Message("system", SYSTEM)])
    forms = [(parts, head) for head in heads for parts in (False, True)]
    rendered = renderer.render(
        [Conversation(template_messages([*head, *talk], MessageShape(parts))) for parts, head in forms]
    )
    for form, result in zip(forms, rendered, strict=True):
        if USER in result.text and ANSWER in result.text:
            return form
    errors = [result.error for result in rendered if result.error is not None]
    reason = errors[0] if errors else "it leaves out what the user or the assistant says"
    detail = (
        f"the chat template {renderer.name} cannot render a question and an answer: {reason}; "
        "give another one with data.chat_template, or set data.template to alpaca"
    )
    raise SpecInvalid([FieldError("/data/template", "template_unusable", detail)])


def _wants_text_arguments(renderer: TemplateRenderer, content_parts: bool, head: list[Message]) -> bool:
    call = ToolCall(TOOL, f'{{"{KEY}":"{VALUE}"}}', "call00001")
    asked = [*head, Message("user", USER), Message("assistant", "", tool_calls=(call,))]
    as_object, as_text = (
        _render(renderer, MessageShape(content_parts, text_arguments), (asked, False))[0].text
        for text_arguments in (False, True)
    )
    # An object that is printed as Python writes it is no JSON.
    object_is_shown = KEY in as_object and VALUE in as_object and f"'{KEY}'" not in as_object
    return not object_is_shown and KEY in as_text and VALUE in as_text


def _render(
    renderer: TemplateRenderer, shape: MessageShape, *conversations: tuple[Sequence[Message], bool]
) -> list[Rendered]:
    return renderer.render(
        [
            Conversation(template_messages(messages, shape), add_generation_prompt=opened)
            for messages, opened in conversations
        ]
    )


def _end_of_earlier(
    two_turns: str, one_turn: str, end: ResponseEnd | None, tokenizer: TextTokenizer
) -> ResponseEnd | None:
    """The end of an answer that another turn follows; what belongs to the user's next message is no part of it."""
    between = two_turns.partition(ANSWER)[2].partition(NEXT_USER)[0]
    if end is not None and between.startswith(end.text):
        return end
    header = one_turn.partition(USER)[0]
    border = len(between) - len(common_start(between[::-1], header[::-1]))
    # Two control tokens may share their last characters.
    inside = (stop for start, stop in tokenizer.encode(between).offsets if start < border < stop)
    return end_in(between[: next(inside, border)], tokenizer)


_EMPTY_THOUGHT: Final = re.compile(r"(<[^<>\s/]+>|\[[A-Z_]+\])\s*(</[^<>\s]+>|\[/[A-Z_]+\])\s*$")


def _thought(thinking: str, before_answer: str, opened: Thought | None) -> Thought | None:
    """How answers begin with a thought: from the rendering of one, or from the empty one that finished answers have, or
    from what the generation prompt opens.
    """
    before, found, behind = thinking.partition(REASONING)
    if found and ANSWER in behind:
        return thought_between(before, behind.partition(ANSWER)[0])
    if (empty := _EMPTY_THOUGHT.search(before_answer)) is not None:
        return Thought(empty[1], empty[2])
    return opened
