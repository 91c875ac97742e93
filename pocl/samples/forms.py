"""From the columns of a row to a sample, in the forms that public data has: detected, or given.

    instruction        {"instruction": ..., "input": ..., "output": ...}
    prompt_completion  {"prompt": ..., "completion": ...}, each text or a list of messages
    query_response     {"query": ..., "response": ...}
    messages           {"messages": [{"role": ..., "content": ...}, ...]}
    sharegpt           {"conversations": [{"from": ..., "value": ...}, ...]}
    sample             {"conversation": [...], "references": [...], ...}, as the service stores samples
    prompt_only        one of them without an answer

docs/data.md has them in full. Text is kept as it is; a column that is not used is named as ignored.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, NamedTuple

from pocl.samples.difficulty import DIFFICULTY_COLUMN, difficulty_of, required_difficulty
from pocl.samples.messages import MAX_MESSAGES, check_order, parse_messages, parse_tools, to_last_answer
from pocl.samples.row_invalid import RowInvalid
from pocl.samples.sample import Message, Sample
from pocl.samples.values import Fields, filled_text, is_blank, list_of, optional_text, other_fields, text_of
from pocl.spec import ReadOptions, RowForm

MAX_REFERENCES: Final = 256
MAX_NAME: Final = 80
"""The longest name of a column that is shown."""
LAST_ANSWER: Final = "the last answer"
"""How an answer is named as ignored where rows are read as prompts."""

CHAT_COLUMNS: Final[Mapping[str, RowForm]] = {
    "messages": "messages",
    "conversations": "sharegpt",
    "conversation": "sample",
}
QUESTION_COLUMNS: Final[Mapping[str, RowForm]] = {
    "instruction": "instruction",
    "prompt": "prompt_completion",
    "query": "query_response",
    "question": "query_response",
    # Beside one of the others it is the text that the question is about.
    "input": "query_response",
}
ANSWER_COLUMNS: Final = ("output", "response", "answer", "completion")
_FORM_COLUMNS: Final = {**CHAT_COLUMNS, **QUESTION_COLUMNS}
CONTEXT_COLUMNS: Final = ("input", "context", "Input")
SYSTEM_COLUMNS: Final = ("system", "system_prompt")
TOOL_COLUMNS: Final = ("tools", "functions")
REASONING_COLUMNS: Final = ("reasoning", "reasoning_content", "thinking", "thought", "cot")
"""The assistant's thought before its answer."""
_SAME_MEANING: Final[Sequence[tuple[str, ...]]] = (
    (*CHAT_COLUMNS, "instruction", "prompt", "query", "question"),
    ANSWER_COLUMNS,
    CONTEXT_COLUMNS,
    SYSTEM_COLUMNS,
    TOOL_COLUMNS,
    REASONING_COLUMNS,
)


class ParsedRow(NamedTuple):
    """A sample, and how it was read."""

    sample: Sample
    form: RowForm
    ignored: tuple[str, ...]
    """The columns, and the fields of messages, that hold something and are not used."""
    reasoning: str | None = None
    """The column that the assistant's thought is from, where it has one of its own."""


def parse_fields(row: Fields, options: ReadOptions) -> ParsedRow:
    """Read one row, whose columns are given by name.

    Raises:
        RowInvalid: the row is no sample, or could be two; the sentence says what to do.
    """
    fields, ignored = _mapped(row, options.columns)
    column, form = _detect(fields, options.form)
    reader = _RowReader(fields, ignored, options.columns)
    if column in CHAT_COLUMNS:
        sample = reader.conversation(column, prompt_only=options.form == "prompt_only")
    else:
        sample = reader.question(column, options.form)
    column_of_difficulty = options.columns.get(DIFFICULTY_COLUMN)
    difficulty = (
        difficulty_of(fields) if column_of_difficulty is None else required_difficulty(fields, column_of_difficulty)
    )
    if difficulty is not None:
        reader.used.add(DIFFICULTY_COLUMN)
        sample = replace(sample, difficulty=difficulty)
    unused = [options.columns.get(name, name) for name in other_fields(fields, reader.used)]
    return ParsedRow(
        sample,
        form if sample.has_answer or form == "sample" else "prompt_only",
        tuple(dict.fromkeys(_printable(name) for name in (*unused, *ignored))),
        None if reader.reasoning is None else _printable(options.columns.get(reader.reasoning, reader.reasoning)),
    )


def _printable(name: str) -> str:
    return "".join(character if character.isprintable() else "\ufffd" for character in name[:MAX_NAME])


