"""Conversations as text and token ids by the templates of common families, beside `apply_chat_template`."""

from datetime import date
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pocl.models.tokenizers import transformers_tokenizer
from pocl.prompting.jinja_templates import render
from pocl.prompting.text_tokenizer import TextTokenizer
from pocl.samples.sample import Message, Sample
from tests.pocl.prompting.chat_templates import FAMILIES as CHAT_FAMILIES
from tests.pocl.prompting.chat_templates import Family
from tests.pocl.prompting.encoders import DAY, encoder_of, pieces, talk, with_day
from tests.pocl.prompting.thinking_templates import THINKING_FAMILIES
from tests.pocl.prompting.tokenizers import text_tokenizer, word_sign_backend

SYSTEM = Message("system", "Be brief.")
FAMILIES: dict[str, Family] = {**CHAT_FAMILIES, **THINKING_FAMILIES}
TOKENIZERS = {name: text_tokenizer(family.template, eos=family.eos) for name, family in FAMILIES.items()}
every_family = pytest.mark.parametrize("name", FAMILIES)


def template_input(sample: Sample, family: Family) -> list[dict[str, Any]]:
    parts = family is FAMILIES["content in parts"]
    return [
        {"role": each.role, "content": [{"type": "text", "text": each.content}] if parts else each.content}
        for each in sample.conversation
    ]


def samples_for(family: Family) -> list[Sample]:
    """One turn and several, with and without a system message, with spaces around texts, as far as it takes them."""
    talks = [
        ("Why?", "Because."),
        ("Why?", "Because.", "Really?", "Yes."),
        (" Why? \n", "\nBecause. ", "a\n\nb", " c "),
    ]
    systems = ["Be brief."] if family.needs_system else [None, "Be brief."] if family.takes_system else [None]
    return [talk(*contents, system=system) for contents in talks for system in systems]


def oracle_ids(sample: Sample, family: Family, tokenizer: TextTokenizer) -> list[int]:
    oracle = transformers_tokenizer(tokenizer)
    text = oracle.apply_chat_template(
        template_input(sample, family), chat_template=with_day(family.template), tokenize=False
    )
    return list(oracle(text, add_special_tokens=False)["input_ids"])


@every_family
def test_templates_render_as_transformers_renders_them(name: str) -> None:
    family = FAMILIES[name]
    oracle = transformers_tokenizer(TOKENIZERS[name])
    for sample in samples_for(family):
        whole = template_input(sample, family)
        for messages, opened in ((whole, False), (whole[:-1], True)):
            expected = oracle.apply_chat_template(
                messages, chat_template=with_day(family.template), tokenize=False, add_generation_prompt=opened
            )
            variables = TOKENIZERS[name].special_tokens
            rendered = render(family.template, messages, variables=variables, today=DAY, add_generation_prompt=opened)
            assert rendered == expected


@every_family
def test_trained_ids_are_those_of_the_rendering(name: str) -> None:
    family, tokenizer = FAMILIES[name], TOKENIZERS[name]
    samples = samples_for(family)
    encoded = encoder_of(tokenizer).encode(samples)
    assert encoded.counts.turns_unlabelled == 0
    assert not encoded.counts.left_out
    for sample, result in zip(samples, encoded.samples, strict=True):
        expected = oracle_ids(sample, family, tokenizer)
        if family.end_added:
            # The end-of-sequence token stands in place of the spaces behind the answer.
            assert list(result.input_ids[:-1]) == expected[: len(result.input_ids) - 1]
            assert result.input_ids[-1] == tokenizer.eos_id
        elif encoder_of(tokenizer).encode([sample]).counts.tokenised_apart:
            assert tokenizer.decode(result.input_ids) == tokenizer.decode(expected)
        else:
            assert list(result.input_ids) == expected


@every_family
def test_prompt_and_label_of_an_answer(name: str) -> None:
    family, tokenizer = FAMILIES[name], TOKENIZERS[name]
    system = "Be brief." if family.needs_system else None
    (encoded,) = encoder_of(tokenizer).encode([talk("Why?", "Because.", system=system)]).samples
    assert tokenizer.decode(encoded.reference_ids) == family.labelled
    assert tokenizer.decode(encoded.prompt_ids).endswith(family.prompt)
    assert len(encoder_of(tokenizer).encode([talk("Why?", "Because.", system=system)]).samples) == 1


@every_family
def test_every_turn_is_labelled_with_its_end(name: str) -> None:
    family, tokenizer = FAMILIES[name], TOKENIZERS[name]
    system = "Be brief." if family.needs_system else None
    encoder = encoder_of(tokenizer)
    (encoded,) = encoder.encode([talk("Why?", "Because.", "Really?", "Yes.", system=system)]).samples
    spans = [tokenizer.decode(encoded.input_ids[start:stop]) for start, stop in encoded.response_spans]
    answers = [text for text in spans if "Because." in text or "Yes." in text]
    assert len(answers) == 2
    profile = encoder.chat.profile if encoder.chat is not None else None
    assert profile is not None
    if profile.end is not None and profile.end_of_earlier is not None:
        assert answers[0].rstrip("\n").endswith(f"Because.{profile.end_of_earlier.text}")
        assert answers[1].rstrip("\n").endswith(f"Yes.{profile.end.text}")


