"""Rendered conversations as token ids."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from pocl.prompting.chat_rendering import RenderedConversation
from pocl.prompting.text_tokenizer import TextTokenizer, TokenizedText


@dataclass(frozen=True)
class TokenisedConversation:
    """A conversation as token ids, before anything is cut."""

    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    """[start, stop) of the turns that are trained on, with their ends; the last is the answer's."""
    prompt_length: int
    """The tokens before the answer; all of them where the conversation waits for one."""
    is_answered: bool = True
    """Whether the last span is an answer's; a conversation that waits for its answer has none."""
    tokenised_apart: bool = False
    """Prompt and answer are tokenised apart somewhere, because tokens would merge across their border."""
    question_stop: int = 0
    """The position behind the last question, without what it is about; 0 where it is not looked for."""
    end_added: bool = False
    """The end-of-sequence token was added behind the answer, because the template writes no end."""

    @property
    def response_stop(self) -> int:
        """The position behind the answer."""
        return self.spans[-1][1] if self.is_answered else len(self.ids)


def tokenise_rendered(
    conversations: Sequence[RenderedConversation], tokenizer: TextTokenizer
) -> list[TokenisedConversation]:
    """Tokenise conversations, in their order.

    The ids are those of the text as a whole. Where no token ends at the border of a prompt and an answer, or the prompt
    alone has other ids than in the whole, the text is tokenised in pieces: generation begins from the prompt's own ids.
    """
    count = len(conversations)
    texts = [conversation.text for conversation in conversations]
    prompts = [conversation.text[: conversation.prompt_stop] for conversation in conversations]
    tokenised = tokenizer.encode_all([*texts, *prompts])
    return [
        _tokenised(conversation, whole, prompt.ids, tokenizer)
        for conversation, whole, prompt in zip(conversations, tokenised[:count], tokenised[count:], strict=True)
    ]


def _tokenised(
    conversation: RenderedConversation, whole: TokenizedText, prompt_ids: Sequence[int], tokenizer: TextTokenizer
) -> TokenisedConversation:
    borders = [place for turn in conversation.turns for place in (turn.start, turn.stop)]
    places = TokenPlaces(whole.offsets)
    unclean = {place for place in borders if not places.is_border(place)}
    if tuple(whole.ids[: len(prompt_ids)]) != tuple(prompt_ids):
        unclean.add(conversation.prompt_stop)
    unclean -= {0, len(conversation.text)}
    if unclean:
        whole = _tokenise_in_pieces(conversation.text, sorted(unclean), tokenizer)
        places = TokenPlaces(whole.offsets)
    spans = [(places.index(turn.start), places.index(turn.stop)) for turn in conversation.turns]
    is_answered = bool(conversation.turns) and conversation.turns[-1].start == conversation.prompt_stop
    ids = tuple(whole.ids)
    if is_answered and conversation.lacks_end:
        assert tokenizer.eos_id is not None  # A template without ends was refused for a tokenizer without one.
        start, stop = spans[-1]
        ids = (*ids[:stop], tokenizer.eos_id)
        spans[-1] = (start, stop + 1)
    return TokenisedConversation(
        ids,
        tuple(spans),
        prompt_length=spans[-1][0] if is_answered else len(ids),
        is_answered=is_answered,
        tokenised_apart=bool(unclean),
        end_added=is_answered and conversation.lacks_end,
    )


class TokenPlaces:
    """Which token of a text stands where."""

    def __init__(self, offsets: Sequence[tuple[int, int]]) -> None:
        self._offsets = offsets
        self._stops = [stop for _, stop in offsets]

    def index(self, place: int) -> int:
        """The number of tokens that end at a place or before it."""
        return bisect_right(self._stops, place)

    def is_border(self, place: int) -> bool:
        """Whether no token stands on both sides of a place."""
        index = self.index(place)
        return index == len(self._offsets) or self._offsets[index][0] >= place


def _tokenise_in_pieces(text: str, cuts: Sequence[int], tokenizer: TextTokenizer) -> TokenizedText:
    ids: list[int] = []
    offsets: list[tuple[int, int]] = []
    for start, stop in zip([0, *cuts], [*cuts, len(text)], strict=True):
        piece = text[start:stop]
        part = tokenise_after_text(tokenizer, piece) if start else tokenizer.encode(piece)
        ids += part.ids
        offsets += [(first + start, last + start) for first, last in part.offsets]
    return TokenizedText(tuple(ids), tuple(offsets))


def tokenise_after_text(tokenizer: TextTokenizer, text: str) -> TokenizedText:
    """A text as it follows other text: without the space that some tokenizers begin a text with."""
    newline, joint = tokenizer.encode("\n").ids, tokenizer.encode("\n" + text)
    if joint.ids[: len(newline)] != newline:
        return tokenizer.encode(text)
    offsets = joint.offsets[len(newline) :]
    return TokenizedText(joint.ids[len(newline) :], tuple((start - 1, stop - 1) for start, stop in offsets))
