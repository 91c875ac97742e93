"""Prompts that are too long, made to fit.

A chat prompt keeps its begin-of-sequence token, its system message and all that the template writes around messages.
It loses its oldest turns, each question with its answer, and then the oldest text of what is longest of the last
question and the results of tools that follow it. Of a question with a context the context loses its text first. What
does not fit then is not cut: the prompt would be none that the template writes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from pocl.errors import DatasetInvalid
from pocl.prompting.chat_rendering import ChatConversation, RenderedConversation
from pocl.prompting.text_tokenizer import TextTokenizer
from pocl.prompting.tokenised import TokenisedConversation, TokenPlaces
from pocl.samples.sample import Message

_MAX_CUTS: Final = 16
"""How often texts are cut at most: the text that is left may have a few tokens more than it had before."""

Encode = Callable[[ChatConversation], tuple[RenderedConversation, TokenisedConversation]]
"""Renders and tokenises one conversation."""


@dataclass(frozen=True)
class EncodedConversation:
    """A conversation as text and as token ids."""

    conversation: ChatConversation
    rendered: RenderedConversation
    tokenised: TokenisedConversation


def cut_chat_prompt(
    whole: EncodedConversation, question: str, max_prompt_length: int, encode: Encode, tokenizer: TextTokenizer
) -> tuple[TokenisedConversation, int]:
    """The conversation with a prompt of at most `max_prompt_length` tokens, and the assistant's turns that it lost.

    The prompt is longer where nothing would be left of what the user says last.

    Args:
        question: what the user's last message begins with, before its context; empty without a context.
    """
    attempt = _without_oldest_turns(whole, max_prompt_length, encode)
    dropped = _answers(whole.conversation.messages) - _answers(attempt.conversation.messages)
    for kept in dict.fromkeys((question, "")):
        attempt = _without_oldest_text(attempt, kept, max_prompt_length, encode, tokenizer)
    return attempt.tokenised, dropped


def cut_left(tokenised: TokenisedConversation, max_prompt_length: int, *, keep: int) -> TokenisedConversation:
    """The conversation with a prompt cut from its left, but for its first `keep` tokens; it is whole where it fits."""
    cut = tokenised.prompt_length - max_prompt_length
    if cut <= 0:
        return tokenised
    keep = min(keep, max_prompt_length - 1)
    gone = keep + cut
    # A turn that the cut goes through keeps what follows the cut.
    spans = [(max(start - cut, keep), stop - cut) for start, stop in tokenised.spans if stop > gone]
    return replace(
        tokenised,
        ids=(*tokenised.ids[:keep], *tokenised.ids[gone:]),
        spans=tuple(spans),
        prompt_length=max_prompt_length,
    )


def _without_oldest_turns(attempt: EncodedConversation, max_prompt_length: int, encode: Encode) -> EncodedConversation:
    """Without as few of the oldest turns as the prompt fits, or all but the last."""
    messages = attempt.conversation.messages
    starts = _exchange_starts(messages)[1:]
    if attempt.tokenised.prompt_length <= max_prompt_length or not starts:
        return attempt
    head = tuple(message for message in messages[: _exchange_starts(messages)[0]] if message.role == "system")
    low, high, best = 0, len(starts) - 1, None
    while low <= high:
        middle = (low + high) // 2
        shorter = attempt.conversation._replace(messages=(*head, *messages[starts[middle] :]))
        try:
            tried = EncodedConversation(shorter, *encode(shorter))
        except DatasetInvalid:
            # The template wants what is left to begin otherwise.
            low = middle + 1
            continue
        if tried.tokenised.prompt_length <= max_prompt_length or middle == len(starts) - 1:
            best, high = tried, middle - 1
        else:
            low = middle + 1
    return attempt if best is None else best


def _without_oldest_text(
    attempt: EncodedConversation, kept: str, max_prompt_length: int, encode: Encode, tokenizer: TextTokenizer
) -> EncodedConversation:
    """With less of the longest text, as often as it is needed; `kept` is not cut off the user's last message."""
    for _ in range(_MAX_CUTS):
        excess = attempt.tokenised.prompt_length - max_prompt_length
        places = {
            message: (start + len(_beginning(attempt, message, start, kept)), stop)
            for message, (start, stop) in attempt.rendered.cuttable.items()
        }
        if excess <= 0 or not places:
            return attempt
        index, (start, stop) = max(places.items(), key=lambda item: item[1][1] - item[1][0])
        if start >= stop:
            return attempt
        offsets = tokenizer.encode(attempt.rendered.text).offsets
        first = TokenPlaces(offsets).index(start)
        last = min(first + excess, len(offsets)) - 1
        left = attempt.rendered.text[max(offsets[last][1], start + 1) : stop]
        messages = list(attempt.conversation.messages)
        is_last_user = index == _last_user(messages)
        head = _beginning(attempt, index, attempt.rendered.cuttable[index][0], kept)
        if is_last_user and not (head + left).strip():
            return attempt
        messages[index] = messages[index]._replace(content=head + left)
        shorter = attempt.conversation._replace(messages=tuple(messages))
        try:
            attempt = EncodedConversation(shorter, *encode(shorter))
        except DatasetInvalid:
            return attempt
    return attempt


def _beginning(attempt: EncodedConversation, index: int, start: int, kept: str) -> str:
    """What of `kept` stands at the beginning of a message; only the user's last one begins with it."""
    if index != _last_user(attempt.conversation.messages):
        return ""
    forms = (kept, kept.lstrip())
    return next((form for form in forms if form and attempt.rendered.text.startswith(form, start)), "")


def _last_user(messages: Sequence[Message]) -> int:
    return max(index for index, message in enumerate(messages) if message.role == "user")


def _exchange_starts(messages: Sequence[Message]) -> list[int]:
    """The messages of users that begin an exchange: those that follow no other message of a user."""
    return [
        index
        for index, message in enumerate(messages)
        if message.role == "user" and (index == 0 or messages[index - 1].role != "user")
    ]


def _answers(messages: Sequence[Message]) -> int:
    return sum(message.role == "assistant" for message in messages)
