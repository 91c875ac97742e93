"""What a chat template does, found by rendering conversations of texts that say nothing."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from pocl.errors import FieldError, ModelUnsupported, SpecInvalid
from pocl.prompting.template_messages import SENTINELS, MessageShape, common_start, common_words, template_messages
from pocl.prompting.template_renderer import Conversation, Rendered, TemplateRenderer
from pocl.prompting.text_tokenizer import TextTokenizer, TokenizedText
from pocl.prompting.thoughts import (
    AnswerForm,
    Thought,
    empty_thought_in,
    has_tag,
    known_thought,
    thought_around,
    thought_opened_in,
)
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
    answer: AnswerForm
    """What is generated around what an answer says."""
    inner_ends: frozenset[int]
    """Tokens that end a message inside an answer, as `<|end|>` behind a thought in a message of its own: they end no
    answer that is generated."""
    prompt_surplus: str
    """What the generation prompt ends with and finished answers without a thought do not have, as an opened thought."""

    @property
    def end_texts(self) -> tuple[str, ...]:
        """What may stand behind an answer."""
        ends = (self.end, self.end_of_earlier)
        return tuple(dict.fromkeys(end.text for end in ends if end is not None))

    @property
    def end_tokens(self) -> frozenset[int]:
        """The tokens that end an answer where it is generated."""
        ends = (self.end, self.end_of_earlier)
        return frozenset(end.token for end in ends if end is not None and end.token is not None) - self.inner_ends


def probe_template(renderer: TemplateRenderer, tokenizer: TextTokenizer) -> TemplateProfile:
    """Find out what a template does.

    Raises:
        SpecInvalid: it cannot render a question and an answer, naming the template and what it raises.
        ModelUnsupported: it writes no end of an answer, and the tokenizer has no end-of-sequence token.
    """
    content_parts, head = _readable_form(renderer)
    shape = MessageShape(content_parts, _wants_text_arguments(renderer, content_parts, head))
    question, answer = Message("user", USER), Message("assistant", ANSWER)
    opened, unopened, whole, two_turns = _render(
        renderer,
        shape,
        ([*head, question], True),
        ([*head, question], False),
        ([*head, question, answer], False),
        ([*head, question, answer, Message("user", NEXT_USER), Message("assistant", NEXT_ANSWER)], False),
    )
    before, _, behind = whole.text.rpartition(ANSWER)
    end = end_in(behind, tokenizer)
    if end is None and tokenizer.eos_id is None:
        raise ModelUnsupported("The tokenizer has no end-of-sequence token, and the chat template ends no answer.")
    end_of_earlier = _end_of_earlier(two_turns.text, whole.text, end, tokenizer)
    shape, thinking = _thinking_form(renderer, shape, [*head, question, answer._replace(reasoning=REASONING)])
    knows_generation_prompt = opened.error is None and opened.text != unopened.text
    if knows_generation_prompt:
        prompt = _trained_prompt(opened.text, before)
    else:
        prompt = common_words(thinking.partition(REASONING)[0] or before, before).rstrip(" ")
    ends = [each for each in (end, end_of_earlier) if each is not None]
    surplus = opened.text.removeprefix(prompt) if knows_generation_prompt else ""
    finished = _FinishedAnswer(prompt, before.removeprefix(prompt), surplus, thinking)
    thought = finished.thought(ends) or known_thought(
        renderer.source, {token.content for token in tokenizer.added_tokens.values()}
    )
    inner = finished.inner_ends(ends) - {end.token if end is not None else None}
    return TemplateProfile(
        shape=shape,
        needs_system=bool(head),
        knows_generation_prompt=knows_generation_prompt,
        marks_answers=renderer.has_generation_blocks(),
        end=end,
        end_of_earlier=end_of_earlier,
        answer=AnswerForm(thought, finished.opening(thought), _closings(ends, inner, tokenizer)),
        inner_ends=frozenset(token for token in inner if token is not None),
        prompt_surplus=surplus.strip(),
    )


def end_in(text: str, tokenizer: TextTokenizer) -> ResponseEnd | None:
    """The end of an answer that `text`, which follows it, begins with.

    It goes through the first token that is an added token, special or not, or that ends answers by the files of the
    tokenizer; through one of the latter where only added tokens stand before it, as in `<|END_RESPONSE|><|END|>`.
    Without one it is the text itself, less the spaces behind it; None where it is all spaces.
    """
    tokens = tokenizer.encode(text)
    for position, token in enumerate(tokens.ids):
        if token in tokenizer.added_tokens or token in tokenizer.end_ids:
            last = _last_of_run(tokens, position, tokenizer)
            return ResponseEnd(text[: tokens.offsets[last][1]], tokens.ids[last], tuple(tokens.ids[: last + 1]))
    plain = text.rstrip()
    return ResponseEnd(plain, None, tuple(tokenizer.encode(plain).ids)) if plain else None


def _last_of_run(tokens: TokenizedText, first: int, tokenizer: TextTokenizer) -> int:
    """The token that ends answers and follows an added token with nothing but added tokens between, or that token."""
    last = first
    while tokens.ids[last] not in tokenizer.end_ids:
        last += 1
        is_joined = last < len(tokens.ids) and tokens.offsets[last][0] == tokens.offsets[last - 1][1]
        if not is_joined or tokens.ids[last] not in tokenizer.added_tokens:
            return first
    return last


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
    header, _, behind_user = one_turn.partition(USER)
    first = end_in(between, tokenizer)
    if first is not None and first.token is not None and behind_user.startswith(first.text):
        # Every message ends so. The user's header may have the same end of a system message before it.
        return first
    border = len(between) - len(common_start(between[::-1], header[::-1]))
    # Two control tokens may share their last characters.
    inside = (stop for start, stop in tokenizer.encode(between).offsets if start < border < stop)
    return end_in(between[: next(inside, border)], tokenizer)


def _trained_prompt(opened: str, before: str) -> str:
    """Where the prompt of a finished answer ends: the generation prompt, as far as finished answers begin with it."""
    return opened if before.startswith(opened) else common_words(opened, before)


def _thinking_form(
    renderer: TemplateRenderer, shape: MessageShape, messages: Sequence[Message]
) -> tuple[MessageShape, str]:
    """The shape in which the template reads a thought, and what it renders of one; empty where it writes none."""
    for each in (shape, replace(shape, thinking_parts=True)):
        (rendered,) = _render(renderer, each, (messages, False))
        if ANSWER in rendered.text.partition(REASONING)[2]:
            return each, rendered.text
    return shape, ""


@dataclass(frozen=True)
class _FinishedAnswer:
    """What a template writes of a finished answer."""

    prompt: str
    """Up to where the answer is trained from."""
    opening_text: str
    """From there to what the answer says, where it has no thought."""
    surplus: str
    """What the generation prompt has beyond `prompt`."""
    thinking: str
    """The whole with a thought; empty where the template writes none."""

    def thought(self, ends: Sequence[ResponseEnd]) -> Thought | None:
        """How answers begin with a thought: from the rendering of one, or from the empty one that finished answers
        have, or from what the generation prompt opens; None where the template shows none.
        """
        if self.thinking:
            return self._rendered_thought(ends)
        return empty_thought_in(self.prompt + self.opening_text) or thought_opened_in(self.surplus)

    def _rendered_thought(self, ends: Sequence[ResponseEnd]) -> Thought | None:
        before, _, rest = self.thinking.partition(REASONING)
        between = rest.partition(ANSWER)[0]
        start = before.removeprefix(self.prompt).strip() if before.startswith(self.prompt) else ""
        # Else the prompt has opened it, or the template writes another prompt before an answer with a thought.
        opened = None if start else thought_opened_in(before)
        thought = thought_around(start if opened is None else opened.start, between)
        opening = self.opening_text.strip()
        if thought is not None and has_tag(opening) and any(thought.stop in end.text for end in ends):
            # The thought is a message of its own: what tells its end is how the answer begins.
            thought = thought._replace(stop=opening)
        return thought

    def opening(self, thought: Thought | None) -> str:
        """The tags before what an answer says, behind a thought; empty where there are none."""
        text = self.opening_text
        if thought is not None and thought.stop in text:
            text = text.partition(thought.stop)[2]
        elif thought is not None and thought.start in text:
            return ""
        return text.strip() if has_tag(text) else ""

    def inner_ends(self, ends: Sequence[ResponseEnd]) -> set[int | None]:
        """The tokens of `ends` that stand between a thought and what its answer says."""
        between = self.thinking.partition(REASONING)[2].partition(ANSWER)[0]
        return {end.token for end in ends if end.token is not None and end.text.strip() and end.text.strip() in between}


def _closings(ends: Sequence[ResponseEnd], inner: set[int | None], tokenizer: TextTokenizer) -> tuple[str, ...]:
    """The texts behind what an answer says at which its generation does not end by itself."""
    closings = []
    for end in ends:
        if end.token is None or end.token in inner:
            closings.append(end.text)
        elif has_tag(before := end.text.removesuffix(tokenizer.token_of(end.token) or "")):
            closings.append(before.strip())
    return tuple(dict.fromkeys(closings))
