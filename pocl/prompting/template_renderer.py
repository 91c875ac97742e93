"""A chat template that renders conversations in a child process, many at a time."""

from atexit import register
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from threading import Lock
from typing import Any, Final, NamedTuple

from pocl.errors import FieldError, SpecInvalid
from pocl.limited_process import LimitedProcess, ProcessFailed

MEMORY_BYTES: Final = 512 << 20
ANSWER_BYTES: Final = 256 << 20
SECONDS: Final = 20.0
"""Of the processor, for one request; a request holds at most :data:`MAX_REQUEST_CONVERSATIONS` conversations."""
MAX_REQUEST_CONVERSATIONS: Final = 256
MAX_REQUEST_CHARACTERS: Final = 4 << 20

Call = Callable[[Any], Any]
"""Answers a request of :mod:`pocl.prompting.template_process`."""


class Conversation(NamedTuple):
    """What a template is to render."""

    messages: Sequence[Mapping[str, Any]]
    """As transformers gives them to a template."""
    tools: Sequence[Mapping[str, Any]] | None = None
    add_generation_prompt: bool = False
    """Whether the text ends where the assistant begins to answer."""
    marks: bool = False
    """Whether what `{% generation %}` blocks render is marked."""


class Rendered(NamedTuple):
    """What a template made of a conversation."""

    text: str
    """Empty where the template raised."""
    error: str | None = None
    """What the template raised; None where it rendered."""


@dataclass(frozen=True)
class TemplateRenderer:
    """Renders conversations by one template.

    Raises:
        SpecInvalid: the template takes more time or memory than a template may.
    """

    name: str
    """How sentences call the template."""
    source: str
    variables: Mapping[str, Any]
    """The special tokens, and the `chat_template_kwargs` of the specification."""
    today: date
    call: Call = field(repr=False, compare=False)

    def render(self, conversations: Sequence[Conversation]) -> list[Rendered]:
        """Render conversations, in their order."""
        rendered: list[Rendered] = []
        part: list[dict[str, Any]] = []
        characters = 0
        for conversation in conversations:
            part.append(conversation._asdict())
            characters += sum(len(str(message.get("content", ""))) for message in conversation.messages)
            if len(part) >= MAX_REQUEST_CONVERSATIONS or characters > MAX_REQUEST_CHARACTERS:
                rendered += self._rendered(part)
                part, characters = [], 0
        return [*rendered, *self._rendered(part)]

    def has_generation_blocks(self) -> bool:
        """Whether the template marks what the assistant says with `{% generation %}`."""
        return bool(self._answer({"source": self.source})["has_generation_blocks"])

    def variables_read(self) -> frozenset[str]:
        """The names that the template reads."""
        return frozenset(self._answer({"source": self.source})["variables_read"])

    def _rendered(self, conversations: list[dict[str, Any]]) -> list[Rendered]:
        if not conversations:
            return []
        request = {
            "source": self.source,
            "variables": self.variables,
            "today": self.today.isoformat(),
            "conversations": conversations,
        }
        return [Rendered(each.get("text", ""), each.get("error")) for each in self._answer(request)["rendered"]]

    def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            answer: dict[str, Any] = self.call(request)
        except ProcessFailed as error:
            detail = f"the chat template {self.name} {error}; give another one with data.chat_template"
            raise SpecInvalid([FieldError("/data/chat_template", "template_unusable", detail)]) from error
        return answer


def template_process() -> LimitedProcess:
    """A child process that templates render in: see :func:`calling`."""
    return LimitedProcess("pocl.prompting.template_process", memory_bytes=MEMORY_BYTES, answer_bytes=ANSWER_BYTES)


def calling(process: LimitedProcess) -> Call:
    """The call of a :class:`TemplateRenderer` that renders in a process, within :data:`SECONDS` a request."""
    return partial(process.call, seconds=SECONDS)


_shared_process: Final = template_process()
_shared_lock: Final = Lock()
register(_shared_process.close)


def call_shared_process(request: Any) -> Any:  # Any: JSON.
    """The call of a :class:`TemplateRenderer` that renders in a process which lives as long as this one."""
    with _shared_lock:
        return _shared_process.call(request, seconds=SECONDS)
