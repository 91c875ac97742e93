"""What is passed on of a growing answer is never taken back, and adds up to the answer."""

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from pocl.chat.answer_text import AnswerText
from pocl.prompting.thoughts import PLAIN, AnswerForm, Thought

letters = st.text(alphabet="abxy \n", max_size=24)


def characters(form: AnswerForm = PLAIN) -> AnswerText:
    """The text of an answer whose tokens are its characters."""
    return AnswerText(lambda ids: form.read("".join(map(chr, ids))).text.strip(), form)


def spoken(answer: AnswerText, text: str, steps: Sequence[int]) -> list[str]:
    """The parts that are passed on while the answer grows to these numbers of characters, and at its end."""
    ids = [ord(character) for character in text]
    return [*(answer.grow(ids[:step]) for step in sorted(steps)), answer.finish(ids)]


@given(text=letters, steps=st.lists(st.integers(0, 24)))
def test_parts_add_up_to_the_answer(text: str, steps: list[int]) -> None:
    answer = characters()
    assert "".join(spoken(answer, text, steps)) == text.strip() == answer.text


@given(
    text=letters, steps=st.lists(st.integers(0, 24)), stop=st.lists(st.text("abxy", min_size=1, max_size=3), max_size=3)
)
def test_answer_ends_before_the_first_stop_text(text: str, steps: list[int], stop: list[str]) -> None:
    whole = text.strip()
    places = [whole.find(each) for each in stop if each in whole]
    answer = characters()
    answer.stop = stop
    expected = whole[: min(places)] if places else whole
    parts, ids = [], [ord(character) for character in text]
    for step in sorted(steps):
        parts.append(answer.grow(ids[:step]))
        if answer.stopped:
            break
    else:
        parts.append(answer.finish(ids))
    assert "".join(parts) == answer.text == expected


def test_character_is_held_back_until_its_bytes_are_whole() -> None:
    content = "né".encode()
    answer = AnswerText(lambda ids: bytes(ids).decode("utf-8", "replace"), PLAIN)
    assert [answer.grow(content[:2]), answer.grow(content[:3])] == ["n", "é"]


def test_thought_is_not_part_of_the_answer() -> None:
    form = AnswerForm(thought=Thought("<think>", "</think>"), closings=("</answer>",))
    text = "<think>Hm, b.</think>\n\nThe answer.</answer>"
    answer = characters(form)
    assert "".join(spoken(answer, text, range(len(text)))) == "The answer."


def test_answer_that_turns_out_to_be_a_thought_is_replaced_as_a_whole() -> None:
    form = AnswerForm(thought=Thought("<think>", "</think>"))
    answer = characters(form)
    text = "Hm, a.</think> It is b."
    assert answer.grow([ord(character) for character in text[:3]]) == "Hm,"
    assert answer.finish([ord(character) for character in text]) == ""
    assert answer.text == "It is b."
