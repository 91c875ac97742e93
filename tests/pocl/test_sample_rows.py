"""Rows as lines of JSON: what is refused and by which code, what is bounded, and what digests depend on."""

import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocl.errors import DatasetInvalid
from pocl.samples.file_formats import MAX_ROW_BYTES, parse_line
from pocl.samples.forms import MAX_REFERENCES, parse_fields
from pocl.samples.messages import MAX_MESSAGES
from pocl.samples.reading import read_sample_file, read_samples
from pocl.samples.row_invalid import RowInvalid
from pocl.samples.sample import Message, Sample, ToolCall
from pocl.samples.strict_json import MAX_DEPTH
from pocl.spec import ReadOptions

ROW = {"instruction": "Why?", "input": "A text.", "output": "Because."}
LINE = json.dumps(ROW).encode()
SAMPLE = Sample((Message("user", "Why?"), Message("assistant", "Because.")), "A text.")

any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


def parse(line: bytes) -> Sample:
    return parse_fields(parse_line(line), ReadOptions()).sample


def chat(*pairs: tuple[str, str]) -> bytes:
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in pairs]}).encode()


def refusal_code(line: bytes) -> str:
    with pytest.raises(RowInvalid) as refused:
        parse(line)
    assert refused.value.detail.endswith(".")
    return refused.value.code


def bad_lines(path: Path, content: bytes) -> list[tuple[str, str]]:
    """The lines that are no samples, by number and code."""
    path.write_bytes(content)
    _, report = read_sample_file(path, ReadOptions(on_bad_rows="skip"))
    return [(error.pointer, error.code) for error in report.bad_rows]


@given(any_json)
def test_any_json_is_parsed_or_refused(value: object) -> None:
    for row in (value, {"instruction": value, "output": value}, {"messages": value}, {"messages": [value, value]}):
        with suppress(RowInvalid):
            parse(json.dumps(row).encode())


@given(st.binary(max_size=200))
def test_any_bytes_are_parsed_or_refused(line: bytes) -> None:
    assert refusal_code(line) in ("not_utf8", "not_json", "not_an_object", "form_unknown")


