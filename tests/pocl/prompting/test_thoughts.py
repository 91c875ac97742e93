"""Answers without the thoughts that they begin with and the marks around them."""

from typing import Any

import pytest

from pocl.evaluation.answers import read_answers
from pocl.models.tokenizers import transformers_tokenizer
from pocl.prompting.encoded_sample import EncodedSample
from pocl.prompting.thoughts import (
    AnswerForm,
    Thought,
    VisibleAnswer,
    empty_thought_in,
    thought_around,
    thought_opened_in,
)
from pocl.samples.sample import Message, Sample, ToolCall
from tests.pocl.prompting.chat_templates import CHATML, FAMILIES
from tests.pocl.prompting.encoders import encoder_of, talk, with_day
from tests.pocl.prompting.thinking_templates import THINKING_FAMILIES
from tests.pocl.prompting.tokenizers import text_tokenizer

THINK = Thought("<think>", "</think>")
THINKING = {name: family for name, family in THINKING_FAMILIES.items() if family.thinking is not None}
TOKENIZERS = {name: text_tokenizer(family.template, eos=family.eos) for name, family in THINKING_FAMILIES.items()}
every_family = pytest.mark.parametrize("name", THINKING_FAMILIES)
THOUGHTFUL = Sample((Message("user", "Why?"), Message("assistant", "Because.", reasoning="Hm")))


@pytest.mark.parametrize(
    ("prompt", "answer", "visible"),
    [
        ("", "<think>\nHm\n</think>\n\nYes.", "Yes."),
        ("", "<think>\n\n</think>\n\nYes.", "Yes."),
        ("assistant\n<think>\n", "Hm\n</think>\nYes.", "Yes."),
        ("assistant\n<think>\n", "Hm, and then", None),
        ("", "<think>\nHm, and then", None),
        ("", "Yes.", "Yes."),
        ("", "Yes. <think> is a tag, </think> closes it.", "Yes. <think> is a tag, </think> closes it."),
    ],
)
def test_the_leading_thought_is_taken_off(prompt: str, answer: str, visible: str | None) -> None:
    expected = VisibleAnswer("", in_thought=True) if visible is None else VisibleAnswer(visible)
    assert AnswerForm(THINK).read(answer, prompt=prompt) == expected
    assert AnswerForm().read(answer, prompt=prompt) == VisibleAnswer(answer)


def test_tags_around_an_answer_are_taken_off_behind_its_thought_alone() -> None:
    form = AnswerForm(THINK, "<answer>", ("</answer>",))
    assert form.read("<think>first <answer> then</think>\n<answer>\nYes.\n</answer>").text.strip() == "Yes."
    assert form.read("<answer>Yes.</answer>").text == "Yes."
    assert form.read("<think>Hm</think>Yes.").text == "Yes."
    assert form.read_reference("</answer> ends it") == "</answer> ends it"


def test_thoughts_are_found_by_the_tags_around_them() -> None:
    assert thought_around("<think>", "\n</think>\n\n") == THINK
    assert thought_around("[THINK]", "[/THINK]") == Thought("[THINK]", "[/THINK]")
    assert thought_around("assistant", "\n\n") is None
    for text, stop in (
        ("<think>\n", "</think>"),
        ("<seed:think>", "</seed:think>"),
        ("◁think▷", "◁/think▷"),
        ("<|START_THINKING|>", "<|END_THINKING|>"),
        ("<|begin_of_thought|>", "<|end_of_thought|>"),
        ("<|inner_prefix|>", "<|inner_suffix|>"),
    ):
        assert thought_opened_in(text) == Thought(text.strip(), stop)
        assert empty_thought_in(f"{text}\n{stop}\n") == Thought(text.strip(), stop)
    for text in ("<|im_start|>assistant\n", "<|channel>thought\n<channel|>", "<|message|>", "</think>"):
        assert thought_opened_in(text) is None


