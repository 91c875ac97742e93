"""One training example: a conversation, the reference answers to it, and the tools that it may call."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final, Literal, NamedTuple

from pocl.errors import DatasetInvalid

Role = Literal["system", "user", "assistant", "tool"]


class ToolCall(NamedTuple):
    """One call of a tool by the assistant."""

    name: str
    arguments: str
    """The arguments by name: a JSON object without spaces, its keys in the order in which they were written."""
    id: str | None = None
    """The name by which the tool's result refers to the call."""


class Message(NamedTuple):
    """One message of a conversation."""

    role: Role
    content: str
    """The text; empty where an assistant only calls tools, or a tool returned nothing."""
    reasoning: str | None = None
    """The assistant's thoughts before its content."""
    tool_calls: tuple[ToolCall, ...] = ()
    """What the assistant calls, after its content."""
    tool_call_id: str | None = None
    """The call that a tool's message is the result of."""
    name: str | None = None
    """The tool whose result this is, or the name of whoever speaks."""
    train: bool = True
    """Whether an assistant's message is trained on; of other roles it says nothing."""


_PLAIN: Final = Message("user", "")


@dataclass(frozen=True)
class Sample:
    """One training example.

    Samples of equal content are equal and have the same digest: they are interchangeable, so an order that breaks ties
    by the digest is total and does not depend on positions in the file.

    Raises:
        ValueError: there is no message, or the first reference is not what the assistant says last.
    """

    conversation: tuple[Message, ...]
    """All messages. The last one is the assistant's answer; only a prompt that waits for its answer ends otherwise."""
    context: str = ""
    """The input of an instruction, which is the last message before the answer; empty otherwise."""
    references: tuple[str, ...] = ()
    """The reference answers: the first is the content of the last message and is trained on, all count in evaluation.
    Only a prompt that waits for its answer has none. Left out, the last message's content is the only one."""
    tools: str = ""
    """The tools that the assistant may call: a JSON array without spaces, as it was written; empty without tools."""
    difficulty: float | None = None
    """How difficult the sample is, as its row says, on a scale of its own; None where the row says nothing."""
    digest: str = field(init=False)
    """SHA-256, hexadecimal, of the fields above in canonical JSON."""

    def __post_init__(self) -> None:
        if not self.conversation:
            raise ValueError("a sample has a message")
        last = self.conversation[-1]
        if last.role == "assistant" and not self.references:
            object.__setattr__(self, "references", (last.content,))
        if self.references[:1] != ((last.content,) if last.role == "assistant" else ()):
            raise ValueError("the first reference of a sample is what the assistant says last")
        object.__setattr__(self, "digest", _digest(self))

    @property
    def has_answer(self) -> bool:
        """Whether the conversation ends with the assistant's answer."""
        return bool(self.references)

    @property
    def prompt_messages(self) -> tuple[Message, ...]:
        """All messages before the answer; the whole conversation where it waits for one."""
        return self.conversation[:-1] if self.has_answer else self.conversation

    @property
    def prompt_text(self) -> str:
        """What is asked, for people to read: the contents of the messages before the answer, and the context."""
        text = "\n".join(message.content for message in self.prompt_messages)
        return f"{text}\n\n{self.context}" if self.context else text

    @property
    def turns(self) -> int:
        """The number of the assistant's messages, the answer included."""
        return sum(message.role == "assistant" for message in self.conversation)


def set_name(name: str) -> str:
    """How sentences call a set of samples: `train`, `validation`, `test` or an evaluation set."""
    return f"the {name} set"


def require_answers(samples: Iterable[Sample], source: str, *, first: int = 0) -> None:
    """Check that every sample has an answer to train on.

    Args:
        source: where the samples come from, in sentences.
        first: the number of the first sample in it, counted from 0.

    Raises:
        DatasetInvalid: naming the first sample that only is a prompt.
    """
    for number, sample in enumerate(samples, start=first + 1):
        if not sample.has_answer:
            raise DatasetInvalid(f"Sample {number} of {source} has no answer to train on.")


def _digest(sample: Sample) -> str:
    content: list[Any] = [  # Any: nested lists of JSON.
        [(message.role, message.content) for message in sample.prompt_messages],
        sample.context,
        sample.references,
    ]
    details = [_details(message) for message in sample.conversation]
    # What samples of plain text have always had as their digest stays, since stored rankings refer to it.
    if any(details) or sample.tools:
        content += [details, sample.tools]
    if sample.difficulty is not None:
        content.append({"difficulty": sample.difficulty})
    text = json.dumps(content, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _details(message: Message) -> dict[str, Any]:
    """The fields beyond role and content that are not as in a plain message."""
    names = message._fields[2:]
    return {name: getattr(message, name) for name in names if getattr(message, name) != getattr(_PLAIN, name)}
