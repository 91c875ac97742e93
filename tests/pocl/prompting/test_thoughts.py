"""Answers without the thought that they begin with."""

import pytest

from pocl.prompting.thoughts import Thought, thought_between, thought_opened_in, visible_answer
from tests.pocl.prompting.chat_templates import CHATML
from tests.pocl.prompting.encoders import encoder_of
from tests.pocl.prompting.tokenizers import text_tokenizer

THINK = Thought("<think>", "</think>")


@pytest.mark.parametrize(
    ("answer", "visible"),
    [
        ("<think>\nHm\n</think>\n\nYes.", "Yes."),
        ("<think>\n\n</think>\n\nYes.", "Yes."),
        ("Hm\n</think>\nYes.", "Yes."),  # The prompt has opened the thought.
        ("<think>\nHm, and then", ""),
        ("Yes.", "Yes."),
        ("Yes. <think> is a tag, </think> closes it.", "Yes. <think> is a tag, </think> closes it."),
    ],
)
def test_the_leading_thought_is_taken_off(answer: str, visible: str) -> None:
    assert visible_answer(answer, THINK) == visible
    assert visible_answer(answer, None) == answer


def test_thoughts_are_found_by_the_tags_around_them() -> None:
    assert thought_between("<|im_start|>assistant\n<think>\n", "\n</think>\n\n") == THINK
    assert thought_between("[THINK]", "[/THINK]") == Thought("[THINK]", "[/THINK]")
    assert thought_between("assistant\n", "\n\n") is None
    assert thought_opened_in("<think>\n") == THINK
    assert thought_opened_in("<|im_start|>assistant\n") is None


@pytest.mark.parametrize(
    ("finished", "opened"),
    [
        ("{{ '<think>\n\n</think>\n\n' }}", "<think>\n"),
        ("{{ '<think>\n\n</think>\n\n' }}", ""),
        ("{{ '<think>\n' + (m.reasoning_content | default('')) + '\n</think>\n' }}", ""),
        ("", "<think>\n"),
    ],
)
def test_templates_that_write_thoughts_are_known_to_do_so(finished: str, opened: str) -> None:
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
        + finished
        + "{% endif %}"
        "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n" + opened.replace("\n", "\\n") + "' }}{% endif %}"
    )
    assert encoder_of(text_tokenizer(template)).thought == THINK
    assert encoder_of(text_tokenizer(CHATML)).thought is None
