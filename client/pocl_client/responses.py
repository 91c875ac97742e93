"""What responses hold, as models and exceptions."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias, TypeVar
from urllib.parse import quote

from pydantic import BaseModel, ValidationError

from pocl_client.errors import ApiError, ResponseInvalid, api_error
from pocl_client.models import Event, LogMessage, MetricMessage, ProgressMessage
from pocl_client.retries import retry_after_of

M = TypeVar("M", bound=BaseModel)

ENDED: Final = frozenset({"succeeded", "failed", "cancelled"})
"""The statuses of a job that it never leaves."""
_LIVE: Final[Mapping[str, type[LogMessage | MetricMessage | ProgressMessage]]] = {
    "log": LogMessage,
    "metric": MetricMessage,
    "progress": ProgressMessage,
}

MessageContent: TypeAlias = Event | LogMessage | MetricMessage | ProgressMessage


@dataclass(frozen=True)
class Response:
    """A response that has arrived whole."""

    status: int
    headers: Mapping[str, str]
    """With names in lower case."""
    content: bytes

    def model(self, kind: type[M]) -> M:
        """The body as a resource.

        Raises:
            ResponseInvalid: it is none.
        """
        try:
            return kind.model_validate_json(self.content)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = "/".join(map(str, first["loc"]))
            raise ResponseInvalid(
                f"The response is no {kind.__name__} ({where or 'body'}: {first['msg']}). Check that the address is "
                "that of the service, and that client and service are of versions that go together."
            ) from None

    def json(self) -> Any:
        """The body as JSON.

        Raises:
            ResponseInvalid: it is none.
        """
        return parse_json(self.content)

    def error(self) -> ApiError:
        """The exception that a response of 400 and above stands for."""
        try:
            body = json.loads(self.content)
        except ValueError:
            body = {}
        body = body if isinstance(body, dict) else {}
        body.setdefault("request_id", self.headers.get("x-request-id"))
        return api_error(self.status, body, retry_after=retry_after_of(self.headers))


@dataclass(frozen=True)
class StreamMessage:
    """One message of the stream of a job."""

    type: str
    """`state`, `stage`, `evaluation`, `checkpoint`, `artifact`, `warning`, `run` and `end` are of the history;
    `progress`, `metric` and `log` are live."""
    id: str | None
    """Where another stream may go on, as its `last_event_id`; null before the first message that has one."""
    content: MessageContent


def parse_message(type_: str, id_: str, data: str) -> StreamMessage:
    """A server-sent message.

    Raises:
        ResponseInvalid: its data is not what the type promises.
    """
    kind: type[MessageContent] = _LIVE.get(type_, Event)
    return StreamMessage(type_, id_ or None, Response(200, {}, data.encode()).model(kind))


def answered_text(data: str) -> str:
    """The text that a piece of a chat completion adds to the answer.

    Raises:
        ApiError: the answer failed on its way.
        ResponseInvalid: it is no such piece.
    """
    piece = parse_json(data.encode())
    if isinstance(piece, dict) and isinstance(piece.get("error"), dict):
        raise api_error(
            int(piece["error"].get("status") or 500), {"detail": piece["error"].get("message"), **piece["error"]}
        )
    try:
        return "".join(choice["delta"].get("content") or "" for choice in piece["choices"])
    except (TypeError, KeyError, AttributeError):
        raise ResponseInvalid("The answer is not in pieces of a chat completion.") from None


def parse_json(content: bytes) -> Any:
    """A body as JSON.

    Raises:
        ResponseInvalid: it is none.
    """
    try:
        return json.loads(content)
    except ValueError:
        raise ResponseInvalid("The response is no JSON: check that the address is that of the service.") from None


def segment(text: str) -> str:
    """An id as a part of a path. What is in it never leads elsewhere.

    Raises:
        ValueError: it is empty, or `.` or `..`.
    """
    if text in ("", ".", ".."):
        raise ValueError(f"{text!r} is no id")
    return quote(text, safe="")


def given(**fields: Any) -> dict[str, Any]:
    """The fields that are not null."""
    return {name: value for name, value in fields.items() if value is not None}
