"""Forms of rows: nothing of a row is lost in silence, what each form means, and that stored samples are read back."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocl.samples.file_formats import parse_line
from pocl.samples.forms import ParsedRow, parse_fields
from pocl.samples.messages import AFTER_LAST_ANSWER
from pocl.samples.row_invalid import RowInvalid
from pocl.samples.sample import Message, Sample, ToolCall
from pocl.samples.stored import STORED, stored_line
from pocl.spec import ReadOptions

# --- Rows of every form, each text in them unique -----------------------------------------------------------

ROLES = (
    "system",
    "developer",
    "user",
    "human",
    "User",
    "assistant",
    "gpt",
    "model",
    "tool",
    "observation",
    "function_call",
)
COLUMNS = (
    *("instruction", "prompt", "query", "question", "input", "Input", "context", "system", "history", "tools"),
    *("output", "response", "answer", "completion", "messages", "conversations", "conversation", "references"),
    *("category", "source", "text", "id", "weight", "difficulty", "reasoning", "thinking", "cot"),
)


class Texts:
    """Texts that occur once in a row, so that each can be found again."""

    def __init__(self) -> None:
        self.count = 0

    def next(self) -> str:
        self.count += 1
        return f'«{self.count} \n"é»'


@st.composite
def messages(draw: st.DrawFn, texts: Texts) -> list[dict[str, Any]]:
    """A list of messages: most of them well formed, with fields that are known and some that are not."""
    keys = draw(st.sampled_from([("role", "content"), ("from", "value")]))
    listed: list[dict[str, Any]] = []
    for _ in range(draw(st.integers(1, 5))):
        role = draw(st.sampled_from(ROLES))
        content: Any = texts.next()
        if role == "function_call":
            content = json.dumps({"name": "f", "arguments": {"a": texts.next()}})
        elif draw(st.integers(0, 4)) == 0:
            content = [{"type": draw(st.sampled_from(["text", "text", "thinking", "image_url"])), "text": texts.next()}]
        message: dict[str, Any] = {keys[0]: role, keys[1]: content}
        if role in ("assistant", "gpt", "model") and draw(st.booleans()):
            message["reasoning_content"] = texts.next()
        if role == "assistant" and draw(st.integers(0, 2)) == 0:
            arguments: Any = {"a": texts.next()}
            function = {"name": texts.next(), "arguments": draw(st.sampled_from([arguments, json.dumps(arguments)]))}
            message["tool_calls"] = [{"id": texts.next(), "type": "function", "function": function}]
        for field in draw(
            st.lists(st.sampled_from(["name", "weight", "train", "tool_call_id", "refusal"]), max_size=2)
        ):
            message[field] = draw(st.sampled_from([0, 1])) if field in ("weight", "train") else texts.next()
        listed.append(message)
    return listed


@st.composite
def rows(draw: st.DrawFn) -> dict[str, Any]:
    """A row with some columns of some forms."""
    texts = Texts()
    row: dict[str, Any] = {}
    for column in draw(st.lists(st.sampled_from(COLUMNS), min_size=1, max_size=6, unique=True)):
        if column in ("messages", "conversations", "conversation") or (
            column in ("prompt", "completion") and draw(st.booleans())
        ):
            row[column] = draw(messages(texts))
        elif column == "history":
            row[column] = [[texts.next(), texts.next()]]
        elif column == "tools":
            row[column] = [{"name": texts.next()}]
        elif column == "output" and draw(st.booleans()):
            row[column] = [texts.next(), texts.next()]
        else:
            row[column] = draw(st.sampled_from([texts.next(), texts.next(), texts.next(), None, 7, 0.5]))
    return row


def everything_in(sample: Sample) -> str:
    parts: list[Any] = [sample.context, sample.references, sample.tools]
    for message in sample.conversation:
        parts += [message.content, message.reasoning, message.tool_call_id, message.name]
        parts += [[call.name, call.arguments, call.id] for call in message.tool_calls]
    return str(parts)


def read(row: dict[str, Any], **options: Any) -> ParsedRow:
    return parse_fields(parse_line(json.dumps(row).encode()), ReadOptions(**options))


def numbers_in(row_part: Any) -> set[str]:
    """The numbers of the unique texts in a part of a row."""
    return {piece.split(" ")[0] for piece in json.dumps(row_part, ensure_ascii=False).split("«")[1:]}


@given(rows(), st.sampled_from([None, None, None, "instruction", "messages", "prompt_only"]))
def test_every_text_of_a_row_is_in_its_sample_or_named_as_ignored(row: dict[str, Any], form: Any) -> None:
    try:
        parsed = read(row, form=form)
    except RowInvalid:
        return
    kept = numbers_in(everything_in(parsed.sample))
    for column, value in row.items():
        lost = numbers_in(value) - kept
        # A whole column is named by its name, what is inside of messages by the place of the field, and cut messages by
        # what they stand behind.
        named = [name for name in parsed.ignored if name == column or name.startswith(f"{column}[]")]
        cut = {AFTER_LAST_ANSWER, "the last answer"} & set(parsed.ignored)
        assert not lost or named or cut, (column, lost, parsed.ignored)


@given(rows(), st.sampled_from([None, None, "prompt_only"]))
def test_stored_samples_are_read_back_without_loss(row: dict[str, Any], form: Any) -> None:
    try:
        sample = read(row, form=form).sample
    except RowInvalid:
        return
    again = parse_fields(parse_line(stored_line(sample), 1 << 24), STORED)
    assert again == ParsedRow(sample, "sample", ())
    assert again.sample.digest == sample.digest
    assert stored_line(again.sample) == stored_line(sample)


# --- What each form means -----------------------------------------------------------------------------------

U, A = Message("user", "Why?"), Message("assistant", "So.")
CALL = ToolCall("sky", '{"at":"noon"}', "c1")
PARSED: list[tuple[dict[str, Any], str, Sample]] = [
    ({"instruction": "Why?", "output": "So."}, "instruction", Sample((U, A))),
    ({"instruction": "Why?", "context": "A text.", "response": "So."}, "instruction", Sample((U, A), "A text.")),
    ({"instruction": "Why?", "Input": "A text.", "output": "So."}, "instruction", Sample((U, A), "A text.")),
    ({"instruction": "", "input": "Why?", "output": "So."}, "query_response", Sample((U, A))),
    ({"instruction": "Why?", "output": 42}, "instruction", Sample((U, Message("assistant", "42")))),
    ({"instruction": "Why?", "output": ["So.", "Thus."]}, "instruction", Sample((U, A), references=("So.", "Thus."))),
    ({"instruction": "Why?", "output": "So.", "messages": None, "system": ""}, "instruction", Sample((U, A))),
    (
        {"instruction": "Why?", "output": "So.", "system": "Be brief.", "history": [["One?", "Two."]]},
        "instruction",
        Sample((Message("system", "Be brief."), Message("user", "One?"), Message("assistant", "Two."), U, A)),
    ),
    ({"prompt": "Why?", "completion": "So."}, "prompt_completion", Sample((U, A))),
    (
        {"prompt": [{"role": "user", "content": "Why?"}], "completion": [{"role": "assistant", "content": "So."}]},
        "prompt_completion",
        Sample((U, A)),
    ),
    (
        # The prompt is no answer: what the assistant says in it is not trained on.
        {"prompt": [{"role": "assistant", "content": "Hi."}, {"role": "user", "content": "Why?"}], "completion": "So."},
        "prompt_completion",
        Sample((Message("assistant", "Hi.", train=False), U, A)),
    ),
    ({"query": "Why?", "response": "So."}, "query_response", Sample((U, A))),
    ({"question": "Why?", "context": "A text.", "answer": "So."}, "query_response", Sample((U, A), "A text.")),
    (
        {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]},
        "sharegpt",
        Sample((U, A)),
    ),
    (
        {"messages": [{"role": "User", "content": "Why?"}, {"role": "Assistant", "content": "So."}]},
        "messages",
        Sample((U, A)),
    ),
    (
        {"messages": json.dumps([{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}])},
        "messages",
        Sample((U, A)),
    ),
    (
        {
            "messages": [
                {"role": "developer", "content": "Be brief."},
                {"role": "user", "content": "Why?"},
                {"role": "assistant", "content": "So."},
            ],
            "prompt": "Why?",
        },
        "messages",
        Sample((Message("system", "Be brief."), U, A)),
    ),
    (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Wh"}, {"type": "text", "text": "y?"}]},
                {
                    "role": "assistant",
                    "content": [{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "So."}],
                },
            ]
        },
        "messages",
        Sample((U, A._replace(reasoning="Hm."))),
    ),
    (
        {
            "messages": [
                {"role": "user", "content": "Why?"},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        {"id": "c1", "type": "function", "function": {"name": "sky", "arguments": '{"at": "noon"}'}}
                    ],
                },
                {"role": "tool", "tool_call_id": "c1", "content": "blue"},
                {"role": "assistant", "content": "So."},
            ],
            "tools": [{"type": "function", "function": {"name": "sky", "parameters": {}}}],
        },
        "messages",
        Sample(
            (U, Message("assistant", "", tool_calls=(CALL,)), Message("tool", "blue", tool_call_id="c1"), A),
            tools='[{"type":"function","function":{"name":"sky","parameters":{}}}]',
        ),
    ),
    (
        {
            "conversations": [
                {"from": "human", "value": "Why?"},
                {"from": "function_call", "value": '{"name": "sky", "arguments": {"at": "noon"}}'},
                {"from": "observation", "value": "blue"},
                {"from": "gpt", "value": "So."},
            ],
            "tools": '[{"name": "sky"}]',
            "system": "Be brief.",
        },
        "sharegpt",
        Sample(
            (
                Message("system", "Be brief."),
                U,
                Message("assistant", "", tool_calls=(CALL._replace(id=None),)),
                Message("tool", "blue"),
                A,
            ),
            tools='[{"name":"sky"}]',
        ),
    ),
    (
        {
            "messages": [
                {"role": "user", "content": "Why?"},
                {"role": "assistant", "content": "No.", "weight": 0},
                {"role": "user", "content": "Why?"},
                {"role": "assistant", "content": "So.", "weight": 1},
            ]
        },
        "messages",
        Sample((U, Message("assistant", "No.", train=False), U, A)),
    ),
    ({"prompt": "Why?"}, "prompt_only", Sample((U,))),
    (
        {"messages": [{"role": "system", "content": ""}, {"role": "user", "content": "Why?"}]},
        "prompt_only",
        Sample((Message("system", ""), U)),
    ),
]


@pytest.mark.parametrize(("row", "form", "sample"), PARSED)
def test_row_becomes_its_sample(row: dict[str, Any], form: str, sample: Sample) -> None:
    parsed = read(row)
    assert (parsed.form, parsed.sample) == (form, sample)


def test_what_follows_the_last_trained_answer_is_named_as_ignored() -> None:
    said = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    for more in ({"role": "user", "content": "Thanks."}, {"role": "assistant", "content": "No.", "train": False}):
        assert read({"messages": [*said, more]}) == ParsedRow(Sample((U, A)), "messages", (AFTER_LAST_ANSWER,))
    asked = read({"messages": [*said, {"role": "user", "content": "Why?"}]}, form="prompt_only")
    assert asked == ParsedRow(Sample((U, A, U)), "prompt_only", ())


def test_answers_are_left_out_of_prompts_and_named() -> None:
    assert read({"instruction": "Why?", "output": "So."}, form="prompt_only") == ParsedRow(
        Sample((U,)), "prompt_only", ("output",)
    )
    parsed = read(
        {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]}, form="prompt_only"
    )
    assert parsed == ParsedRow(Sample((U,)), "prompt_only", ("the last answer",))


def test_ignored_columns_and_fields_are_named_by_their_place() -> None:
    message = {"role": "user", "content": "Why?", "id": 7, "name": None, "weight": 1}
    row = {
        "messages": [message, {"role": "assistant", "content": "So.", "refusal": "x"}],
        "category": "open",
        "empty": None,
    }
    assert set(read(row).ignored) == {
        "category",
        "messages[].id",
        "messages[].refusal",
        "messages[].weight of messages that are not the assistant's",
    }
    assert read({"instruction": "a", "output": "b", "bad\x00name": 1}).ignored == ("bad\ufffdname",)


def test_given_form_decides_between_two_and_the_other_is_ignored() -> None:
    row = {
        "instruction": "Why?",
        "output": "So.",
        "messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I."}],
    }
    with pytest.raises(RowInvalid, match="`form`"):
        read(row)
    assert read(row, form="instruction") == ParsedRow(Sample((U, A)), "instruction", ("messages",))
    assert set(read(row, form="messages").ignored) == {"instruction", "output"}
    with pytest.raises(RowInvalid, match="no conversations"):
        read(row, form="sharegpt")
    with pytest.raises(RowInvalid, match="no answer"):
        read({"instruction": "Why?"}, form="instruction")


def test_columns_of_other_names_are_mapped_and_take_the_place_of_those_that_mean_the_same() -> None:
    row = {"question": "Why?", "best_answer": "So.", "answer": "No.", "category": "x"}
    parsed = read(row, columns={"instruction": "question", "output": "best_answer"})
    assert parsed == ParsedRow(Sample((U, A)), "instruction", ("category", "answer"))
    with pytest.raises(ValueError, match="which no form has"):
        ReadOptions(columns={"ouput": "x"})
    with pytest.raises(ValueError, match="two fields"):
        ReadOptions(columns={"output": "x", "instruction": "x"})


@pytest.mark.parametrize("column", ["reasoning", "reasoning_content", "thinking", "thought", "cot"])
def test_a_thought_in_a_column_of_its_own_is_the_assistants(column: str) -> None:
    parsed = read({"question": "Why?", column: "Hm", "response": "So."})
    assert parsed.sample.conversation == (Message("user", "Why?"), Message("assistant", "So.", reasoning="Hm"))
    assert parsed.sample.references == ("So.",)
    assert (parsed.reasoning, parsed.ignored) == (column, ())


@pytest.mark.parametrize(
    ("columns", "ignored"),
    [
        ({"reasoning": "Hm", "cot": "Hmm"}, ("reasoning", "cot")),  # Which of them is it?
        ({"reasoning": ["Hm"]}, ("reasoning",)),
        ({"reasoning": 3}, ("reasoning",)),
        ({"thinking": "Hm", "response": "<think>Hm</think>So."}, ("thinking",)),  # The answer holds it already.
        ({"rationale": "Hm"}, ("rationale",)),
        ({"reasoning": " "}, ("reasoning",)),
    ],
)
def test_what_may_be_no_thought_is_named_as_ignored(columns: dict[str, Any], ignored: tuple[str, ...]) -> None:
    parsed = read({"question": "Why?", "response": "So.", **columns})
    assert parsed.sample.conversation[-1].reasoning is None
    assert (parsed.reasoning, parsed.ignored) == (None, ignored)


def test_a_column_that_is_mapped_is_the_thought_and_the_others_are_ignored() -> None:
    row = {"question": "Why?", "response": "So.", "rationale": "Hm", "cot": "Hmm"}
    parsed = read(row, columns={"reasoning": "rationale"})
    assert parsed.sample.conversation[-1].reasoning == "Hm"
    assert (parsed.reasoning, parsed.ignored) == ("rationale", ("cot",))
    with pytest.raises(RowInvalid, match="rationale"):
        read({**row, "rationale": ["Hm"]}, columns={"reasoning": "rationale"})
    assert (
        read({**row, "rationale": None}, columns={"reasoning": "rationale"}).sample.conversation[-1].reasoning is None
    )


def test_a_conversation_has_its_thoughts_in_its_messages() -> None:
    talk = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    parsed = read({"messages": talk, "reasoning": "Hm"})
    assert parsed.sample.conversation[-1].reasoning is None
    assert parsed.ignored == ("reasoning",)
