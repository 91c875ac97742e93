"""From the messages of a row to a conversation.

A message has `role` and `content`, or `from` and `value` as ShareGPT names them; roles in every spelling of public
data are known. An assistant's message may have thoughts (`reasoning_content`, `reasoning` or `thinking`),
`tool_calls`, and `weight` or `train`, which say whether it is trained on.
"""

from collections.abc import Mapping
from typing import Any, Final

from pocl.samples.row_invalid import RowInvalid
from pocl.samples.sample import Message, Role, ToolCall
from pocl.samples.strict_json import canonical
from pocl.samples.values import (
    Fields,
    content_text,
    filled_text,
    list_of,
    optional_text,
    other_fields,
    parsed_text,
    text_of,
)

MAX_MESSAGES: Final = 1024
AFTER_LAST_ANSWER: Final = "messages after the last that is trained on"
"""How messages are named as ignored from which nothing can be learnt."""

_ROLES: Final[Mapping[str, Role]] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "chatgpt": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
    "tool_response": "tool",
    "function_response": "tool",
}
_CALLING_ROLES: Final = ("function_call", "tool_call")
"""Roles of messages whose content is a call, as JSON."""
_REASONING: Final = ("reasoning_content", "reasoning", "thinking")
_TRAIN: Final = ("weight", "train")


def parse_messages(raw: object, name: str, ignored: list[str]) -> tuple[Message, ...]:
    """The messages of a list, or of the text of a JSON array.

    Args:
        name: the column, for errors.
        ignored: is given the names of fields that are not used.

    Raises:
        RowInvalid: naming the message that is none.
    """
    messages = list_of(raw, name)
    if len(messages) > MAX_MESSAGES:
        raise RowInvalid("too_many", f"The row has more than {MAX_MESSAGES} messages.")
    return tuple(_message(message, name, index, ignored) for index, message in enumerate(messages))


def to_last_answer(messages: tuple[Message, ...], ignored: list[str]) -> tuple[Message, ...]:
    """The conversation up to the last answer that is trained on, since nothing is learnt from what follows; the whole
    where there is no answer, and it waits for one.

    Args:
        ignored: is told where messages follow.

    Raises:
        RowInvalid: there is nothing to learn from or to answer, or a tool's result follows no assistant's message.
    """
    check_order(messages)
    trained = [index for index, message in enumerate(messages) if message.role == "assistant" and message.train]
    if not trained:
        if any(message.role == "assistant" for message in messages):
            detail = "All of the assistant's messages have weight 0 or train false: nothing of the row is trained on."
            raise RowInvalid("nothing_to_train", detail)
        return messages
    if trained[-1] + 1 < len(messages):
        ignored.append(AFTER_LAST_ANSWER)
    return messages[: trained[-1] + 1]


def check_order(messages: tuple[Message, ...]) -> None:
    """
    Raises:
        RowInvalid: there is neither a user's nor an assistant's message, or a tool answers nobody.
    """
    roles = [message.role for message in messages]
    if "user" not in roles and "assistant" not in roles:
        raise RowInvalid("roles_out_of_order", "The conversation has no message of a user and none of an assistant.")
    if "tool" in roles and "assistant" not in roles[: roles.index("tool")]:
        raise RowInvalid("roles_out_of_order", "A tool's result stands before the first message of the assistant.")


def parse_tools(raw: object, name: str) -> str:
    """The tools of a row as a JSON array without spaces; empty where there are none.

    Raises:
        RowInvalid: they are not a list of objects.
    """
    if raw is None or raw == "":
        return ""
    tools = list_of(raw, name)
    for index, tool in enumerate(tools):
        if not isinstance(tool, dict):
            raise RowInvalid("wrong_type", f"{name}[{index}] is not an object.")
    return canonical(tools, name) if tools else ""


def _message(raw: object, name: str, index: int, ignored: list[str]) -> Message:
    where = f"{name}[{index}]"
    if not isinstance(raw, dict):
        raise RowInvalid("wrong_type", f"{where} is not an object.")
    role_key, content_key = _key(raw, ("role", "from"), where), _key(raw, ("content", "value"), where)
    spelled = raw[role_key]
    spelling = spelled.strip().lower() if isinstance(spelled, str) else ""
    role = "assistant" if spelling in _CALLING_ROLES else _ROLES.get(spelling)
    if role is None:
        raise RowInvalid("role_unknown", f"{where}.{role_key} is not system, user, assistant or tool.")
    used = {role_key, content_key, "name", "tool_call_id", *_TRAIN, *_REASONING, "tool_calls", "function_call"}
    ignored += other_fields(raw, used, f"{name}[].")
    content, thoughts = "", ""
    calls = _tool_calls(raw, name, where, ignored)
    if spelling in _CALLING_ROLES:
        calls += _calls_in(raw.get(content_key), name, f"{where}.{content_key}", ignored)
    elif raw.get(content_key) is not None:
        place = f"{where}.{content_key}"
        content, thoughts = content_text(raw[content_key], place, ignored, pattern=f"{name}[].{content_key}")
    message = Message(
        role,
        content,
        reasoning=_reasoning(raw, thoughts, where),
        tool_calls=calls,
        tool_call_id=optional_text(raw.get("tool_call_id"), f"{where}.tool_call_id"),
        name=optional_text(raw.get("name"), f"{where}.name"),
        train=_train(raw, role, name, where, ignored),
    )
    if content_key not in raw and not calls:
        raise RowInvalid("missing", f"{where}.{content_key} is missing.")
    _check_message(message, f"{where}.{content_key}", where)
    return message


