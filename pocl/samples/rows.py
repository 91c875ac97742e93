"""From the rows of a JSONL file to validated samples.

A row is one line of the file and has one of two forms; further columns are ignored, whatever they hold, as long as
the line is valid:

    {"instruction": "...", "input": "...", "output": "..." or ["...", "..."]}
    {"messages": [{"role": "system" | "user" | "assistant", "content": "..."}, ...]}

`input` may be absent, null or empty. `messages` may begin with one system message; then user and assistant
alternate, and the assistant has the last turn. Text is kept as it is, byte for byte. JSON is strict: no NaN or
Infinity, no key twice in one object, no lone surrogate, nesting and length bounded.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

from pocl.errors import DatasetInvalid
from pocl.samples.difficulty import difficulty_of
from pocl.samples.messages import parse_messages, parse_tools, to_last_answer
from pocl.samples.row_invalid import RowInvalid
from pocl.samples.sample import Message, Sample
from pocl.samples.strict_json import parse_strict
from pocl.samples.values import filled_text, text_of

MAX_LINE_BYTES = 1 << 20
MAX_REFERENCES = 256
MAX_NAMED = 20
"""The most invalid lines that an error names."""

_BOM = b"\xef\xbb\xbf"


def parse_row(line: bytes) -> Sample:
    """Parse one row, with or without its line end.

    Raises:
        RowInvalid: the row is no sample.
    """
    row = _strict_object(line)
    if "messages" not in row:
        return replace(_from_instruction(row), difficulty=difficulty_of(row))
    if "instruction" in row or "output" in row:
        raise RowInvalid("form_unknown", "The row has messages and instruction or output; give one form.")
    return replace(_from_messages(row), difficulty=difficulty_of(row))


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
    row = parse_strict(text)
    if not isinstance(row, dict):
        raise RowInvalid("not_an_object", "The row is not a JSON object.")
    return row


def _from_instruction(row: dict[str, Any]) -> Sample:
    if "instruction" not in row and "output" not in row:
        raise RowInvalid("form_unknown", "The row has neither instruction and output nor messages.")
    instruction = _text(row, "instruction")
    context = "" if row.get("input") is None else text_of(row["input"], "input")
    references = _references(row)
    return Sample((Message("user", instruction), Message("assistant", references[0])), context, references)


def _references(row: dict[str, Any]) -> tuple[str, ...]:
    output = row.get("output")
    if not isinstance(output, list):
        return (_text(row, "output"),)
    if len(output) > MAX_REFERENCES:
        raise RowInvalid("too_many", f"output has more than {MAX_REFERENCES} references.")
    if not output:
        raise RowInvalid("empty", "output is empty.")
    return tuple(filled_text(reference, f"output[{index}]") for index, reference in enumerate(output))


def _from_messages(row: dict[str, Any]) -> Sample:
    messages = to_last_answer(parse_messages(row["messages"], "messages", []), [])
    if messages[-1].role != "assistant":
        raise RowInvalid("roles_out_of_order", "The conversation has no answer of the assistant.")
    return Sample(messages, tools=parse_tools(row.get("tools"), "tools"))


def _text(row: dict[str, Any], key: str) -> str:
    if key not in row:
        raise RowInvalid("missing", f"{key} is missing.")
    return filled_text(row[key], key)
