"""What the process that answers conversations reads and writes: lines of JSON, each a question, a cancel or an event.

Standard input has questions, one at a time, and cancels of the question that is being answered; its end ends the
process. Standard output has the events of the answers. This module imports no torch: a worker speaks it too.
"""

from typing import Annotated, Final, Literal

from pydantic import Field, TypeAdapter

from pocl.errors import Fault
from pocl.spec import ModelRef
from pocl.spec.frozen import FrozenModel

MAX_NEW_TOKENS: Final = 4096
"""The most tokens of one answer."""
MAX_CONTEXT_TOKENS: Final = 32_768
"""The most tokens of a conversation and its answer together, however many positions the model has."""

FinishReason = Literal["stop", "length"]
"""Why an answer ended: at its own end or a stop sequence, or at the limit of its tokens."""


class ChatMessage(FrozenModel):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


class ChatTemplateSettings(FrozenModel):
    """How a conversation becomes tokens, as far as the files of a model do not say it: settings of the job that made
    the model, by the names that they have in its specification.
    """

    system: str | None = None
    """The system message of conversations that have none."""
    date: str | None = None
    """The day, YYYY-MM-DD, that templates which print today's date are given; null takes a fixed day."""


class ChatQuestion(FrozenModel):
    """A conversation to be answered, and how."""

    kind: Literal["question"] = "question"
    id: str
    model: ModelRef
    """A path of this machine, or a model of the Hub."""
    template: ChatTemplateSettings = ChatTemplateSettings()
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    messages: tuple[ChatMessage, ...] = Field(min_length=1)
    max_new_tokens: int = Field(ge=1, le=MAX_NEW_TOKENS)
    temperature: float = Field(ge=0, le=2)
    """0 takes the most likely token each time."""
    top_p: float = Field(gt=0, le=1)
    seed: int = Field(ge=0, lt=2**63)
    stop: tuple[str, ...] = ()
    """Texts at the first of which an answer ends; it does not hold it."""


class ChatCancel(FrozenModel):
    """Ends the answer to a question; without effect where it has ended already."""

    kind: Literal["cancel"] = "cancel"
    id: str


class AnswerPart(FrozenModel):
    """What an answer says next."""

    kind: Literal["part"] = "part"
    id: str
    text: str
    tokens: int
    """The tokens that were generated so far."""


class AnswerFinished(FrozenModel):
    """The end of an answer."""

    kind: Literal["finished"] = "finished"
    id: str
    text: str
    """All that the answer says."""
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    warnings: tuple[str, ...] = ()
    """What of the conversation the model does not see, in sentences."""


class AnswerFailed(FrozenModel):
    """An answer that could not be given; the process answers the next question."""

    kind: Literal["failed"] = "failed"
    id: str
    code: str
    message: str
    fault: Fault


class AnswerCancelled(FrozenModel):
    """An answer that was cancelled."""

    kind: Literal["cancelled"] = "cancelled"
    id: str


ChatInput = Annotated[ChatQuestion | ChatCancel, Field(discriminator="kind")]
ChatEvent = Annotated[AnswerPart | AnswerFinished | AnswerFailed | AnswerCancelled, Field(discriminator="kind")]
chat_inputs: Final[TypeAdapter[ChatQuestion | ChatCancel]] = TypeAdapter(ChatInput)
"""Reads a line of standard input."""
chat_events: Final[TypeAdapter[AnswerPart | AnswerFinished | AnswerFailed | AnswerCancelled]] = TypeAdapter(ChatEvent)
"""Reads a line of standard output."""
