"""Rows of every form in which one field is odd: trained on as itself, named as ignored, or refused by line and code."""

import copy
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocl.errors import DatasetInvalid, FieldError
from pocl.samples.forms import LAST_ANSWER, parse_fields
from pocl.samples.messages import AFTER_LAST_ANSWER
from pocl.samples.reading import ReadReport, RowsInvalid, read_sample_file
from pocl.samples.sample import Sample
from pocl.spec import ReadOptions

_CALL = {"id": "call 5", "type": "function", "function": {"name": "f6", "arguments": {"a7": "b8", "n": 9}}}
_TALK = [
    {"role": "system", "content": "system 1"},
    {"role": "user", "content": [{"type": "text", "text": "user 2"}], "name": "Ann 3"},
    {"role": "assistant", "content": None, "reasoning_content": "thought 4", "tool_calls": [_CALL]},
    {"role": "tool", "tool_call_id": "call 5", "content": "result 10"},
    {"role": "assistant", "content": "answer 11", "weight": 1},
]
ROWS: dict[str, dict[str, Any]] = {
    "instruction": {
        "instruction": "question 1",
        "input": "text 2",
        "output": ["answer 3", "other 4"],
        "system": "system 5",
        "history": [["asked 6", "said 7"]],
        "reasoning": "thought 8",
        "difficulty": 0.5,
    },
    "prompt_completion": {
        "prompt": [{"role": "user", "content": "question 1"}],
        "completion": [{"role": "assistant", "content": "answer 2"}],
        "tools": [{"type": "function", "function": {"name": "f3"}}],
    },
    "query_response": {"query": "question 1", "context": "text 2", "response": "answer 3", "category": "open 4"},
    "messages": {"messages": _TALK, "tools": '[{"name": "f12"}]'},
    "sharegpt": {
        "conversations": [
            {"from": "human", "value": "question 1"},
            {"from": "function_call", "value": '{"name": "f2", "arguments": {"a": "b3"}}'},
            {"from": "observation", "value": "result 4"},
            {"from": "gpt", "value": "answer 5"},
        ],
        "system": "system 6",
    },
    "sample": {
        "conversation": [{"role": "user", "content": "question 1"}, {"role": "assistant", "content": "answer 2"}],
        "references": ["answer 2", "other 3"],
        "context": "text 4",
        "tools": '[{"name":"f5"}]',
    },
    "prompt_only": {"prompt": "question 1", "system": "system 2"},
}
# What is no JSON value, or one that programs read in several ways.
RAW = (
    *(
        '"\\ud800"',
        '"\\udc00x"',
        "NaN",
        "-Infinity",
        "1e400",
        "1e-400",
        "-0",
        "1E5",
        "9" * 400,
        "1" * 21,
    ),
    *('{"k": 1, "k": 2}', "[" * 40 + "]" * 40, "'a'", "tru", "", "0x1", "01", "1.", "\ufeff", '"\u2028"', '"\\u0000"'),
    *('"\ufeff"', '" "', '"null"', '"[]"', '"{}"', '[{"role": "user", "content": "more"}]', "[[]]", "[{}]", "[null]"),
    *('{"type": "text", "text": "part"}', '[{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]'),
)
any_json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
).map(json.dumps)
_MARK = "\x02mark\x02"
# Fields that say how others are read, and are themselves no text.
_CONTROLS = {"role", "from", "type", "weight", "train", "difficulty"}


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of all values within a row, keys and indices."""
    for key, each in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*path, key)
        yield from paths(each, (*path, key))


PLACES = [(form, path) for form, row in ROWS.items() for path in paths(row)]


@st.composite
def odd_lines(draw: st.DrawFn) -> tuple[str, tuple[Any, ...], str]:
    """The form of a row, the place of its odd field, and the row as a line."""
    form, path = draw(st.sampled_from(PLACES))
    row = copy.deepcopy(ROWS[form])
    holder: Any = row
    for key in path[:-1]:
        holder = holder[key]
    key = path[-1]
    kind = draw(st.sampled_from(["replaced", "replaced", "replaced", "raw", "raw", "missing", "twice"]))
    if kind == "missing":
        del holder[key]
        return form, path, json.dumps(row)
    odd = draw(any_json) if kind == "replaced" else draw(st.sampled_from(RAW))
    if kind == "twice" and isinstance(key, str):
        odd = f"{json.dumps(holder[key])}, {json.dumps(key)}: {odd}"
    holder[key] = _MARK
    return form, path, json.dumps(row).replace(json.dumps(_MARK), odd)


def scalars(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """All values within a row that are neither lists nor objects, with their places."""
    if isinstance(value, dict | list):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from scalars(each, (*path, key))
    else:
        yield path, value


def spellings(value: Any) -> Iterator[str]:
    """Every text that a value may be trained on as: it is itself one, or holds one, or is JSON."""
    if isinstance(value, str):
        yield value
        try:
            parsed = json.loads(value)
        except (ValueError, RecursionError):
            return
        if not isinstance(parsed, str):
            yield from spellings(parsed)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield str(value)
    elif isinstance(value, dict | list):
        yield json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        if isinstance(value, list):
            for field in ("text", "thinking"):
                parts = [str(part[field]) for part in value if isinstance(part, dict) and field in part]
                yield "".join(parts)
        for each in value.values() if isinstance(value, dict) else value:
            yield from spellings(each)


def texts_of(sample: Sample) -> list[str]:
    found = [sample.context, *sample.references, sample.tools]
    for message in sample.conversation:
        found += [message.content, message.reasoning or "", message.tool_call_id or "", message.name or ""]
        found += [text for call in message.tool_calls for text in (call.name, call.arguments, call.id or "")]
    return [text for text in found if text]


def read_line(line: str) -> tuple[list[Sample], ReadReport, Sequence[FieldError]]:
    """The samples of a file with this line, and what was found; or the errors for which it is refused."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "rows.jsonl"
        # The odd row is the second: whatever it is, the first one says how the file is read.
        path.write_text(f"{json.dumps(ROWS['messages'])}\n{line}\n", encoding="utf-8")
        try:
            return *read_sample_file(path), ()
        except RowsInvalid as refused:
            return [], refused.report, refused.field_errors