def said(role: str, content: Any = "x", **fields: Any) -> bytes:
    """A conversation whose second message has these fields."""
    messages = [{"role": "user", "content": "u"}, {"role": role, "content": content, **fields}]
    return json.dumps({"messages": [*messages, {"role": "assistant", "content": "a"}]}).encode()


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b'{"instruction": "a", "output": "b\xff"}', "not_utf8"),
        (b"\xff\xfe{\x00}\x00", "not_utf8"),
        (b'{"instruction": "a", "output": "b"', "not_json"),
        (b'{"instruction": "a", "output": "b"} {}', "not_json"),
        (b'{"instruction": "a", "output": "b", "x": NaN}', "not_json"),
        (b'{"instruction": "a", "output": "b", "x": -Infinity}', "not_json"),
        (b'{"instruction": "a", "output": "b", "x": ' + b"9" * 5000 + b"}", "not_json"),
        (b'{"instruction": "a", "output": "\\ud800"}', "not_json"),
        (b'{"instruction": "a", "output": "b", "x": {"k": 1, "k": 1}}', "duplicate_key"),
        (b'{"instruction": "a", "output": "b", "output": "c"}', "duplicate_key"),
        (b'["instruction", "output"]', "not_an_object"),
        (b"1", "not_an_object"),
        (b"{}", "form_unknown"),
        (b'{"text": "a"}', "form_unknown"),
        (b'{"data": [{"instruction": "a", "output": "b"}]}', "form_unknown"),
        (b'{"instruction": "a", "output": "b", "messages": [{"role": "user", "content": "c"}]}', "form_unknown"),
        (b'{"instruction": "a", "prompt": "a", "output": "b"}', "form_unknown"),
        (b'{"prompt": "a", "completion": "b", "response": "c"}', "ambiguous"),
        (b'{"question": "a", "context": "b", "input": "c", "answer": "d"}', "ambiguous"),
        (b'{"system": "s", "messages": [{"role": "system", "content": "t"}]}', "ambiguous"),
        (b'{"output": "b"}', "missing"),
        (b'{"instruction": 1.5, "output": "b"}', "wrong_type"),
        (b'{"instruction": "a", "input": true, "output": "b"}', "wrong_type"),
        (b'{"instruction": "a", "output": ["b", 1.5]}', "wrong_type"),
        (b'{"instruction": ["a"], "output": "b"}', "wrong_type"),
        (b'{"instruction": " \\n", "output": "b"}', "empty"),
        (b'{"instruction": "a", "output": ""}', "empty"),
        (b'{"instruction": "a", "output": []}', "empty"),
        (b'{"instruction": "a", "output": ["b", " "]}', "empty"),
        (b'{"instruction": "a", "output": "b", "history": [["c"]]}', "wrong_type"),
        (b'{"prompt": "a", "completion": [{"role": "user", "content": "b"}]}', "missing"),
        (b'{"messages": {}}', "wrong_type"),
        (b'{"messages": "no JSON"}', "wrong_type"),
        (b'{"messages": ["hi"]}', "wrong_type"),
        (b'{"messages": [{"role": "user", "content": ["hi"]}]}', "wrong_type"),
        (b'{"messages": [{"role": "user"}]}', "missing"),
        (b'{"messages": [{"role": "tool", "content": "x"}]}', "roles_out_of_order"),
        (b'{"messages": [{"role": ["user"], "content": "x"}]}', "role_unknown"),
        (b'{"messages": [{"role": "root", "content": "x"}]}', "role_unknown"),
        (b'{"messages": []}', "roles_out_of_order"),
        (chat(("system", "s")), "roles_out_of_order"),
        (chat(("user", "u"), ("assistant", "")), "empty"),
        (chat(("user", ""), ("assistant", "a")), "empty"),
        (chat(("user", "u"), ("tool", "t"), ("assistant", "a")), "roles_out_of_order"),
        (said("user", [{"type": "image_url", "image_url": {"url": "x"}}]), "not_text"),
        (said("user", tool_calls=[{"function": {"name": "f", "arguments": "{}"}}]), "roles_out_of_order"),
        (said("user", reasoning_content="hm"), "roles_out_of_order"),
        (said("assistant", tool_calls=[{"function": {"name": "f", "arguments": "no JSON"}}]), "wrong_type"),
        (said("assistant", tool_calls=[{"function": {"name": "f", "arguments": [1]}}]), "wrong_type"),
        (said("assistant", tool_calls=[{"type": "custom", "custom": {"name": "f"}}]), "wrong_type"),
        (said("assistant", weight=0.5), "weight_unknown"),
        (said("assistant", weight=0, train=True), "ambiguous"),
        (said("assistant", reasoning_content="one", thinking="two"), "ambiguous"),
        (said("assistant", value="y"), "ambiguous"),
        (
            b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]}',
            "nothing_to_train",
        ),
        (b'{"messages": [{"role": "assistant", "content": "b"}], "tools": ["f"]}', "wrong_type"),
        (b'{"messages": [{"role": "assistant", "content": "b"}], "tools": [{}], "functions": [{}]}', "ambiguous"),
        (b'{"conversation": [{"role": "assistant", "content": "b"}], "references": ["c"]}', "wrong_type"),
        (chat(*[("user", "u"), ("assistant", "a")] * (MAX_MESSAGES // 2 + 1)), "too_many"),
        (json.dumps({**ROW, "output": ["b"] * (MAX_REFERENCES + 1)}).encode(), "too_many"),
    ],
)
def test_invalid_row_is_refused_with_its_code(line: bytes, code: str) -> None:
    assert refusal_code(line) == code


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"{'instruction': 'a', 'output': 'b'}", "json.dumps"),
        (b'{"instruction": "a", "output": "b",}', "comma"),
        (b'{"instruction": "a", "input": NaN, "output": "b"}', "write null"),
        (b'{"instruction": "a", "output": "\\ud83d"}', "surrogate"),
        (b'{"instruction": "a", "output": "b\xe9"}', "save the file as UTF-8"),
        (b'{"instruction": "a", "output": "b", "x": 1e400}', "beyond 1.8e308"),
        (b'\xef\xbb\xbf{"instruction": "a", "output": "b"}', "byte-order mark"),
        (b'{"best": "b", "question_text": "a"}', "`columns`"),
        (said("user", [{"type": "image_url"}]), "image_url"),
    ],
)
def test_refusal_says_what_to_do(line: bytes, words: str) -> None:
    with pytest.raises(RowInvalid, match=words):
        parse(line)


