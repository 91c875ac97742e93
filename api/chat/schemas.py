"""Bodies of chat completions, as OpenAI's API has them, and what they become for a worker."""

import secrets
from datetime import datetime
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from api.enumerations import ChatRole
from domain.chat.repository import ChatSnapshot
from pocl.chat.protocol import MAX_NEW_TOKENS, ChatMessage, ChatQuestion, FinishReason
from pocl.spec import ModelRef

MAX_MESSAGES: Final = 100
MAX_CONVERSATION_CHARACTERS: Final = 1 << 17
DEFAULT_MAX_TOKENS: Final = 512
_SEED_BITS: Final = 31
_UNUSED: Final = ("metadata", "safety_identifier", "store", "user")
_EXAMPLE: Final[dict[str, JsonValue]] = {
    "messages": [{"role": "user", "content": "Name a fruit that is yellow."}],
    "temperature": 0,
    "max_tokens": 64,
}


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True)


class ChatTextPart(_Body):
    """A part of a message."""

    type: Literal["text"]
    """The kind of the part: text, which is all that the models read."""
    text: str = Field(max_length=MAX_CONVERSATION_CHARACTERS)
    """The text."""


class ChatMessageBody(_Body):
    """One message of a conversation."""

    role: ChatRole
    """Who speaks; `developer` is another name of `system`."""
    content: (
        Annotated[str, Field(max_length=MAX_CONVERSATION_CHARACTERS)]
        | Annotated[list[ChatTextPart], Field(min_length=1, max_length=MAX_MESSAGES)]
    )
    """What is said, as a text or as parts that are put together."""

    @property
    def text(self) -> str:
        """The content as one text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatStreamOptions(_Body):
    """How a stream ends."""

    include_usage: bool = False
    """Whether a last message has the number of tokens."""


class ChatCompletionRequest(_Body):
    """A conversation that is to be answered, as OpenAI's API has it."""

    model_config = ConfigDict(json_schema_extra={"examples": [_EXAMPLE]})

    messages: list[ChatMessageBody] = Field(min_length=1, max_length=MAX_MESSAGES)
    """The conversation; the last message is not the assistant's."""
    model: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    """The model of the path, for clients that always name one; it may be left out."""
    max_tokens: Annotated[int, Field(ge=1, le=MAX_NEW_TOKENS)] | None = None
    """The most tokens of the answer; 512 unless given."""
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_NEW_TOKENS)] | None = None
    """A newer name of `max_tokens`."""
    temperature: float = Field(default=1, ge=0, le=2)
    """What the logits are divided by before a token is drawn; with 0 it is the most likely one each time, as in the
    evaluations of jobs."""
    top_p: float = Field(default=1, gt=0, le=1)
    """Tokens are drawn from the fewest most likely ones whose probabilities sum to at least this."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    """Equal requests with equal seeds are answered alike on one machine; null draws a seed."""
    stop: (
        Annotated[str, Field(min_length=1, max_length=200)]
        | Annotated[list[Annotated[str, Field(min_length=1, max_length=200)]], Field(max_length=4)]
        | None
    ) = None
    """A text, or up to four, at the first of which the answer ends; it is not part of the answer."""
    n: Literal[1] = 1
    """The number of answers."""
    stream: bool = False
    """Whether the answer is sent as it is generated, as server-sent events."""
    stream_options: ChatStreamOptions | None = None
    """How the stream ends; only with `stream`."""
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    """Not supported: 0 or null."""
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    """Not supported: 0 or null."""
    logprobs: Literal[False] | None = None
    """Not supported: false or null."""
    user: Annotated[str, Field(max_length=512)] | None = None
    """Changes nothing; `ignored` of the response names it."""
    safety_identifier: Annotated[str, Field(max_length=512)] | None = None
    """Changes nothing; `ignored` of the response names it."""
    store: bool | None = None
    """Changes nothing; `ignored` of the response names it."""
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    """Changes nothing; `ignored` of the response names it."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.messages[-1].role == "assistant":
            raise ValueError("the last message is the assistant's; end with what it is to answer")
        if sum(len(message.text) for message in self.messages) > MAX_CONVERSATION_CHARACTERS:
            raise ValueError(f"the messages have more than {MAX_CONVERSATION_CHARACTERS} characters together")
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise ValueError("max_tokens and max_completion_tokens differ; give one of them")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is given without stream")
        return self

    @property
    def ignored(self) -> list[str]:
        """The fields that were given and change nothing."""
        return [name for name in _UNUSED if getattr(self, name) is not None]

    @property
    def include_usage(self) -> bool:
        """Whether the stream ends with the number of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    def question(self) -> ChatQuestion:
        """The question for a worker, to a model that is named later."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        roles: dict[str, Any] = {"developer": "system"}
        return ChatQuestion(
            id="",
            model=ModelRef(path="."),
            messages=tuple(
                ChatMessage(role=roles.get(message.role, message.role), content=message.text)
                for message in self.messages
            ),
            max_new_tokens=self.max_completion_tokens or self.max_tokens or DEFAULT_MAX_TOKENS,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=secrets.randbits(_SEED_BITS) if self.seed is None else self.seed,
            stop=tuple(stop),
        )