def _mapped(row: Fields, columns: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """The row with mapped columns under the names of the fields that they are, and the columns that they replace."""
    if not columns:
        return dict(row), []
    taken = set(columns.values())
    replaced = {name for names in _SAME_MEANING if any(name in columns for name in names) for name in names}
    replaced |= set(columns)
    fields = {name: value for name, value in row.items() if name not in taken and name not in replaced}
    fields |= {field: row[name] for field, name in columns.items() if name in row}
    ignored = [name for name, value in row.items() if name in replaced - taken and value is not None]
    return fields, ignored


def _detect(fields: Fields, given: RowForm | None) -> tuple[str, RowForm]:
    """The column that the question or the conversation stands in, and the form of the row.

    Raises:
        RowInvalid: there is none, or more than one.
    """
    chats = [name for name in CHAT_COLUMNS if not is_blank(fields.get(name))]
    questions = [name for name in QUESTION_COLUMNS if not is_blank(fields.get(name))]
    if len(questions) > 1 and "input" in questions:
        questions.remove("input")
    if given is not None and given != "prompt_only":
        names = [name for name, form in _FORM_COLUMNS.items() if form == given]
        usable = [name for name in (*chats, *questions) if name in names] or [name for name in names if name in fields]
        if not usable:
            raise RowInvalid("form_unknown", f"The row has no {' and no '.join(names)}, which the form {given} needs.")
        return usable[0], given
    has_answer = any(fields.get(name) is not None for name in ANSWER_COLUMNS)
    candidates = [*chats, *(questions if has_answer or not chats else [])]
    if len(candidates) > 1:
        listed = " and ".join(candidates)
        detail = f"The row has {listed}, and could be read by each: say which with `form`, or map one with `columns`."
        raise RowInvalid("form_unknown", detail)
    usable = candidates or [name for name in _FORM_COLUMNS if name in fields]
    if not usable:
        raise _no_form(fields)
    return usable[0], _FORM_COLUMNS[usable[0]]


def _no_form(fields: Fields) -> RowInvalid:
    if any(name in fields for name in ANSWER_COLUMNS):
        return RowInvalid("missing", "The row has an answer, and no instruction, prompt or query to it.")
    lists = [name for name, value in fields.items() if _holds_objects(value)]
    if len(fields) == len(lists) == 1:
        return RowInvalid("form_unknown", f"The rows stand in the list {lists[0][:40]!r}: send the list alone.")
    if "text" in fields:
        detail = "The row is one text, in which no answer is told from its prompt: send both, for instance as messages."
        return RowInvalid("form_unknown", detail)
    listed = ", ".join(repr(name[:40]) for name in list(fields)[:8])
    columns = f"the columns {listed}" if listed else "no column"
    detail = f"The row has {columns}, of no known form: map them with `columns`, for instance instruction and output."
    return RowInvalid("form_unknown", detail)


def _holds_objects(value: object) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


class _RowReader:
    """Reads the fields of one row, and notes which of them it used."""

    def __init__(self, fields: Fields, ignored: list[str], mapped: Mapping[str, str]) -> None:
        self.used: set[str] = set()
        self.reasoning: str | None = None
        """The column that the assistant's thought is from; None where no column has it."""
        self._fields = fields
        self._ignored = ignored
        self._mapped = mapped

    def conversation(self, column: str, *, prompt_only: bool) -> Sample:
        """A conversation in one column.

        Args:
            prompt_only: leave out the answer that it ends with.
        """
        messages = self._with_system(parse_messages(self._use(column), column, self._ignored))
        is_sample = column == "conversation" and self._fields.get("references") is not None
        if prompt_only:
            messages = self._without_answer(messages)
        elif is_sample:
            # It was stored as it is trained on: earlier answers may be part of a prompt.
            check_order(messages)
        else:
            messages = to_last_answer(messages, self._ignored)
        if not is_sample or prompt_only:
            return Sample(messages, tools=self._tools())
        references = tuple(text_of(each, "references[]") for each in list_of(self._use("references"), "references"))
        context = optional_text(self._use("context"), "context") or ""
        try:
            return Sample(messages, context, references, self._tools())
        except ValueError:
            detail = "references does not begin with the content of the assistant's last message."
            raise RowInvalid("wrong_type", detail) from None

    def question(self, column: str, given: RowForm | None) -> Sample:
        """A question in one column, and its answer in another.

        Args:
            given: the form that the row must have; None finds out whether it is a prompt alone.
        """
        question = self._use(column)
        if isinstance(question, list):
            if column != "prompt":
                raise RowInvalid("wrong_type", f"{column} is a list; messages stand in prompt or messages.")
            # Where an answer is given apart from its prompt, the prompt is not trained on.
            asked = [
                message._replace(train=message.role != "assistant")
                for message in parse_messages(question, column, self._ignored)
            ]
            context = ""
        else:
            asked = [Message("user", filled_text(question, column))]
            context = self._one_of(CONTEXT_COLUMNS) or ""
        before = self._with_system((*self._history(), *asked))
        check_order(before)
        if given == "prompt_only":
            return Sample(self._without_answer(before), context, tools=self._tools())
        name, answer = self._answer()
        if answer is None:
            if given is not None:
                raise RowInvalid("missing", f"The row has no answer: none of {', '.join(ANSWER_COLUMNS)}.")
            return Sample(self._without_answer(before), context, tools=self._tools())
        if _holds_objects(answer):
            after = parse_messages(answer, name, self._ignored)
            if not any(message.role == "assistant" for message in after):
                raise RowInvalid("missing", f"{name} has no message of the assistant.")
            return Sample(to_last_answer((*before, *after), self._ignored), context, tools=self._tools())
        references = _references(answer, name)
        last = Message("assistant", references[0], reasoning=self._reasoning(references[0]))
        return Sample((*before, last), context, references, self._tools())

    def _without_answer(self, messages: tuple[Message, ...]) -> tuple[Message, ...]:
        while messages and messages[-1].role == "assistant":
            messages = messages[:-1]
            self._ignored.append(LAST_ANSWER)
        check_order(messages)
        return messages

    def _with_system(self, messages: tuple[Message, ...]) -> tuple[Message, ...]:
        system = self._one_of(SYSTEM_COLUMNS)
        if system is None:
            return messages
        if any(message.role == "system" for message in messages):
            detail = (
                "The row has a system message in a column of its own and one in the conversation; give one of them."
            )
            raise RowInvalid("ambiguous", detail)
        return (Message("system", system), *messages)

    def _history(self) -> list[Message]:
        """The earlier exchanges of a question: pairs of what was asked and answered, or messages."""
        if is_blank(self._use("history")):
            return []
        history = list_of(self._fields["history"], "history")
        if _holds_objects(history):
            return list(parse_messages(history, "history", self._ignored))
        messages: list[Message] = []
        for index, pair in enumerate(history):
            if not isinstance(pair, list) or len(pair) != 2:
                raise RowInvalid("wrong_type", f"history[{index}] is not a pair of a question and its answer.")
            asked, answered = (filled_text(text, f"history[{index}]") for text in pair)
            messages += [Message("user", asked), Message("assistant", answered)]
        if len(messages) > MAX_MESSAGES:
            raise RowInvalid("too_many", f"The row has more than {MAX_MESSAGES} messages.")
        return messages

    def _answer(self) -> tuple[str, Any]:
        given = [name for name in ANSWER_COLUMNS if self._fields.get(name) is not None]
        self.used.update(given)
        filled = [name for name in given if not is_blank(self._fields[name])]
        if any(self._fields[name] != self._fields[filled[0]] for name in filled):
            listed = " and ".join(filled)
            raise RowInvalid("ambiguous", f"The row has {listed}, which differ: map one to output with `columns`.")
        name = next(iter((*filled, *given, "output")))
        return name, self._fields.get(name)

    def _reasoning(self, answer: str) -> str | None:
        """The thought before an answer, from the one column that has it; a column that is mapped has it in any case.

        Other columns are left as they are: what is no text, what the answer holds already, and several that differ.
        """
        if "reasoning" in self._mapped:
            self.reasoning = None if is_blank(self._fields.get("reasoning")) else "reasoning"
            return optional_text(self._use("reasoning"), self._mapped["reasoning"])
        texts = {
            name: value
            for name in REASONING_COLUMNS
            if isinstance(value := self._fields.get(name), str) and value.strip() and value.strip() not in answer
        }
        if len(set(texts.values())) != 1:
            return None
        self.used.update(texts)
        self.reasoning, text = next(iter(texts.items()))
        return text

    def _tools(self) -> str:
        given = [name for name in TOOL_COLUMNS if not is_blank(self._use(name))]
        if len(given) > 1:
            raise RowInvalid("ambiguous", f"The row has {' and '.join(given)}; give one of them.")
        return parse_tools(self._fields[given[0]], given[0]) if given else ""

    def _one_of(self, names: Sequence[str]) -> str | None:
        """The text of the one of these columns that has one, and is not used otherwise."""
        texts = {
            name: text_of(value, name)
            for name, value in self._fields.items()
            if name in names and not is_blank(value) and name not in self.used
        }
        self.used.update(names)
        if len(set(texts.values())) > 1:
            listed = " and ".join(texts)
            raise RowInvalid("ambiguous", f"The row has {listed}, which differ: map one to {names[0]} with `columns`.")
        return next(iter(texts.values()), None)

    def _use(self, name: str) -> Any:
        self.used.add(name)
        return self._fields.get(name)


def _references(value: object, name: str) -> tuple[str, ...]:
    if not isinstance(value, list):
        return (filled_text(value, name),)
    if len(value) > MAX_REFERENCES:
        raise RowInvalid("too_many", f"{name} has more than {MAX_REFERENCES} references.")
    if not value:
        raise RowInvalid("empty", f"{name} is empty.")
    return tuple(filled_text(reference, f"{name}[{index}]") for index, reference in enumerate(value))