def test_error_does_not_repeat_the_text_of_the_row() -> None:
    for line in (b'{"instruction": 1.5, "output": "hush"}', b'{"instruction": "a", "output": "hush"', b'"hush"'):
        with pytest.raises(RowInvalid) as refused:
            parse(line)
        assert "hush" not in str(refused.value)


def nested(depth: int) -> bytes:
    return b'{"instruction": "a", "output": "b", "x": ' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"


def test_nesting_is_bounded_and_brackets_in_strings_do_not_count() -> None:
    assert parse(nested(MAX_DEPTH)).references == ("b",)
    assert refusal_code(nested(MAX_DEPTH + 1)) == "nested_too_deeply"
    assert refusal_code(b"[" * 100_000) == "nested_too_deeply"
    code = 'f(x[0], "[[[' + "[" * 100 + '\\"{")'
    assert parse(json.dumps({**ROW, "output": code}).encode()).references == (code,)


def row_of_length(size: int) -> bytes:
    start = b'{"instruction": "a", "output": "'
    return start + b"b" * (size - len(start) - 2) + b'"}'


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
def test_length_of_a_line_is_bounded_without_its_end(tmp_path: Path, end: bytes) -> None:
    fits, long = row_of_length(MAX_ROW_BYTES), row_of_length(MAX_ROW_BYTES + 1)
    assert parse(fits + end)
    assert refusal_code(long + end) == "line_too_long"
    assert bad_lines(tmp_path / "rows", fits + end) == []
    assert bad_lines(tmp_path / "rows", LINE + b"\n" + long + end) == [("/lines/2", "line_too_long")]


@pytest.mark.parametrize("excess", [1, 2, 3, 4, 5, 6, 100, MAX_ROW_BYTES, 3 * MAX_ROW_BYTES])
def test_overlong_line_does_not_affect_the_others(tmp_path: Path, excess: int) -> None:
    content = LINE + b"\n" + row_of_length(MAX_ROW_BYTES + excess) + b"\n\n{}\n" + LINE
    assert bad_lines(tmp_path / "rows", content) == [("/lines/2", "line_too_long"), ("/lines/4", "form_unknown")]


def test_byte_order_mark_is_accepted_at_the_start_only(tmp_path: Path) -> None:
    mark = b"\xef\xbb\xbf"
    assert bad_lines(tmp_path / "rows", mark + LINE + b"\n" + mark + LINE) == [("/lines/2", "not_json")]
    assert bad_lines(tmp_path / "rows", mark + row_of_length(MAX_ROW_BYTES) + b"\r\n") == []


def test_line_ends_of_both_kinds_and_blank_lines_are_accepted(tmp_path: Path) -> None:
    content = b"\r\n" + LINE + b"\r\n \n" + LINE + b"\n\n{}"
    assert bad_lines(tmp_path / "rows", content) == [("/lines/6", "form_unknown")]


def test_unicode_line_separator_in_a_string_does_not_end_the_line(tmp_path: Path) -> None:
    row = {**ROW, "output": "one\u2028two\x85three"}
    (tmp_path / "rows").write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8")
    assert [sample.references for sample in read_samples(tmp_path / "rows")] == [(row["output"],)]


# --- Digests ----------------------------------------------------------------------------------------------


def test_digest_depends_on_content_alone() -> None:
    columns = {"topic": "x", "output": "Because.", "input": "A text.", "instruction": "Why?"}
    assert parse(json.dumps(columns).encode()).digest == parse(LINE).digest
    others = [{**ROW, "instruction": "How?"}, {**ROW, "input": ""}, {**ROW, "output": ["Because.", "So."]}]
    digests = {parse(json.dumps(row).encode()).digest for row in (ROW, *others)}
    assert len(digests) == 4