class _Response(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)


class ChatUsage(_Response):
    """The tokens of a conversation and its answer."""

    prompt_tokens: int
    """The tokens of the conversation, as the chat template renders it."""
    completion_tokens: int
    """The tokens of the answer, those of a thought before it included, without its end."""
    total_tokens: int
    """Both together."""

    @classmethod
    def of(cls, snapshot: ChatSnapshot) -> Self:
        """The tokens of a request."""
        prompt = snapshot.prompt_tokens or 0
        return cls(prompt_tokens=prompt, completion_tokens=snapshot.tokens, total_tokens=prompt + snapshot.tokens)


class ChatAnswerMessage(_Response):
    """The answer as a message."""

    role: Literal["assistant"] = "assistant"
    """Who speaks."""
    content: str
    """What the answer says, without thoughts and special tokens."""
    refusal: None = None
    """Always null."""


class ChatChoice(_Response):
    """One answer."""

    index: int = 0
    """The number of the answer: always 0."""
    message: ChatAnswerMessage
    """The answer."""
    finish_reason: FinishReason
    """`stop`: the model ended its answer, or came to a text of `stop`; `length`: it came to the limit of tokens."""
    logprobs: None = None
    """Always null."""


class ChatCompletion(_Response):
    """An answer, as OpenAI's API has it."""

    id: str
    """The id of the request."""
    object: Literal["chat.completion"] = "chat.completion"
    """The kind of the resource."""
    created: int
    """When the request arrived, in seconds since 1970."""
    model: str
    """The id of the checkpoint, or the path of the model."""
    choices: list[ChatChoice]
    """The answer."""
    usage: ChatUsage
    """The tokens of both."""
    warnings: list[str]
    """What of the conversation the model did not see, in sentences."""
    ignored: list[str]
    """The fields of the request that changed nothing."""


class ChatDelta(_Response):
    """What an answer says next."""

    role: Literal["assistant"] | None = None
    """Who speaks; in the first message of a stream."""
    content: str | None = None
    """The text that follows."""


class ChatChunkChoice(_Response):
    """What one answer says next."""

    index: int = 0
    """The number of the answer: always 0."""
    delta: ChatDelta
    """The text."""
    finish_reason: FinishReason | None = None
    """Why the answer ended; null before."""
    logprobs: None = None
    """Always null."""


class ChatCompletionChunk(_Response):
    """One message of a stream, as OpenAI's API has it."""

    id: str
    """The id of the request."""
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    """The kind of the resource."""
    created: int
    """When the request arrived, in seconds since 1970."""
    model: str
    """The id of the checkpoint, or the path of the model."""
    choices: list[ChatChunkChoice]
    """What the answer says next; empty in the message with the usage."""
    usage: ChatUsage | None = None
    """The tokens, in the last message of a stream that was asked for them."""
    warnings: list[str] | None = None
    """As of a whole answer; in the message with the finish reason."""
    ignored: list[str] | None = None
    """As of a whole answer; in the message with the finish reason."""


def chunk_schemas() -> dict[str, Any]:
    """The JSON Schemas of the messages of a stream, by name."""
    schema = ChatCompletionChunk.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas: dict[str, Any] = schema.pop("$defs")
    return {**schemas, ChatCompletionChunk.__name__: schema}


def seconds_since_1970(moment: datetime) -> int:
    """A moment as OpenAI's API has it."""
    return int(moment.timestamp())
