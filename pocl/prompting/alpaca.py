"""The Alpaca prompt of the POCL experiments, for models without a chat template."""

from collections.abc import Iterator
from typing import NamedTuple

from pocl.prompting.text_tokenizer import TextTokenizer
from pocl.prompting.tokenised import TokenisedConversation, TokenPlaces
from pocl.samples.sample import Message, Sample

PREAMBLE = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
)  # fmt: skip
_PREAMBLE_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)


class AlpacaTurn(NamedTuple):
    """One turn of the assistant as text."""

    prompt: str
    """The text from the end of the turn before to where the assistant begins."""
    answer: str | None
    """None where the prompt waits for its answer."""
    train: bool = True
    question_stop: int = 0
    """The number of characters of the prompt up to the end of its last question, without the input that it is about."""


def alpaca_turns(sample: Sample, system: str | None = None) -> list[AlpacaTurn]:
    """The turns of a sample: instruction, input and response under headings.

    A system message takes the place of the preamble; `system` is that of samples without one.
    """
    preamble = _PREAMBLE_WITH_INPUT if sample.context else PREAMBLE
    messages = list(sample.conversation)
    if messages[0].role == "system":
        preamble = messages.pop(0).content or preamble
    elif system is not None:
        preamble = system
    last_user = max((index for index, message in enumerate(messages) if message.role == "user"), default=None)
    turns: list[AlpacaTurn] = []
    prompt, question_stop = preamble, 0
    for index, message in enumerate(messages):
        if message.role == "user":
            prompt += f"\n\n### Instruction:\n{message.content}"
            question_stop = len(prompt)
            if sample.context and index == last_user:
                prompt += f"\n\n### Input:\n{sample.context}"
        elif message.role == "assistant":
            turns.append(AlpacaTurn(f"{prompt}\n\n### Response:\n", message.content, message.train, question_stop))
            prompt, question_stop = "", 0
        elif message.role == "system":
            prompt += f"\n\n{message.content}"
    if not sample.has_answer:
        turns.append(AlpacaTurn(f"{prompt}\n\n### Response:\n", None, question_stop=question_stop))
    return turns


def left_out_of_alpaca(sample: Sample) -> tuple[str, ...]:
    """What of a sample the prompt has no place for, by name, each once."""
    return tuple(dict.fromkeys((*(["tools"] if sample.tools else []), *_without_place(sample.conversation))))


def tokenise_alpaca(turns: list[AlpacaTurn], tokenizer: TextTokenizer, eos_id: int) -> TokenisedConversation:
    """The turns as token ids, each answer closed by `eos_id`, and begun as the tokenizer begins a text.

    Generation starts from the prompt's own ids. Where the tokenizer merges tokens across the border of prompt and
    answer, both are tokenised apart.
    """
    ids = list(tokenizer.begin_ids)
    spans: list[tuple[int, int]] = []
    apart = False
    question_stop = 0
    for prompt, answer, train, stop in turns:
        prompt_ids, offsets = tokenizer.encode(prompt)
        question_stop = len(ids) + TokenPlaces(offsets).index(stop) if stop else 0
        ids += prompt_ids
        if answer is None:
            return TokenisedConversation(
                tuple(ids),
                tuple(spans),
                len(ids),
                is_answered=False,
                tokenised_apart=apart,
                question_stop=question_stop,
            )
        start = len(ids)
        joint_ids = tokenizer.encode(prompt + answer).ids
        if joint_ids[: len(prompt_ids)] == prompt_ids:
            ids += joint_ids[len(prompt_ids) :]
        else:
            apart = True
            ids += tokenizer.encode(answer).ids
        ids.append(eos_id)
        if train:
            spans.append((start, len(ids)))
    return TokenisedConversation(
        tuple(ids), tuple(spans), spans[-1][0], tokenised_apart=apart, question_stop=question_stop
    )


def _without_place(messages: tuple[Message, ...]) -> Iterator[str]:
    for message in messages:
        if message.role == "tool":
            yield "tool"
        if message.tool_calls:
            yield "tool_calls"
        if message.reasoning:
            yield "reasoning_content"
        if message.name or message.tool_call_id:
            yield "name"
