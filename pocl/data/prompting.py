"""How a sample becomes text: by the model's chat template, or by the Alpaca prompt of the POCL experiments."""

from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from typing import Literal

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from pocl.errors import DatasetInvalid, FieldError, ModelUnsupported, SpecInvalid
from pocl.samples.sample import Message, Sample

_PREAMBLE = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
)  # fmt: skip
_PREAMBLE_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)


class Prompting(StrEnum):
    """The template that turns a sample into text."""

    CHAT = "chat"
    """The tokenizer's own chat template; the input of an instruction follows the instruction after a blank line."""
    ALPACA = "alpaca"
    """Instruction, Input and Response under headings; a system message takes the place of the preamble."""

    @classmethod
    def choose(cls, setting: Literal["auto", "chat", "alpaca"], tokenizer: PreTrainedTokenizerBase) -> "Prompting":
        """The template that `data.template` of the specification selects for this tokenizer.

        Raises:
            SpecInvalid: for `chat` where the tokenizer has no chat template.
        """
        has_template = bool(tokenizer.chat_template)
        if setting == "auto":
            return cls.CHAT if has_template else cls.ALPACA
        if setting == "chat" and not has_template:
            detail = "the tokenizer has no chat template; use alpaca or auto"
            raise SpecInvalid([FieldError(pointer="/data/template", code="no_chat_template", detail=detail)])
        return cls(setting)


@dataclass(frozen=True)
class Turn:
    """One assistant turn of a conversation, as text."""

    prompt: str
    """The text from the end of the turn before to where the assistant begins."""
    answer: str
    has_end_token: bool
    """Whether an end-of-response token follows the answer."""


def end_of_response_id(tokenizer: PreTrainedTokenizerBase, prompting: Prompting) -> int:
    """The token that ends a response: the end-of-turn token of the chat template, else the end-of-sequence token.

    Raises:
        ModelUnsupported: if there is neither, or the chat template cannot render a question and an answer.
    """
    if prompting is Prompting.CHAT:
        answer = "An answer"
        try:
            text = _render(tokenizer, (Message("user", "A question"), Message("assistant", answer)), complete=True)
        except TemplateError as error:
            raise ModelUnsupported("The chat template cannot render a question and an answer.") from error
        after = token_ids(tokenizer, text[text.rfind(answer) + len(answer) :])
        added = tokenizer.added_tokens_decoder
        special = [token for token in after if token in added and added[token].special]
        if special:
            return special[0]
    if not isinstance(tokenizer.eos_token_id, int):
        raise ModelUnsupported("The tokenizer has no end-of-sequence token.")
    return tokenizer.eos_token_id


def assistant_turns(
    sample: Sample, tokenizer: PreTrainedTokenizerBase, prompting: Prompting, end_id: int
) -> list[Turn]:
    """The assistant turns of a sample, the first reference as the last; concatenated they are the conversation.

    A chat template may rewrite earlier messages, for instance leave out their reasoning. Turns before such a rewrite
    are no turns but part of the next turn's prompt, as the model would see them.

    Raises:
        DatasetInvalid: if the chat template refuses the conversation.
    """
    if prompting is Prompting.ALPACA:
        return _alpaca_turns(sample)
    try:
        return _chat_turns(_with_context(sample), sample.references[0], tokenizer, end_id)
    except TemplateError as error:
        raise DatasetInvalid(f"The model's chat template refuses a sample of the data: {error}.") from error


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The token ids of `text` alone, without special tokens before or after."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return ids


def _alpaca_turns(sample: Sample) -> list[Turn]:
    preamble = _PREAMBLE_WITH_INPUT if sample.context else _PREAMBLE
    rest = sample.prompt_messages
    if rest[0].role == "system":
        preamble, rest = rest[0].content, rest[1:]
    if [message.role for message in rest] != [("user", "assistant")[index % 2] for index in range(len(rest))]:
        raise DatasetInvalid(
            "The Alpaca template has a place for user and assistant in turn, and a sample is otherwise."
        )
    instructions = [message.content for message in rest if message.role == "user"]
    answers = [message.content for message in rest if message.role == "assistant"]
    headings = [f"\n\n### Instruction:\n{instruction}" for instruction in instructions]
    if sample.context:
        headings[-1] += f"\n\n### Input:\n{sample.context}"
    headings[0] = preamble + headings[0]
    return [
        Turn(f"{heading}\n\n### Response:\n", answer, has_end_token=True)
        for heading, answer in zip(headings, [*answers, sample.references[0]], strict=True)
    ]


def _with_context(sample: Sample) -> tuple[Message, ...]:
    if not sample.context:
        return sample.prompt_messages
    *before, last = sample.prompt_messages
    return (*before, Message("user", f"{last.content}\n\n{sample.context}"))


def _chat_turns(
    messages: tuple[Message, ...], reference: str, tokenizer: PreTrainedTokenizerBase, end_id: int
) -> list[Turn]:
    end = str(tokenizer.convert_ids_to_tokens(end_id))
    assistants = [index for index, message in enumerate(messages) if message.role == "assistant"]
    starts = [*assistants, len(messages)]
    turns: list[Turn] = []
    used = 0  # The characters of the text that are in turns already.
    text = _render(tokenizer, messages[: starts[0]])
    for start, next_start in pairwise(starts):
        longer = _render(tokenizer, messages[:next_start])
        answer = _as_rendered(messages[start].content, longer, text)
        if answer is None:
            turns, used = [], 0
        else:
            ends_at = _end_of_turn(longer, len(text) + len(answer), end)
            turns.append(Turn(text[used:], answer, has_end_token=ends_at is not None))
            used = ends_at or len(text) + len(answer)
        text = longer
    return [*turns, Turn(text[used:], reference, has_end_token=True)]


def _as_rendered(answer: str, longer: str, text: str) -> str | None:
    """The answer as it follows `text` in `longer`: whole or stripped; None if it does not follow."""
    if not longer.startswith(text):
        return None
    return next((form for form in (answer, answer.strip()) if longer.startswith(form, len(text))), None)


def _end_of_turn(text: str, position: int, end: str) -> int | None:
    """The position behind the token `end` if it follows `position`, spaces aside; else None."""
    while text.startswith(" ", position):
        position += 1
    return position + len(end) if text.startswith(end, position) else None


def _render(tokenizer: PreTrainedTokenizerBase, messages: tuple[Message, ...], *, complete: bool = False) -> str:
    """The conversation as text, opened for the assistant unless it is `complete`."""
    conversation = [{"role": message.role, "content": message.content} for message in messages]
    return str(tokenizer.apply_chat_template(conversation, add_generation_prompt=not complete, tokenize=False))