@given(odd_lines())
def test_odd_field_is_trained_on_as_itself_or_named_or_refused(odd: tuple[str, tuple[Any, ...], str]) -> None:
    form, _, line = odd
    samples, report, bad = read_line(line)
    if bad:
        assert {each.pointer for each in bad} == {"/lines/2"}, form
        assert all(each.code and each.detail.endswith(".") for each in bad)
        return
    row = json.loads(line)
    sample = samples[-1]
    kept = texts_of(sample)
    assert set(kept) <= {*spellings(row), "{}"}, "another text"
    cut = {AFTER_LAST_ANSWER, LAST_ANSWER} & set(report.ignored)
    for path, value in scalars(row):
        named = any(name == path[0] or name.startswith(f"{path[0]}[]") for name in report.ignored)
        is_nothing = value is None or (isinstance(value, str) and not value.strip())
        if is_nothing or cut or named or _CONTROLS & set(path):
            continue
        spelled = value if isinstance(value, str) else json.dumps(value)
        inside = json.dumps(spelled, ensure_ascii=False)[1:-1]
        assert any(spelled in text or inside in text for text in kept) or is_json_of(value, kept), (path, value)


def is_json_of(value: Any, kept: list[str]) -> bool:
    """Whether a text of JSON is kept as what it says."""
    if not isinstance(value, str):
        return False
    try:
        inner = [each for _, each in scalars(json.loads(value))]
    except (ValueError, RecursionError):
        return False
    return all(any(str(each) in text for text in kept) for each in inner if isinstance(each, str))


@pytest.mark.parametrize("form", ROWS)
def test_rows_are_of_their_forms_and_nothing_of_them_is_lost(form: str) -> None:
    parsed = parse_fields(ROWS[form], ReadOptions())
    assert parsed.form == form
    kept = texts_of(parsed.sample)
    for path, value in scalars(ROWS[form]):
        if isinstance(value, str) and not _CONTROLS & set(path) and path[0] not in parsed.ignored:
            assert any(value in text for text in kept) or is_json_of(value, kept)


def test_file_of_odd_bytes_alone_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for raw in RAW:
        path.write_text(raw, encoding="utf-8")
        with pytest.raises(DatasetInvalid):
            read_sample_file(path)