def _key(raw: Fields, keys: tuple[str, str], where: str) -> str:
    """The one of two names that the message uses.

    Raises:
        RowInvalid: it uses both.
    """
    given = [key for key in keys if raw.get(key) is not None]
    if len(given) > 1:
        raise RowInvalid("ambiguous", f"{where} has {keys[0]} and {keys[1]}; give one of them.")
    if given:
        return given[0]
    present = [key for key in keys if key in raw]
    if keys[0] == "role":
        raise RowInvalid("role_unknown", f"{where}.role is not system, user, assistant or tool.")
    return present[0] if present else keys[0] if "role" in raw else keys[1]


def _check_message(message: Message, content: str, where: str) -> None:
    """
    Raises:
        RowInvalid: the message says nothing, or what its role does not say.
    """
    if message.role != "assistant":
        if message.tool_calls:
            raise RowInvalid("roles_out_of_order", f"{where} calls a tool, which only an assistant does.")
        if message.reasoning:
            raise RowInvalid("roles_out_of_order", f"{where} has thoughts, which only an assistant has.")
    says_nothing = not message.content.strip() and not message.tool_calls and not message.reasoning
    if says_nothing and (message.role == "user" or (message.role == "assistant" and message.train)):
        raise RowInvalid("empty", f"{content} is empty.")


def _reasoning(raw: Fields, thoughts: str, where: str) -> str | None:
    given = {key: optional_text(raw.get(key), f"{where}.{key}") for key in _REASONING}
    texts = {text for text in (*given.values(), thoughts) if text}
    if len(texts) > 1:
        raise RowInvalid("ambiguous", f"{where} has thoughts under two names that differ; give one of them.")
    return next(iter(texts), None)


def _train(raw: Fields, role: Role, name: str, where: str, ignored: list[str]) -> bool:
    given = {key: raw[key] for key in _TRAIN if raw.get(key) is not None}
    for key, value in given.items():
        if value not in (0, 1):
            raise RowInvalid("weight_unknown", f"{where}.{key} is neither 0 nor 1: other weights are not known.")
    if role != "assistant":
        ignored += [f"{name}[].{key} of messages that are not the assistant's" for key, value in given.items() if value]
        return True
    if len({bool(value) for value in given.values()}) > 1:
        raise RowInvalid("ambiguous", f"{where} has weight and train, and they differ; give one of them.")
    return all(given.values())


def _tool_calls(raw: Fields, name: str, where: str, ignored: list[str]) -> tuple[ToolCall, ...]:
    calls: list[ToolCall] = []
    given = raw.get("tool_calls")
    if given is not None and given != "":
        for index, call in enumerate(list_of(given, f"{where}.tool_calls")):
            calls.append(_tool_call(call, f"{name}[].tool_calls[]", f"{where}.tool_calls[{index}]", ignored))
    if raw.get("function_call") is not None:
        calls.append(_tool_call(raw["function_call"], f"{name}[].function_call", f"{where}.function_call", ignored))
    return tuple(calls)


def _calls_in(content: object, name: str, where: str, ignored: list[str]) -> tuple[ToolCall, ...]:
    value = parsed_text(content, where)
    calls = value if isinstance(value, list) else [value]
    return tuple(_tool_call(call, f"{name}[].tool_calls[]", where, ignored) for call in calls)


def _tool_call(raw: object, pattern: str, where: str, ignored: list[str]) -> ToolCall:
    if not isinstance(raw, dict):
        raise RowInvalid("wrong_type", f"{where} is not an object with name and arguments.")
    if raw.get("type") not in (None, "function"):
        raise RowInvalid("wrong_type", f"{where}.type is not function.")
    function: Any = raw if raw.get("function") is None else raw["function"]
    if not isinstance(function, dict):
        raise RowInvalid("wrong_type", f"{where}.function is not an object with name and arguments.")
    used = {"id", "type", *(("name", "arguments") if function is raw else ("function",))}
    ignored += other_fields(raw, used, f"{pattern}.")
    if function is not raw:
        ignored += other_fields(function, {"name", "arguments"}, f"{pattern}.function.")
    call_id = None if raw.get("id") is None else text_of(raw["id"], f"{where}.id")
    return ToolCall(filled_text(function.get("name"), f"{where}.name"), _arguments(function, where), call_id or None)


def _arguments(function: Fields, where: str) -> str:
    arguments = function.get("arguments")
    if arguments is None or arguments == "":
        return "{}"
    arguments = parsed_text(arguments, f"{where}.arguments")
    if not isinstance(arguments, dict):
        raise RowInvalid("wrong_type", f"{where}.arguments is not an object.")
    return canonical(arguments, f"{where}.arguments")