def test_digest_is_stable_across_versions() -> None:
    # Stored rankings refer to it, so it must not change from one version to the next.
    assert SAMPLE.digest == "898978659da24dd181d4060f93d5ae2a86357d404c76975aed50423c32208e77"


def test_every_field_of_a_sample_enters_its_digest() -> None:
    user, answer = Message("user", "Why?"), Message("assistant", "So.")
    call = ToolCall("f", "{}")
    variants = [
        Sample((user, answer)),
        Sample((user,)),
        Sample((user, answer), "A text."),
        Sample((user, answer), references=("So.", "Thus.")),
        Sample((user, answer), tools='[{"name":"f"}]'),
        Sample((user._replace(name="Ann"), answer)),
        Sample((user, answer._replace(reasoning="Hm."))),
        Sample((user, answer._replace(tool_calls=(call,)))),
        Sample((user, answer._replace(tool_calls=(call._replace(id="c1"),)))),
        Sample((user, answer._replace(tool_calls=(call._replace(arguments='{"a":1}'),)))),
        Sample((user, answer, user, answer)),
        Sample((user, answer._replace(train=False), user, answer)),
        Sample((user, answer, Message("tool", "1"), answer)),
        Sample((user, answer, Message("tool", "1", tool_call_id="c1"), answer)),
    ]
    assert len({sample.digest for sample in variants}) == len(variants)


def test_references_begin_with_what_the_assistant_says_last() -> None:
    with pytest.raises(ValueError, match="first reference"):
        Sample((Message("user", "Why?"), Message("assistant", "So.")), references=("Thus.",))
    with pytest.raises(ValueError, match="first reference"):
        Sample((Message("user", "Why?"),), references=("So.",))
    with pytest.raises(ValueError, match="has a message"):
        Sample(())


@given(
    st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=6).flatmap(
        lambda rows: st.tuples(st.just(rows), st.permutations(rows))
    )
)
def test_samples_of_equal_content_are_interchangeable_in_an_order_by_digest(pair: tuple[list[str], list[str]]) -> None:
    def ordered(rows: list[str]) -> list[Sample]:
        samples = [Sample((Message("user", content), Message("assistant", "x"))) for content in rows]
        return sorted(samples, key=lambda sample: sample.digest)

    assert ordered(pair[0]) == ordered(pair[1])


# --- Files of rows ----------------------------------------------------------------------------------------


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
    assert refused.value.summary.startswith("25 of 26 rows cannot be used; the first 20 are named.")
    assert len(refused.value.field_errors) == 20


def test_bad_rows_are_skipped_counted_and_named_on_request(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(LINE + b"\n" + b"{}\n" * 25 + LINE)
    samples, report = read_sample_file(path, ReadOptions(on_bad_rows="skip"))
    assert samples == [SAMPLE, SAMPLE]
    assert (report.rows, report.bad, len(report.bad_rows)) == (2, 25, 20)
    assert report.notes[0][0] == "rows_skipped"
    path.write_bytes(b"{}\n" * 3)
    with pytest.raises(DatasetInvalid, match="3 of 3"):
        read_sample_file(path, ReadOptions(on_bad_rows="skip"))


def test_file_without_rows_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for content in (b"", b"\n \n", b"\xef\xbb\xbf \r\n", b"[]", b"instruction,output\n"):
        path.write_bytes(content)
        with pytest.raises(DatasetInvalid, match="no usable row"):
            read_samples(path)


def test_unreadable_file_is_refused_without_its_path(tmp_path: Path) -> None:
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(DatasetInvalid) as refused:
            read_samples(path)
        assert str(tmp_path) not in refused.value.message


@pytest.mark.system
def test_reading_samples_imports_neither_torch_nor_transformers_nor_pyarrow() -> None:
    modules = "{'torch', 'transformers', 'pyarrow'}"
    check = f"import sys, pocl.samples.reading; sys.exit(bool({modules} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