@pytest.mark.parametrize("name", ["llama 2", "mistral", "gemma", "chatml", "zephyr"])
def test_tokenizers_with_a_word_sign_give_the_ids_of_the_rendering(name: str) -> None:
    family = FAMILIES[name]
    tokenizer = text_tokenizer(family.template, eos=family.eos, backend=word_sign_backend())
    samples = samples_for(family)
    for sample, encoded in zip(samples, encoder_of(tokenizer).encode(samples).samples, strict=True):
        if not encoder_of(tokenizer).encode([sample]).counts.tokenised_apart:
            assert list(encoded.input_ids) == oracle_ids(sample, family, tokenizer)


@pytest.mark.parametrize("name", ["marks without the end", "tulu with marks", "smollm 3"])
def test_labels_are_what_the_template_marks_and_the_end(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    sample = talk("Why?", "Because.", "Really?", "Yes.")
    messages = template_input(sample, FAMILIES[name])
    oracle = transformers_tokenizer(tokenizer)
    source = with_day(FAMILIES[name].template).replace("{% macro turn(m) %}", "").replace("{% endmacro %}", "")
    source = source.replace("{% for m in messages %}{{ turn(m) }}{% endfor %}", "")
    if name == "marks without the end":
        # Marks inside a macro, where counting the characters rendered so far goes wrong, are compared without it.
        source = "{% for m in messages %}" + source.partition("{% if add_generation_prompt")[0] + "{% endfor %}"
    expected: Any = oracle.apply_chat_template(
        messages, chat_template=source, return_assistant_tokens_mask=True, return_dict=True
    )
    (encoded,) = encoder_of(tokenizer).encode([sample]).samples
    assert list(encoded.input_ids) == expected["input_ids"]
    end = tokenizer.id_of("<|im_end|>")
    wrong = [
        index
        for index, (label, marked) in enumerate(zip(encoded.label_mask, expected["assistant_masks"], strict=True))
        if label != bool(marked) and (name != "marks without the end" or encoded.input_ids[index] != end)
    ]
    assert not wrong


text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).filter(str.strip)


@settings(max_examples=40)
@given(st.lists(text, min_size=2, max_size=6), st.sampled_from(["chatml", "qwen 3", "llama 3", "gemma 3", "zephyr"]))
def test_whatever_is_said_the_ids_are_those_of_the_rendering(contents: list[str], name: str) -> None:
    sample = talk(*contents[: len(contents) // 2 * 2])
    encoded = encoder_of(TOKENIZERS[name]).encode([sample])
    if not encoded.counts.tokenised_apart:
        assert list(encoded.samples[0].input_ids) == oracle_ids(sample, FAMILIES[name], TOKENIZERS[name])


def test_a_thought_in_an_answer_is_rendered_as_the_template_renders_it() -> None:
    thoughtful = talk("Why?", "<think>\nHm\n</think>\nBecause.")
    rendered = encoder_of(TOKENIZERS["qwen 3"]).encode([thoughtful])
    assert not rendered.counts.left_out
    assert pieces(rendered.samples[0], TOKENIZERS["qwen 3"])[1:] == [
        "<think>\nHm\n</think>\n\nBecause.<|im_end|>",
        "\n",
    ]
    encoded = encoder_of(TOKENIZERS["deepseek r1"]).encode([thoughtful])
    assert encoded.counts.left_out == {"reasoning_content": 1}
    assert tokenizer_text(encoded.samples[0].reference_ids, "deepseek r1").startswith("\nBecause.")


def tokenizer_text(ids: tuple[int, ...], name: str) -> str:
    return TOKENIZERS[name].decode(ids)


def test_reasoning_is_given_to_the_template_or_named_as_left_out() -> None:
    sample = Sample((Message("user", "Why?"), Message("assistant", "Because.", reasoning="Hm")))
    shown = encoder_of(TOKENIZERS["qwen 3"]).encode([sample])
    assert not shown.counts.left_out
    assert tokenizer_text(shown.samples[0].reference_ids, "qwen 3") == "<think>\nHm\n</think>\n\nBecause.<|im_end|>"
    assert encoder_of(TOKENIZERS["chatml"]).encode([sample]).counts.left_out == {"reasoning_content": 1}


def test_variables_of_the_specification_reach_the_template() -> None:
    tokenizer = TOKENIZERS["qwen 3"]
    encoder = encoder_of(tokenizer, chat_template_kwargs={"enable_thinking": False})
    (encoded,) = encoder.encode([talk("Why?", "Because.")]).samples
    assert tokenizer.decode(encoded.prompt_ids).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert tokenizer.decode(encoded.reference_ids) == "Because.<|im_end|>"
    assert encoded.input_ids == encoder_of(tokenizer).encode([talk("Why?", "Because.")]).samples[0].input_ids


def test_a_template_that_prints_the_date_is_given_the_day_of_the_specification() -> None:
    tokenizer = TOKENIZERS["llama 3.1"]
    (encoded,) = encoder_of(tokenizer, date=date(2025, 12, 31)).encode([talk("Why?", "Because.")]).samples
    assert "Today Date: 31 Dec 2025" in tokenizer.decode(encoded.input_ids)