def expected_ids(name: str, tokenizer: Any) -> list[int]:
    reasoning: dict[str, Any] = {"reasoning_content": "Hm", "thinking": "Hm"}
    answer = {"role": "assistant", "content": "Because.", **reasoning}
    if name == "ministral 3":
        parts = [{"type": "thinking", "thinking": "Hm"}, {"type": "text", "text": "Because."}]
        answer = {"role": "assistant", "content": parts}
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Why?"}, answer],
        chat_template=with_day(THINKING_FAMILIES[name].template),
        tokenize=False,
    )
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("name", THINKING)
def test_a_thought_is_trained_as_the_template_writes_it(name: str) -> None:
    family, tokenizer = THINKING_FAMILIES[name], TOKENIZERS[name]
    encoded = encoder_of(tokenizer).encode([THOUGHTFUL])
    assert not encoded.counts.left_out
    (sample,) = encoded.samples
    assert tokenizer.decode(sample.reference_ids) == family.thinking
    ids = list(sample.input_ids[:-1] if family.end_added else sample.input_ids)
    assert ids == expected_ids(name, transformers_tokenizer(tokenizer))


@pytest.mark.parametrize("name", sorted(THINKING_FAMILIES.keys() - THINKING.keys() - {"hunyuan"}))
def test_a_thought_that_the_template_has_no_place_for_is_named(name: str) -> None:
    assert encoder_of(TOKENIZERS[name]).encode([THOUGHTFUL]).counts.left_out == {"reasoning_content": 1}


def read(name: str, sample: EncodedSample, ids: tuple[int, ...]) -> VisibleAnswer:
    tokenizer, form = TOKENIZERS[name], encoder_of(TOKENIZERS[name]).answer
    return read_answers([ids], [sample.prompt_ids], transformers_tokenizer(tokenizer), form)[0]


@every_family
def test_what_a_family_generates_is_read_without_its_thought_and_its_marks(name: str) -> None:
    encoder = encoder_of(TOKENIZERS[name])
    samples = encoder.encode([talk("Why?", "Because."), THOUGHTFUL]).samples
    for sample in samples:
        # Generation ends before the first token that ends an answer.
        ids = sample.reference_ids
        ids = ids[: next((place for place, token in enumerate(ids) if token in encoder.end_tokens), len(ids))]
        assert read(name, sample, ids) == VisibleAnswer("Because.")


@pytest.mark.parametrize("name", THINKING)
def test_an_answer_that_ends_inside_its_thought_says_nothing_and_is_told(name: str) -> None:
    (sample,) = encoder_of(TOKENIZERS[name]).encode([THOUGHTFUL]).samples
    texts = [TOKENIZERS[name].decode(sample.reference_ids[:length]) for length in range(len(sample.reference_ids))]
    inside = next(length for length, text in enumerate(texts) if text.endswith("Hm"))
    assert read(name, sample, sample.reference_ids[:inside]) == VisibleAnswer("", in_thought=True)


@every_family
def test_thoughts_in_the_way_of_a_family_are_known_whatever_its_template_writes(name: str) -> None:
    form = encoder_of(TOKENIZERS[name]).answer
    if form.thought is None:
        assert THINKING_FAMILIES[name].thought == "<think>"
    else:
        assert form.thought.start == THINKING_FAMILIES[name].thought


