"""The one form in which the service stores samples: JSONL with a sample on each line, read back without loss."""

from typing import Any, Final

import orjson

from pocl.samples.sample import Message, Sample
from pocl.spec import ReadOptions

MAX_STORED_BYTES: Final = 16 << 20
"""The longest line: escapes and the names of fields make a row longer than it was sent."""
STORED: Final = ReadOptions(format="jsonl", form="sample")
"""How stored samples are read."""


def is_stored(options: ReadOptions) -> bool:
    """Whether a file that is read so holds stored samples, each of them on a line."""
    return (options.format, options.form) == (STORED.format, STORED.form)


def stored_line(sample: Sample) -> bytes:
    """The sample as one line of JSON, with its line end; fields that are empty are left out."""
    row: dict[str, Any] = {  # Any: values of JSON.
        "conversation": [_message(message) for message in sample.conversation],
        # It is there for prompts too: it tells that nothing is to be cut from the conversation.
        "references": sample.references,
    }
    if sample.context:
        row["context"] = sample.context
    if sample.tools:
        row["tools"] = sample.tools
    if sample.difficulty is not None:
        row["difficulty"] = sample.difficulty
    return orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE)


def _message(message: Message) -> dict[str, Any]:
    row: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning:
        row["reasoning_content"] = message.reasoning
    if message.tool_calls:
        row["tool_calls"] = [
            {"id": call.id, "function": {"name": call.name, "arguments": call.arguments}} for call in message.tool_calls
        ]
    if message.tool_call_id:
        row["tool_call_id"] = message.tool_call_id
    if message.name:
        row["name"] = message.name
    if not message.train:
        row["train"] = False
    return row
