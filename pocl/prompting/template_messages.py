"""Messages of a sample as a chat template reads them, the way transformers gives them to it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from pocl.samples.sample import Message, ToolCall

SENTINELS: Final = tuple(f"Zq{index:04d}w7Yk" for index in range(4096))
"""Texts that stand for contents of which a template can see nothing: no thought, no JSON and no space is in them."""


@dataclass(frozen=True)
class MessageShape:
    """What of the ways to write a message a template reads."""

    content_parts: bool = False
    """Content is a list of parts, `{"type": "text", "text": ...}`, and not a text."""
    text_arguments: bool = False
    """The arguments of a call are a text of JSON, and not an object."""
    thinking_parts: bool = False
    """A thought is a part of the content, `{"type": "thinking", "thinking": ...}`, and no field of the message."""


def template_messages(messages: Sequence[Message], shape: MessageShape) -> list[dict[str, Any]]:
    """The messages as a template reads them; what a message does not have is not there."""
    return [_template_message(message, shape) for message in messages]


def template_tools(tools: str) -> list[dict[str, Any]] | None:
    """The tools of a sample as a template reads them; None where there are none."""
    parsed: list[dict[str, Any]] | None = json.loads(tools) if tools else None
    return parsed


def strings_in(value: Any) -> list[str]:  # Any: JSON.
    """All texts that a value of JSON holds, keys among them, and its numbers as they are written."""
    if isinstance(value, dict):
        return [*value, *(text for item in value.values() for text in strings_in(item))]
    if isinstance(value, list):
        return [text for item in value for text in strings_in(item)]
    return [] if value is None or isinstance(value, bool) else [value if isinstance(value, str) else json.dumps(value)]


def texts_of_tools(value: Any) -> list[str]:  # Any: JSON.
    """What the schemas of tools say in words: names, descriptions and the names of parameters."""
    if isinstance(value, list):
        return [text for item in value for text in texts_of_tools(item)]
    if not isinstance(value, dict):
        return []
    said = [text for name in ("name", "description") if isinstance(text := value.get(name), str)]
    properties = value.get("properties")
    return said + ([*properties] if isinstance(properties, dict) else []) + texts_of_tools(list(value.values()))


def forms_of(text: str) -> tuple[str, ...]:
    """The forms in which a template may write a text without changing what it says: whole, stripped, or inside JSON."""
    stripped = (text, text.strip(), text.lstrip(), text.rstrip(), text.strip("\n"), text.lstrip("\n"))
    escaped = (json.dumps(text, ensure_ascii=False)[1:-1], json.dumps(text)[1:-1])
    return tuple(dict.fromkeys((*stripped, text.rstrip("\n"), *escaped)))


def common_start(left: str, right: str) -> str:
    """What two texts begin with alike."""
    for index, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return left[:index]
    return left[: len(right)]


def common_words(left: str, right: str) -> str:
    """What two texts begin with alike, without the part of a word or tag that they happen to share at its end; the
    second text where the first begins with it."""
    common = common_start(left, right)
    if common == right:
        return common
    return common[: max(common.rfind("\n"), common.rfind(">"), common.rfind("]")) + 1] or common


def is_shown(text: str, rendered: str) -> bool:
    """Whether a text occurs in what a template rendered, in one of its forms."""
    return any(form in rendered for form in forms_of(text))


def _template_message(message: Message, shape: MessageShape) -> dict[str, Any]:
    parts = [{"type": "text", "text": message.content}] if message.content or shape.content_parts else []
    written: dict[str, Any] = {"role": message.role, "content": parts if shape.content_parts else message.content}
    if message.reasoning is not None and shape.thinking_parts:
        written["content"] = [{"type": "thinking", "thinking": message.reasoning}, *parts]
    elif message.reasoning is not None:
        written["reasoning_content"] = message.reasoning
    if message.tool_calls:
        written["tool_calls"] = [_template_call(call, shape) for call in message.tool_calls]
    for name in ("tool_call_id", "name"):
        if getattr(message, name) is not None:
            written[name] = getattr(message, name)
    return written


def _template_call(call: ToolCall, shape: MessageShape) -> dict[str, Any]:
    arguments = call.arguments if shape.text_arguments else json.loads(call.arguments)
    written: dict[str, Any] = {"type": "function", "function": {"name": call.name, "arguments": arguments}}
    return written if call.id is None else {"id": call.id, **written}
