"""From the rows of a JSONL file to validated samples.

A row is one line of the file and has one of two forms; further columns are ignored, whatever they hold, as long as
the line is valid:

    {"instruction": "...", "input": "...", "output": "..." or ["...", "..."]}
    {"messages": [{"role": "system" | "user" | "assistant", "content": "..."}, ...]}

`input` may be absent, null or empty. `messages` may begin with one system message; then user and assistant
alternate, and the assistant has the last turn. Text is kept as it is, byte for byte. JSON is strict: no NaN or
Infinity, no key twice in one object, no lone surrogate, nesting and length bounded.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, cast

import orjson

from pocl.errors import DatasetInvalid

MAX_LINE_BYTES = 1 << 20
MAX_DEPTH = 32
"""The deepest nesting of objects and arrays in one row."""
MAX_MESSAGES = 256
MAX_REFERENCES = 256
MAX_NAMED = 20
"""The most invalid lines that an error names."""

Role = Literal["system", "user", "assistant"]
RowCode = Literal[
    "line_too_long",
    "not_utf8",
    "not_json",
    "nested_too_deeply",
    "duplicate_key",
    "not_an_object",
    "form_unknown",
    "missing",
    "wrong_type",
    "empty",
    "too_many",
    "role_unknown",
    "roles_out_of_order",
]
_BOM = b"\xef\xbb\xbf"
# With the closing quote optional, an unterminated string is matched once and not tried again at each of its quotes.
_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?', re.DOTALL)
_BRACKET = re.compile(r"[\[\]{}]")


class Message(NamedTuple):
    """One message of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True)
class Sample:
    """One training example: a conversation and the reference answers to it.

    Samples of equal content are equal and have the same digest: they are interchangeable, so an order that
    breaks ties by the digest is total and does not depend on positions in the file.
    """

    messages: tuple[Message, ...]
    """All messages before the answer: an optional system message, then user and assistant in turn, a user last."""
    context: str
    """The `input` of an instruction; empty otherwise."""
    references: tuple[str, ...]
    """The reference answers, at least one; the first is trained on, all count in evaluation."""
    digest: str = field(init=False)
    """SHA-256, hexadecimal, of the fields above in canonical JSON."""

    def __post_init__(self) -> None:
        content = json.dumps([self.messages, self.context, self.references], separators=(",", ":"))
        object.__setattr__(self, "digest", hashlib.sha256(content.encode("ascii")).hexdigest())

    @property
    def turns(self) -> int:
        """The number of assistant turns, the answer included."""
        return 1 + sum(message.role == "assistant" for message in self.messages)


class RowInvalid(ValueError):
    """A row is no sample; `code` is stable, and `detail` is a sentence that does not repeat the row's text."""

    def __init__(self, code: RowCode, detail: str) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail


def parse_row(line: bytes) -> Sample:
    """Parse one row, with or without its line end.

    Raises:
        RowInvalid: the row is no sample.
    """
    row = _strict_object(line)
    if "messages" not in row:
        return _from_instruction(row)
    if "instruction" in row or "output" in row:
        raise RowInvalid("form_unknown", "The row has messages and instruction or output; give one form.")
    return _from_messages(row["messages"])


def parse_rows(stream: BinaryIO) -> Iterator[tuple[int, Sample | RowInvalid]]:
    """Parse a JSONL stream: the outcome of each line that is not blank, with the line's number counted from 1.

    One line is in memory at a time, and of a line beyond the limit only its beginning. A byte-order mark at the start
    and CRLF line ends are accepted.
    """
    number = 0
    limit = len(_BOM) + MAX_LINE_BYTES + len(b"\r\n")
    while line := stream.readline(limit):
        number += 1
        if len(line) == limit and not line.endswith(b"\n"):
            _skip_rest_of_line(stream)
            yield number, _too_long()
            continue
        if number == 1:
            line = line.removeprefix(_BOM)
        if line.strip():
            yield number, _sample_or_error(line)


def read_samples(path: Path) -> list[Sample]:
    """Read all samples of a JSONL file, in file order; blank lines are ignored.

    Raises:
        DatasetInvalid: if the file cannot be read, has no row, or any row is invalid; it counts the invalid
            lines and names the first of them.
    """
    samples: list[Sample] = []
    named: list[str] = []
    invalid = 0
    try:
        with path.open("rb") as stream:
            for number, outcome in parse_rows(stream):
                if isinstance(outcome, Sample):
                    samples.append(outcome)
                    continue
                invalid += 1
                if len(named) < MAX_NAMED:
                    named.append(f"line {number}: {outcome.detail.rstrip('.')} ({outcome.code})")
    except OSError as error:
        raise DatasetInvalid(f"The data file cannot be read: {error.strerror or 'input/output error'}.") from error
    if invalid:
        more = f"; and {invalid - len(named)} more" if invalid > len(named) else ""
        rows = invalid + len(samples)
        raise DatasetInvalid(f"{invalid} of {rows} rows of the data file are invalid: {'; '.join(named)}{more}.")
    if not samples:
        raise DatasetInvalid
    return samples


