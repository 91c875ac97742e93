"""Rows of JSONL: what is accepted, what is refused and by which code, and that nothing is lost on the way."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocl.errors import DatasetInvalid
from pocl.samples.messages import MAX_MESSAGES
from pocl.samples.row_invalid import RowInvalid
from pocl.samples.rows import MAX_LINE_BYTES, MAX_REFERENCES, parse_row, parse_rows, read_samples
from pocl.samples.sample import Message, Sample
from pocl.samples.strict_json import MAX_DEPTH

ROW = {"instruction": "Why?", "input": "A text.", "output": "Because."}
LINE = json.dumps(ROW).encode()
SAMPLE = Sample((Message("user", "Why?"), Message("assistant", "Because.")), "A text.")

text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)
any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


def chat(*pairs: tuple[str, str]) -> bytes:
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in pairs]}).encode()


def refusal_code(line: bytes) -> str:
    with pytest.raises(RowInvalid) as refused:
        parse_row(line)
    assert refused.value.detail.endswith(".")
    return refused.value.code


def parse_outcomes(content: bytes) -> list[tuple[int, Sample | str]]:
    outcomes = parse_rows(io.BytesIO(content))
    return [(number, outcome if isinstance(outcome, Sample) else outcome.code) for number, outcome in outcomes]


@given(text, st.none() | st.text(st.characters(exclude_categories=["Cs"])), text | st.lists(text, min_size=1))
def test_instruction_row_keeps_its_text(instruction: str, context: str | None, output: str | list[str]) -> None:
    row = {"instruction": instruction, "input": context, "output": output}
    sample = parse_row(json.dumps(row, ensure_ascii=False).encode())
    assert sample.prompt_messages == (Message("user", instruction),)
    assert sample.context == (context or "")
    assert sample.references == ((output,) if isinstance(output, str) else tuple(output))


def test_input_may_be_absent() -> None:
    assert parse_row(b'{"instruction": "Why?", "output": "So."}').context == ""


@given(st.none() | text, st.lists(st.tuples(text, text), min_size=1, max_size=4))
def test_conversation_row_keeps_its_text(system: str | None, exchanges: list[tuple[str, str]]) -> None:
    pairs = [pair for asked, said in exchanges for pair in (("user", asked), ("assistant", said))]
    pairs = [("system", system), *pairs] if system else pairs
    sample = parse_row(chat(*pairs))
    assert [(message.role, message.content) for message in sample.conversation] == pairs
    assert sample.references == (pairs[-1][1],)
    assert sample.turns == len(exchanges)


@given(st.dictionaries(st.text(), any_json))
def test_further_columns_are_ignored_whatever_they_hold(columns: dict[str, Any]) -> None:
    line = json.dumps({**columns, "topic": {"a": [1]}, **ROW}).encode()
    if "messages" not in columns:
        assert parse_row(line) == SAMPLE


@given(any_json)
def test_any_json_is_parsed_or_refused(value: object) -> None:
    rows = (value, {"instruction": value, "output": value}, {"messages": value}, {"messages": [value, value]})
    lines = b"\n".join(json.dumps(row).encode() for row in rows)
    assert len(parse_outcomes(lines)) == len(rows)


@given(st.binary(max_size=200))
def test_any_bytes_are_parsed_or_refused(line: bytes) -> None:
    assert refusal_code(line) in ("not_utf8", "not_json", "not_an_object", "form_unknown")


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b'{"instruction": "a", "output": "b\xff"}', "not_utf8"),
        (b"\xff\xfe{\x00}\x00", "not_utf8"),
        (b'{"instruction": "a", "output": "b"', "not_json"),
        (b'{"instruction": "a", "output": "b"} {}', "not_json"),
        (b'{"instruction": "a", "output": "b", "x": NaN}', "not_json"),
        (b'{"instruction": "a", "output": "b", "x": -Infinity}', "not_json"),
        (b'{"instruction": "a", "output": "\\ud800"}', "not_json"),
        (b'{"instruction": "a", "output": "b", "x": {"k": 1, "k": 1}}', "duplicate_key"),
        (b'{"instruction": "a", "output": "b", "output": "c"}', "duplicate_key"),
        (b'["instruction", "output"]', "not_an_object"),
        (b"1", "not_an_object"),
        (b"{}", "form_unknown"),
        (b'{"prompt": "a", "completion": "b"}', "form_unknown"),
        (b'{"instruction": "a", "output": "b", "messages": []}', "form_unknown"),
        (b'{"instruction": "a"}', "missing"),
        (b'{"output": "b"}', "missing"),
        (b'{"instruction": "a", "output": null}', "wrong_type"),
        (b'{"instruction": 1.5, "output": "b"}', "wrong_type"),
        (b'{"instruction": "a", "input": true, "output": "b"}', "wrong_type"),
        (b'{"instruction": "a", "output": ["b", {}]}', "wrong_type"),
        (b'{"instruction": " \\n", "output": "b"}', "empty"),
        (b'{"instruction": "a", "output": ""}', "empty"),
        (b'{"instruction": "a", "output": []}', "empty"),
        (b'{"instruction": "a", "output": ["b", " "]}', "empty"),
        (b'{"messages": {}}', "wrong_type"),
        (b'{"messages": ["hi"]}', "wrong_type"),
        (b'{"messages": [{"role": "user", "content": ["hi"]}]}', "wrong_type"),
        (b'{"messages": [{"role": "user"}]}', "missing"),
        (b'{"messages": [{"role": "tool", "content": "x"}]}', "roles_out_of_order"),
        (b'{"messages": [{"role": ["user"], "content": "x"}]}', "role_unknown"),
        (b'{"messages": []}', "roles_out_of_order"),
        (chat(("system", "s")), "roles_out_of_order"),
        (chat(("user", "u")), "roles_out_of_order"),
        (chat(("user", "u"), ("assistant", "")), "empty"),
        (chat(*[("user", "u"), ("assistant", "a")] * (MAX_MESSAGES // 2 + 1)), "too_many"),
        (json.dumps({**ROW, "output": ["b"] * (MAX_REFERENCES + 1)}).encode(), "too_many"),
    ],
)
def test_invalid_row_is_refused_with_its_code(line: bytes, code: str) -> None:
    assert refusal_code(line) == code


def test_error_does_not_repeat_the_text_of_the_row() -> None:
    for line in (b'{"instruction": 1.5, "output": "hush"}', b'{"instruction": "a", "output": "hush"', b'"hush"'):
        with pytest.raises(RowInvalid) as refused:
            parse_row(line)
        assert "hush" not in str(refused.value)


def nested(depth: int) -> bytes:
    return b'{"instruction": "a", "output": "b", "x": ' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"


def test_nesting_is_bounded_and_brackets_in_strings_do_not_count() -> None:
    assert parse_row(nested(MAX_DEPTH)).references == ("b",)
    assert refusal_code(nested(MAX_DEPTH + 1)) == "nested_too_deeply"
    assert refusal_code(b"[" * 100_000) == "nested_too_deeply"
    code = 'f(x[0], "[[[' + "[" * 100 + '\\"{")'
    assert parse_row(json.dumps({**ROW, "output": code}).encode()).references == (code,)


def of_length(size: int) -> bytes:
    start = b'{"instruction": "a", "output": "'
    return start + b"b" * (size - len(start) - 2) + b'"}'


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
def test_length_of_a_line_is_bounded_without_its_end(end: bytes) -> None:
    fits, long = of_length(MAX_LINE_BYTES), of_length(MAX_LINE_BYTES + 1)
    assert parse_row(fits + end)
    assert refusal_code(long + end) == "line_too_long"
    assert parse_outcomes(fits + end) == [(1, parse_row(fits))]
    assert parse_outcomes(long + end) == [(1, "line_too_long")]


@pytest.mark.parametrize("excess", [1, 2, 3, 4, 5, 6, 100, MAX_LINE_BYTES, 3 * MAX_LINE_BYTES])
def test_overlong_line_does_not_affect_the_others(excess: int) -> None:
    content = LINE + b"\n" + of_length(MAX_LINE_BYTES + excess) + b"\n\n" + LINE
    assert parse_outcomes(content) == [(1, SAMPLE), (2, "line_too_long"), (4, SAMPLE)]


def test_byte_order_mark_is_accepted_at_the_start_only() -> None:
    mark = b"\xef\xbb\xbf"
    assert parse_outcomes(mark + LINE + b"\n" + mark + LINE) == [(1, SAMPLE), (2, "not_json")]
    assert parse_outcomes(mark + of_length(MAX_LINE_BYTES) + b"\r\n")[0][1] == parse_row(of_length(MAX_LINE_BYTES))


def test_line_ends_of_both_kinds_and_blank_lines_are_accepted() -> None:
    assert parse_outcomes(b"\r\n" + LINE + b"\r\n \n" + LINE + b"\n\n") == [(2, SAMPLE), (4, SAMPLE)]


def test_unicode_line_separator_in_a_string_does_not_end_the_line() -> None:
    row = {**ROW, "output": "one\u2028two\x85three"}
    ((_, sample),) = parse_rows(io.BytesIO(json.dumps(row, ensure_ascii=False).encode()))
    assert isinstance(sample, Sample)
    assert sample.references == (row["output"],)


@given(st.lists(st.sampled_from([LINE, b'{"output": "b"}', b"", b"\xff"])))
def test_every_line_that_is_not_blank_has_one_outcome(lines: list[bytes]) -> None:
    numbers = [number for number, _ in parse_outcomes(b"\n".join(lines))]
    assert numbers == [number for number, line in enumerate(lines, start=1) if line]


def test_digest_depends_on_content_alone() -> None:
    columns = {"topic": "x", "output": "Because.", "input": "A text.", "instruction": "Why?"}
    assert parse_row(json.dumps(columns, indent=None, ensure_ascii=False).encode()).digest == parse_row(LINE).digest
    others = [{**ROW, "instruction": "How?"}, {**ROW, "input": ""}, {**ROW, "output": ["Because.", "So."]}]
    digests = {parse_row(json.dumps(row).encode()).digest for row in (ROW, *others)}
    assert len(digests) == 4


def test_digest_is_stable_across_versions() -> None:
    # Stored rankings refer to it, so it must not change from one version to the next.
    assert SAMPLE.digest == "898978659da24dd181d4060f93d5ae2a86357d404c76975aed50423c32208e77"


@given(
    st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=6).flatmap(
        lambda rows: st.tuples(st.just(rows), st.permutations(rows))
    )
)
def test_samples_of_equal_content_are_interchangeable_in_an_order_by_digest(pair: tuple[list[str], list[str]]) -> None:
    one, other = (
        sorted(
            (Sample((Message("user", said), Message("assistant", "x"))) for said in rows),
            key=lambda sample: sample.digest,
        )
        for rows in pair
    )
    assert one == other


def test_samples_are_read_in_file_order(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(json.dumps({**ROW, "instruction": str(n)}).encode() for n in range(30)))
    assert [sample.conversation[0].content for sample in read_samples(path)] == [str(n) for n in range(30)]


def test_invalid_lines_are_counted_and_the_first_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(LINE + b"\n" + b"{}\n" * 25)
    with pytest.raises(DatasetInvalid) as refused:
        read_samples(path)
    message = refused.value.message
    assert message.startswith("25 of 26 rows of the data file are invalid: line 2: ")
    assert "line 21" in message
    assert "line 22" not in message
    assert message.endswith("and 5 more.")
    assert str(tmp_path) not in message


def test_file_without_rows_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n \n")
    with pytest.raises(DatasetInvalid, match="no usable row"):
        read_samples(path)


def test_unreadable_file_is_refused_without_its_path(tmp_path: Path) -> None:
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(DatasetInvalid) as refused:
            read_samples(path)
        assert str(tmp_path) not in refused.value.message


@pytest.mark.system
def test_reading_samples_imports_neither_torch_nor_transformers() -> None:
    check = "import sys, pocl.samples.rows; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
