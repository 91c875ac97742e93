"""Samples as token ids with their response tokens marked, and counts of what was cut and left out on the way."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Final, NamedTuple, Self

from pocl.encoding_counts import EncodingCounts, length_bucket
from pocl.errors import DatasetInvalid, ModelUnsupported
from pocl.prompting.alpaca import alpaca_turns, left_out_of_alpaca, tokenise_alpaca
from pocl.prompting.chat_rendering import ChatConversation, ChatRendering, RenderedConversation
from pocl.prompting.cuts import EncodedConversation, cut_chat_prompt, cut_left
from pocl.prompting.encoded_sample import EncodedSample
from pocl.prompting.profile import ResponseEnd
from pocl.prompting.text_tokenizer import TextTokenizer
from pocl.prompting.thoughts import PLAIN, AnswerForm
from pocl.prompting.tokenised import TokenisedConversation, tokenise_rendered
from pocl.samples.sample import Message, Sample

CONTEXT_SEPARATOR: Final = "\n\n"
"""Stands between a question and its context, where a chat template has no place for the latter."""
_CHUNK: Final = 256
"""Samples that are rendered and tokenised at a time."""


class EncodingResult(NamedTuple):
    """Samples as token ids, with what happened to them."""

    samples: tuple[EncodedSample, ...]
    """In the order in which they were given."""
    counts: EncodingCounts


@dataclass(frozen=True)
class _Whole:
    """A sample before cuts."""

    tokenised: TokenisedConversation
    left_out: tuple[str, ...] = ()
    unlabelled_turns: int = 0
    rendered: RenderedConversation | None = None
    """None for the Alpaca prompt."""


@dataclass(frozen=True)
class SampleEncoder:
    """Encodes samples for one tokenizer and one template: a chat template, or the Alpaca prompt."""

    tokenizer: TextTokenizer
    chat: ChatRendering | None
    """None for the Alpaca prompt."""
    system: str | None
    """The system message of samples that have none."""
    max_length: int
    max_prompt_length: int
    tool_chat: ChatRendering | None = None
    """The chat template of samples with tools, where they have one of their own."""
    source: str = "the data"
    """Where the samples come from, in sentences."""

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: unless 1 <= max_prompt_length < max_length.
            ModelUnsupported: nothing can end an answer.
        """
        if not 1 <= self.max_prompt_length < self.max_length:
            raise ValueError("max_prompt_length must be at least 1 and below max_length")
        if self.chat is None and self.tokenizer.eos_id is None:
            raise ModelUnsupported("The tokenizer has no end-of-sequence token.")

    def named(self, source: str) -> Self:
        """The same encoder, whose sentences say that samples are of `source`."""
        return replace(self, source=source)

    @property
    def template(self) -> str:
        """`chat` or `alpaca`."""
        return "alpaca" if self.chat is None else "chat"

    @property
    def end(self) -> ResponseEnd:
        """What ends an answer as it is trained."""
        if self.chat is not None and self.chat.profile.end is not None:
            return self.chat.profile.end
        assert self.tokenizer.eos_id is not None  # Looked at when this object, or the profile, was made.
        return ResponseEnd(
            self.tokenizer.token_of(self.tokenizer.eos_id) or "", self.tokenizer.eos_id, (self.tokenizer.eos_id,)
        )

    @property
    def end_tokens(self) -> frozenset[int]:
        """The tokens that end an answer where it is generated, by the template and by the tokenizer's files."""
        profiles = [chat.profile for chat in (self.chat, self.tool_chat) if chat is not None]
        tokens = set(self.tokenizer.end_ids).union(*(profile.end_tokens for profile in profiles))
        tokens -= set().union(*(profile.inner_ends for profile in profiles))
        return frozenset(tokens if self.end.token is None else {*tokens, self.end.token})

    @property
    def stop_text(self) -> str:
        """The plain text that ends an answer; empty where a token ends it."""
        return self.end.text if self.end.token is None else ""

    @property
    def answer(self) -> AnswerForm:
        """What is generated around what an answer says."""
        return PLAIN if self.chat is None else self.chat.profile.answer

    @property
    def answer_key(self) -> str:
        """The template's kind, with what of an answer is taken off before it is compared, for the keys of caches."""
        return self.template if self.answer == PLAIN else f"{self.template} {self.answer}"

    def encode(self, samples: Sequence[Sample], *, first: int = 0) -> EncodingResult:
        """Encode samples.

        The prompt is all before the last answer. Where it has more than `max_prompt_length` tokens it is made to fit:
        see :mod:`pocl.prompting.cuts`; the Alpaca prompt is cut from its left. What exceeds `max_length` is cut from
        the end of the answer, so that its end is lost first.

        Args:
            first: the number of the first sample in its data set, counted from 0, for sentences about samples.

        Raises:
            DatasetInvalid: the template refuses a sample, or what it renders of it cannot be told apart, or what it
                writes around the last question alone has more than `max_prompt_length` tokens.
            SpecInvalid: the template takes more time or memory than a template may.
        """
        encoded: list[EncodedSample] = []
        counts = EncodingCounts()
        for start in range(0, len(samples), _CHUNK):
            chunk = samples[start : start + _CHUNK]
            wholes = self._alpaca(chunk) if self.chat is None else self._chat(self.chat, chunk, first + start)
            pairs = [
                self._cut(sample, whole, self._name(first + start + index))
                for index, (sample, whole) in enumerate(zip(chunk, wholes, strict=True))
            ]
            encoded += [sample for sample, _ in pairs]
            counts = sum((count for _, count in pairs), start=counts)
        return EncodingResult(tuple(encoded), counts)

    def conversation(self, sample: Sample) -> ChatConversation:
        """The messages of a sample as a template is given them: with its context, and a system message."""
        messages = list(sample.conversation)
        if sample.context:
            index = len(sample.prompt_messages) - 1
            messages[index] = messages[index]._replace(
                content=f"{messages[index].content}{CONTEXT_SEPARATOR}{sample.context}"
            )
        if self.system is not None and all(message.role != "system" for message in messages):
            messages.insert(0, Message("system", self.system))
        return ChatConversation(tuple(messages), sample.tools)

    def _chat(self, chat: ChatRendering, samples: Sequence[Sample], first: int) -> list[_Whole]:
        rendered: dict[int, RenderedConversation] = {}
        for each in (chat, self.tool_chat):
            indices = [index for index, sample in enumerate(samples) if self._chat_of(sample) is each]
            if each is not None and indices:
                names = [self._name(first + index) for index in indices]
                results = each.render([self.conversation(samples[index]) for index in indices], names)
                rendered |= dict(zip(indices, results, strict=True))
        in_order = [rendered[index] for index in range(len(samples))]
        return [
            _Whole(tokenised, each.left_out, each.unlabelled_turns, each)
            for each, tokenised in zip(in_order, tokenise_rendered(in_order, self.tokenizer), strict=True)
        ]

    def _name(self, index: int) -> str:
        return f"sample {index + 1} of {self.source}"

    def _chat_of(self, sample: Sample) -> ChatRendering | None:
        return self.tool_chat if sample.tools and self.tool_chat is not None else self.chat

    def _alpaca(self, samples: Sequence[Sample]) -> Iterator[_Whole]:
        eos = self.tokenizer.eos_id
        assert eos is not None  # Looked at when this object was made.
        for sample in samples:
            turns = alpaca_turns(sample, self.system)
            yield _Whole(tokenise_alpaca(turns, self.tokenizer, eos), left_out_of_alpaca(sample))

    def _cut(self, sample: Sample, whole: _Whole, name: str) -> tuple[EncodedSample, EncodingCounts]:
        tokenised, dropped, question_lost = whole.tokenised, 0, False
        prompt_cut = tokenised.prompt_length > self.max_prompt_length
        chat = self._chat_of(sample)
        if prompt_cut and chat is None:
            begins = len(self.tokenizer.begin_ids)
            gone = begins + tokenised.prompt_length - self.max_prompt_length
            question_lost = 0 < tokenised.question_stop <= gone
            tokenised = cut_left(tokenised, self.max_prompt_length, keep=begins)
        elif prompt_cut and chat is not None:
            assert whole.rendered is not None  # It is a chat.
            tokenised, dropped = cut_chat_prompt(
                EncodedConversation(self.conversation(sample), whole.rendered, tokenised),
                f"{sample.prompt_messages[-1].content}{CONTEXT_SEPARATOR}" if sample.context else "",
                self.max_prompt_length,
                partial(self._encode_one, chat, name),
                self.tokenizer,
            )
            if tokenised.prompt_length > self.max_prompt_length:
                raise DatasetInvalid(
                    f"The chat template {chat.renderer.name} writes {tokenised.prompt_length} tokens before the answer "
                    f"of {name} with next to nothing left of the last question, and data.max_prompt_length is "
                    f"{self.max_prompt_length}: raise it, shorten the system message or the tools, or leave the sample "
                    "out."
                )
        ids = tokenised.ids[: self.max_length]
        stop = min(tokenised.response_stop, self.max_length)
        answer_cut = tokenised.response_stop > self.max_length
        encoded = EncodedSample(
            digest=sample.digest,
            input_ids=ids,
            prompt_length=tokenised.prompt_length,
            earlier_spans=tokenised.spans[:-1] if tokenised.is_answered else tokenised.spans,
            trailing_tokens=len(ids) - stop,
        )
        return encoded, EncodingCounts(
            rows=1,
            tokens=len(ids),
            prompt_tokens=encoded.prompt_length,
            trained_tokens=encoded.predicted_tokens,
            rows_too_long=int(prompt_cut or answer_cut),
            prompts_cut=int(prompt_cut),
            turns_dropped=dropped,
            questions_lost=int(question_lost),
            answers_cut=int(answer_cut),
            ends_lost=int(answer_cut),
            tokens_cut=max(0, len(whole.tokenised.ids) - len(ids)),
            ends_added=int(whole.tokenised.end_added),
            tokenised_apart=int(whole.tokenised.tokenised_apart),
            turns_unlabelled=whole.unlabelled_turns,
            left_out=Counter(whole.left_out),
            lengths={length_bucket(len(whole.tokenised.ids)): 1},
        )

    def _encode_one(
        self, chat: ChatRendering, name: str, conversation: ChatConversation
    ) -> tuple[RenderedConversation, TokenisedConversation]:
        (rendered,) = chat.render([conversation], [name])
        (tokenised,) = tokenise_rendered([rendered], self.tokenizer)
        return rendered, tokenised