def _skip_rest_of_line(stream: BinaryIO) -> None:
    while (rest := stream.readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
        pass


def _sample_or_error(line: bytes) -> Sample | RowInvalid:
    try:
        return parse_row(line)
    except RowInvalid as error:
        return error


def _too_long() -> RowInvalid:
    return RowInvalid("line_too_long", f"The line has more than {MAX_LINE_BYTES} bytes.")


def _strict_object(line: bytes) -> dict[str, Any]:  # Any: a row may hold whatever JSON can.
    if len(line.rstrip(b"\r\n")) > MAX_LINE_BYTES:
        raise _too_long()
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError:
        raise RowInvalid("not_utf8", "The line is not UTF-8.") from None
    if _nested_too_deeply(text):
        raise RowInvalid("nested_too_deeply", f"The row is nested more than {MAX_DEPTH} deep.")
    try:
        # orjson refuses NaN, Infinity, lone surrogates and control characters, but takes the last of equal keys.
        row = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise RowInvalid("not_json", f"The line is not strict JSON: column {error.colno}.") from None
    json.loads(text, object_pairs_hook=_refuse_duplicates, parse_int=str, parse_float=str)
    if not isinstance(row, dict):
        raise RowInvalid("not_an_object", "The row is not a JSON object.")
    return row


def _nested_too_deeply(text: str) -> bool:
    # Nesting is checked before parsing, because parsers recurse. Few brackets in all cannot nest too deeply.
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return False
    depth = 0
    for bracket in _BRACKET.findall(_STRING.sub("", text)):
        depth += 1 if bracket in "[{" else -1
        if depth > MAX_DEPTH:
            return True
    return False


def _refuse_duplicates(pairs: list[tuple[str, object]]) -> None:
    keys = [key for key, _ in pairs]
    if len(set(keys)) < len(keys):
        duplicate = next(key for index, key in enumerate(keys) if key in keys[:index])
        raise RowInvalid("duplicate_key", f"The key {duplicate[:40]!r} occurs twice in one object.")


def _from_instruction(row: dict[str, Any]) -> Sample:
    if "instruction" not in row and "output" not in row:
        raise RowInvalid("form_unknown", "The row has neither instruction and output nor messages.")
    instruction = _text(row, "instruction")
    context = row.get("input")
    if context is not None and not isinstance(context, str):
        raise RowInvalid("wrong_type", "input is not a string.")
    return Sample((Message("user", instruction),), context or "", _references(row))


def _references(row: dict[str, Any]) -> tuple[str, ...]:
    output = row.get("output")
    if not isinstance(output, list):
        return (_text(row, "output"),)
    if len(output) > MAX_REFERENCES:
        raise RowInvalid("too_many", f"output has more than {MAX_REFERENCES} references.")
    if not output:
        raise RowInvalid("empty", "output is empty.")
    return tuple(_non_empty_text(reference, f"output[{index}]") for index, reference in enumerate(output))


def _from_messages(raw: object) -> Sample:
    if not isinstance(raw, list):
        raise RowInvalid("wrong_type", "messages is not a list.")
    if len(raw) > MAX_MESSAGES:
        raise RowInvalid("too_many", f"The row has more than {MAX_MESSAGES} messages.")
    messages = [_message(message, index) for index, message in enumerate(raw)]
    turns = messages[1:] if messages and messages[0].role == "system" else messages
    expected = ("user", "assistant")
    if not turns or len(turns) % 2 or any(turn.role != expected[i % 2] for i, turn in enumerate(turns)):
        raise RowInvalid(
            "roles_out_of_order", "After an optional system message, user and assistant take turns and the latter ends."
        )
    return Sample(tuple(messages[:-1]), "", (messages[-1].content,))


def _message(raw: object, index: int) -> Message:
    where = f"messages[{index}]"
    if not isinstance(raw, dict):
        raise RowInvalid("wrong_type", f"{where} is not an object.")
    role = raw.get("role")
    if role not in ("system", "user", "assistant"):
        raise RowInvalid("role_unknown", f"{where}.role is not system, user or assistant.")
    return Message(cast(Role, role), _text(raw, "content", f"{where}.content"))


def _text(row: dict[str, Any], key: str, where: str | None = None) -> str:
    where = where or key
    if key not in row:
        raise RowInvalid("missing", f"{where} is missing.")
    return _non_empty_text(row[key], where)


def _non_empty_text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise RowInvalid("wrong_type", f"{where} is not a string.")
    if not value.strip():
        raise RowInvalid("empty", f"{where} is empty.")
    return value