def test_a_message_of_its_own_that_holds_the_thought_does_not_end_generation() -> None:
    tokenizer = TOKENIZERS["gpt-oss"]
    encoder = encoder_of(tokenizer)
    assert encoder.end.text == "<|return|>"
    assert tokenizer.id_of("<|return|>") in encoder.end_tokens
    assert tokenizer.id_of("<|end|>") not in encoder.end_tokens
    turns = encoder.encode([talk("Why?", "Because.", "Really?", "Yes.")]).samples[0]
    labelled = [tokenizer.decode(turns.input_ids[start:stop]) for start, stop in turns.response_spans]
    assert labelled == ["<|channel|>final<|message|>Because.<|end|>", "<|channel|>final<|message|>Yes.<|return|>"]
    several = "<|channel|>analysis<|message|>Hm<|end|><|start|>assistant<|channel|>commentary<|message|>I look<|end|>"
    final = "<|start|>assistant<|channel|>final<|message|>Because.<|end|><|start|>user"
    assert encoder.answer.read(several + final) == VisibleAnswer("Because.")
    assert encoder.answer.read(several) == VisibleAnswer("", in_thought=True)


def test_calls_are_trained_with_the_end_of_their_own() -> None:
    tokenizer = TOKENIZERS["gpt-oss"]
    call = Message("assistant", "", reasoning="I look.", tool_calls=(ToolCall("look", '{"at":"it"}'),))
    asked = (Message("user", "Why?"), call)
    thought = "<|channel|>analysis<|message|>I look.<|end|>"
    called = '<|start|>assistant to=functions.look<|channel|>commentary json<|message|>{"at": "it"}<|call|>'
    (alone,) = encoder_of(tokenizer).encode([Sample(asked)]).samples
    assert tokenizer.decode(alone.reference_ids) == thought + called
    answered = (*asked, Message("tool", "There."), Message("assistant", "Because."))
    result = encoder_of(tokenizer).encode([Sample(answered)])
    spans = [
        tokenizer.decode(result.samples[0].input_ids[start:stop]) for start, stop in result.samples[0].response_spans
    ]
    # The template leaves the thought out once there is an answer.
    assert spans == [called.removeprefix("<|start|>assistant"), "<|channel|>final<|message|>Because.<|return|>"]
    assert (result.counts.ends_added, result.counts.turns_unlabelled) == (0, 0)
    assert result.counts.left_out == {"reasoning_content": 1}


@pytest.mark.parametrize("name", ["qwen 3", "qwen 2.5"])
def test_calls_before_an_answer_are_trained_with_their_end(name: str) -> None:
    tokenizer = text_tokenizer(FAMILIES[name].template, eos="<|im_end|>")
    call = Message("assistant", "", tool_calls=(ToolCall("look", '{"at":"it"}'),))
    talk = (Message("user", "Why?"), call, Message("tool", "There."), Message("assistant", "Because."))
    result = encoder_of(tokenizer).encode([Sample(talk)])
    encoded = result.samples[0]
    called, answered = (tokenizer.decode(encoded.input_ids[start:stop]) for start, stop in encoded.response_spans)
    assert called.strip() == '<tool_call>\n{"name": "look", "arguments": {"at": "it"}}\n</tool_call><|im_end|>'
    assert answered.endswith("Because.<|im_end|>")
    assert result.counts.turns_unlabelled == 0


def test_tags_are_known_by_the_vocabulary_or_not_at_all() -> None:
    assert encoder_of(text_tokenizer(CHATML)).answer == AnswerForm(THINK)  # Its vocabulary has them as tokens.
    assert encoder_of(text_tokenizer(CHATML), template="alpaca").answer == AnswerForm()


@pytest.mark.parametrize(
    ("finished", "opened"),
    [
        ("{{ '<think>\n\n</think>\n\n' }}", "<think>\n"),
        ("{{ '<think>\n\n</think>\n\n' }}", ""),
        ("{{ '<think>\n' + (m.reasoning_content | default('')) + '\n</think>\n' }}", ""),
        ("{{ '<scratchpad>\n' + (m.reasoning_content | default('')) + '\n</scratchpad>\n' }}", "<scratchpad>"),
        ("", "<think>\n"),
        ("", "<scratchpad>\n"),
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
    name = "scratchpad" if "scratchpad" in finished + opened else "think"
    assert encoder_of(text_tokenizer(template)).answer.thought == Thought(f"<{name}>", f"</{name}>")
