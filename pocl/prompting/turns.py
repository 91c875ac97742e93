"""Which characters of a rendered conversation are the assistant's.

A turn of the assistant begins where the generation prompt of the template ends, and ends behind the end that the
template writes. Both are found by rendering parts of the conversation, never by looking for the text of the answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pocl.prompting.jinja_templates import MARK_START, MARK_STOP
from pocl.prompting.profile import TemplateProfile
from pocl.prompting.template_messages import SENTINELS, common_start, common_words, template_messages
from pocl.prompting.template_renderer import Conversation, Rendered
from pocl.prompting.text_tokenizer import TextTokenizer
from pocl.samples.sample import Message

SENTINEL = SENTINELS[-1]
"""Stands for the content of the turn that is looked for."""


class Turn(NamedTuple):
    """One turn of the assistant in a text, in characters."""

    message: int
    """Which message of the conversation it is."""
    start: int
    """Where the prompt ends and the assistant begins."""
    answer_stop: int
    """Behind what the assistant says, where its end begins."""
    stop: int
    """Behind the end of the turn; `answer_stop` where the template writes none."""


@dataclass(frozen=True)
class TurnRenderings:
    """What is rendered to find one turn of the assistant."""

    opened: Rendered
    """The messages before it, with the generation prompt."""
    unopened: Rendered
    """The same without."""
    finished: Rendered
    """Up to the turn, which ends the conversation."""
    with_sentinel: Rendered
    """The same with the sentinel as its content."""
    whole_with_sentinel: Rendered
    """The whole conversation with the sentinel as its content."""
    without_thought: Rendered
    """Up to the turn with the sentinel as its content, and without its thought."""
    finished_without_thought: Rendered
    """Up to the turn as it is, and without its thought."""


def turn_requests(
    messages: Sequence[Message], index: int, tools: list[dict[str, Any]] | None, profile: TemplateProfile
) -> list[Conversation]:
    """What is to be rendered to find the turn of message `index`: the fields of :class:`TurnRenderings` in order."""
    shape = profile.shape
    before, turn = template_messages(messages[:index], shape), messages[index]
    (given,) = template_messages([turn], shape)
    (sentinel,) = template_messages([turn._replace(content=SENTINEL)], shape)
    plain, thoughtless = template_messages(
        [turn._replace(content=SENTINEL, reasoning=None), turn._replace(reasoning=None)], shape
    )
    after = template_messages(messages[index + 1 :], shape)
    return [
        Conversation(before, tools, add_generation_prompt=True),
        Conversation(before, tools),
        Conversation([*before, given], tools),
        Conversation([*before, sentinel], tools),
        Conversation([*before, sentinel, *after], tools),
        Conversation([*before, plain], tools),
        Conversation([*before, thoughtless], tools),
    ]


def find_turn(
    text: str,
    message: Message,
    index: int,
    renderings: TurnRenderings,
    profile: TemplateProfile,
    tokenizer: TextTokenizer,
) -> Turn | None:
    """The turn of a message in the rendering of the whole conversation; None where it cannot be told."""
    start = _start(text, renderings, profile)
    if start is None:
        return None
    answer_stop = _answer_stop(text, start, message, renderings)
    if answer_stop is None:
        return None
    finished = renderings.finished.text
    limit = len(finished) if finished and text.startswith(finished) else len(text)
    if message.tool_calls:
        # The template may leave a thought out once it is answered, or write an empty one at the end alone.
        forms = (finished, renderings.finished_without_thought.text)
        finished = next((form for form in forms if form and text.startswith(form)), "")
        limit = len(finished) if finished else len(text)
        # Calls stand between the content and the end of the turn; without them nothing does.
        tokens = {tokenizer.token_of(token) for token in tokenizer.end_ids}
        inner = {tokenizer.token_of(token) for token in profile.inner_ends}
        ends = [end for end in {*profile.end_texts, *tokens} - inner if end]
        stop = _stop(text, answer_stop, limit, ends, tokenizer)
        if stop == answer_stop:
            # A turn of calls may end as no other does.
            if not finished:
                return None
            stop = max(answer_stop, len(finished.rstrip()))
        return Turn(index, start, answer_stop, stop)
    ends = [end for end in profile.end_texts if text.startswith(end, answer_stop)]
    return Turn(index, start, answer_stop, _stop(text, answer_stop, limit, ends, tokenizer))


def marked_spans(marked: str) -> tuple[str, list[tuple[int, int]]]:
    """The text without its marks, and [start, stop) of what stands between them."""
    text, spans, starts = "", [], []
    for piece in _split_at_marks(marked):
        if piece == MARK_START:
            starts.append(len(text))
        elif piece == MARK_STOP:
            spans.append((starts.pop() if starts else 0, len(text)))
        else:
            text += piece
    return text, spans


def apply_marks(turns: Sequence[Turn | None], spans: Sequence[tuple[int, int]]) -> list[Turn | None]:
    """The turns as the marks of the template have them: each from the start of its first mark to the stop of its last
    one, and through the end of the turn. A turn without a mark is none of the assistant's.

    A mark that begins with the header of the assistant gives two turns of one message: the prompt of the second one
    ends where the generation prompt does.
    """
    marked: list[Turn | None] = []
    for turn in turns:
        own = [] if turn is None else [span for span in spans if span[0] < turn.stop and span[1] > turn.start]
        if turn is None or not own:
            marked.append(None)
            continue
        start, stop = min(span[0] for span in own), max(span[1] for span in own)
        # A mark may leave out the end of the turn, which is taught all the same.
        stop = max(stop, turn.stop) if stop >= turn.answer_stop else stop
        if start < turn.start:
            marked.append(Turn(turn.message, start, turn.start, turn.start))
        marked.append(Turn(turn.message, max(start, turn.start), min(turn.answer_stop, stop), stop))
    return marked


def _start(text: str, renderings: TurnRenderings, profile: TemplateProfile) -> int | None:
    opened, before = renderings.opened, renderings.with_sentinel.text.rpartition(SENTINEL)[0]
    has_sentinel = SENTINEL in renderings.with_sentinel.text
    if profile.knows_generation_prompt and opened.error is None:
        if text.startswith(opened.text):
            return len(opened.text)
        for whole in (before if has_sentinel else "", renderings.whole_with_sentinel.text.rpartition(SENTINEL)[0]):
            # The generation prompt says more than a finished answer begins with, for instance opens a thought.
            common = _before_thought(common_words(opened.text, whole), profile)
            if len(common) >= len(common_start(renderings.unopened.text, whole)) > 0 and text.startswith(common):
                return len(common)
    if profile.knows_generation_prompt and opened.text.startswith(renderings.unopened.text):
        # The template writes earlier messages otherwise once they are answered, for instance without thoughts.
        added = opened.text.removeprefix(renderings.unopened.text)
        header, found, _ = renderings.without_thought.text.rpartition(SENTINEL)[0].rpartition(added)
        if added.strip() and found and text.startswith(header + found):
            return len(header + found)
    for whole in (before if has_sentinel else "", renderings.whole_with_sentinel.text.rpartition(SENTINEL)[0]):
        # Without a generation prompt the header that stands before the answer is the prompt's, as far as it stands
        # there without a thought too. A space before the answer is its own: tokenizers join it with the word behind.
        plain = renderings.without_thought.text
        has_thought = SENTINEL in plain and plain != renderings.with_sentinel.text
        header = (common_words(whole, plain.rpartition(SENTINEL)[0]) if has_thought else whole).rstrip(" ")
        if header and text.startswith(header):
            return len(header)
    return None


def _before_thought(prompt: str, profile: TemplateProfile) -> str:
    """A prompt that is shorter than the generation prompt, without the opened thought that it happens to end with: the
    generation prompt closes it.
    """
    thought = profile.answer.thought
    if thought is None or not prompt.rstrip().endswith(thought.start):
        return prompt
    return prompt.rstrip().removesuffix(thought.start)


def _answer_stop(text: str, start: int, message: Message, renderings: TurnRenderings) -> int | None:
    if not message.content.strip():
        return start
    finished = renderings.finished.text
    alone, in_whole = (
        rendered.text.rpartition(SENTINEL)[2] if SENTINEL in rendered.text else None
        for rendered in (renderings.with_sentinel, renderings.whole_with_sentinel)
    )
    if finished and alone is not None and text.startswith(finished) and finished.endswith(alone):
        stop = len(finished) - len(alone)
    elif in_whole is not None and text.endswith(in_whole):
        stop = len(text) - len(in_whole)
    else:
        return None
    return stop if stop >= start else None


def _stop(text: str, answer_stop: int, limit: int, ends: Sequence[str], tokenizer: TextTokenizer) -> int:
    """Behind the first end that follows within `limit`, or behind the token that follows and ends answers."""
    stops = [place + len(end) for end in ends if (place := text.find(end, answer_stop)) >= 0]
    within = [stop for stop in stops if stop <= limit]
    if within:
        return min(within)
    for token in tokenizer.end_ids:
        spelled = tokenizer.token_of(token)
        if spelled and text.startswith(spelled, answer_stop):
            return answer_stop + len(spelled)
    return answer_stop


def _split_at_marks(marked: str) -> list[str]:
    pieces: list[str] = []
    for part in marked.split(MARK_START):
        pieces += [MARK_START] if pieces else []
        first, *rest = part.split(MARK_STOP)
        pieces.append(first)
        for piece in rest:
            pieces += [MARK_STOP, piece]
    return pieces
