"""Which template a specification chooses, and what is refused by name."""

from dataclasses import replace

import pytest

from pocl.errors import DatasetInvalid, ModelUnsupported, SpecInvalid
from pocl.prompting.template_choice import chat_template_sources
from pocl.samples.sample import Message, Sample, ToolCall
from pocl.spec import Data, DataRef
from tests.pocl.prompting.chat_templates import CHATML, CHATML_PROMPT, FAMILIES
from tests.pocl.prompting.encoders import encoder_of, pieces, talk
from tests.pocl.prompting.tokenizers import text_tokenizer

OTHER = CHATML.replace("<|im_start|>", "<|start|>")
QUESTION = talk("Why?", "Because.")


def refusal(**data: object) -> tuple[str, str]:
    """Pointer and code of what is wrong with fields of `data`, for a tokenizer with two named templates."""
    tokenizer = data.pop("tokenizer", text_tokenizer({"tool_use": CHATML, "rag": OTHER}))
    with pytest.raises(SpecInvalid) as refused:
        encoder_of(tokenizer, **data)  # type: ignore[arg-type] # It is the tokenizer.
    (error,) = refused.value.field_errors
    return error.pointer, error.code


def test_auto_follows_whether_the_tokenizer_has_a_chat_template() -> None:
    assert encoder_of(text_tokenizer(), template="auto").template == "alpaca"
    assert encoder_of(text_tokenizer(CHATML), template="auto").template == "chat"
    assert encoder_of(text_tokenizer(CHATML), template="alpaca").template == "alpaca"


def test_chat_without_a_chat_template_is_refused_by_name() -> None:
    assert refusal(tokenizer=text_tokenizer(), template="chat") == ("/data/template", "no_chat_template")
    assert refusal(tokenizer=text_tokenizer(), template="auto", chat_template_kwargs={"a": 1}) == (
        "/data/chat_template_kwargs",
        "no_chat_template",
    )


def test_named_templates_without_a_default_are_refused_listing_the_names() -> None:
    assert refusal() == ("/data/template_name", "template_name_missing")
    assert refusal(template_name="rug") == ("/data/template_name", "template_unknown")
    tokenizer = text_tokenizer({"tool_use": CHATML, "rag": OTHER})
    assert pieces(encoder_of(tokenizer, template_name="rag").encode([QUESTION]).samples[0], tokenizer)[0].startswith(
        "<|start|>user"
    )


def test_samples_with_tools_are_rendered_by_the_template_for_tools() -> None:
    tokenizer = text_tokenizer({"default": CHATML, "tool_use": FAMILIES["qwen 2.5"].template})
    with_tools = Sample(QUESTION.conversation, tools='[{"type":"function","function":{"name":"look_up"}}]')
    plain, tooled = encoder_of(tokenizer).encode([QUESTION, with_tools]).samples
    assert tokenizer.decode(plain.prompt_ids).startswith("<|im_start|>user")
    assert '"name": "look_up"' in tokenizer.decode(tooled.prompt_ids)


def test_a_template_of_the_specification_takes_the_place_of_the_tokenizers() -> None:
    tokenizer = text_tokenizer(CHATML)
    (encoded,) = encoder_of(tokenizer, chat_template=OTHER).encode([QUESTION]).samples
    assert tokenizer.decode(encoded.prompt_ids) == "<|start|>user\nWhy?<|im_end|>\n<|start|>assistant\n"
    data = Data(train=DataRef(path="x"), chat_template=OTHER)
    assert chat_template_sources(data, tokenizer) == {"default": OTHER}


def test_a_variable_that_the_template_does_not_read_is_refused() -> None:
    tokenizer = text_tokenizer(FAMILIES["qwen 3"].template)
    assert refusal(tokenizer=tokenizer, chat_template_kwargs={"enable_thinkin": False}) == (
        "/data/chat_template_kwargs/enable_thinkin",
        "template_variable_unknown",
    )


@pytest.mark.parametrize(
    "template",
    [
        "{{ bos_token.missing.name }}" + CHATML,
        "{{ messages[0]['content'] + 1 }}" + CHATML,
        "{% for m in messages %}",
        "{{ raise_exception('never') }}",
        "{% for m in messages %}{{ m.role }}{% endfor %}",
        "",
    ],
)
def test_a_template_that_renders_no_question_and_answer_is_refused_as_the_users(template: str) -> None:
    tokenizer = text_tokenizer(template)
    assert refusal(tokenizer=tokenizer) == ("/data/template", "template_unusable")


def test_samples_that_the_template_refuses_are_named_with_its_reason() -> None:
    demanding = encoder_of(text_tokenizer(FAMILIES["system is demanded"].template))
    with pytest.raises(DatasetInvalid, match="'default' cannot render sample 2 of the data: A system message must"):
        demanding.encode([talk("Why?", "Because.", system="Be brief."), QUESTION])
    with pytest.raises(DatasetInvalid, match="System role not supported"):
        encoder_of(text_tokenizer(FAMILIES["gemma"].template)).encode([talk("Why?", "So.", system="Be brief.")])


def test_a_system_message_of_the_specification_is_given_to_samples_without_one() -> None:
    tokenizer = text_tokenizer(FAMILIES["system is demanded"].template)
    encoder = encoder_of(tokenizer, system="Be kind.")
    own, given = encoder.encode([talk("Why?", "Because.", system="Be brief."), QUESTION]).samples
    assert "Be brief." in tokenizer.decode(own.prompt_ids)
    assert "Be kind." in tokenizer.decode(given.prompt_ids)
    assert "Be kind." not in tokenizer.decode(own.prompt_ids)


def test_a_template_without_tools_and_tools_undefined_are_told_apart_as_transformers_does() -> None:
    template = "{% if tools is not none %}{{ tools | length }}{% endif %}" + CHATML
    tokenizer = text_tokenizer(template)
    assert tokenizer.decode(encoder_of(tokenizer).encode([QUESTION]).samples[0].input_ids).startswith("<|im_start|>")


def test_nothing_that_ends_an_answer_is_refused() -> None:
    with pytest.raises(ModelUnsupported):
        encoder_of(text_tokenizer(eos=None), template="alpaca")
    with pytest.raises(ModelUnsupported):
        encoder_of(text_tokenizer(FAMILIES["glm 4"].template, eos=None))


def test_whatever_the_template_leaves_out_is_named() -> None:
    ignores_system = text_tokenizer(
        "{% for m in messages %}{% if m.role != 'system' %}"
        "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}" + CHATML_PROMPT
    )
    sample = Sample(
        (
            Message("system", "Why?"),
            Message("user", "Why?"),
            Message("assistant", "Because.", reasoning="Hm"),
        ),
        tools='[{"name":"look_up"}]',
    )
    counts = encoder_of(ignores_system).encode([sample, QUESTION]).counts
    assert counts.left_out == {"system": 1, "reasoning_content": 1, "tools": 1}


def test_a_template_that_leaves_out_the_question_is_refused() -> None:
    forgets = CHATML.replace(
        "m['content']", "(m['content'] if m['role'] != 'user' or not m['content'].startswith('Why') else '')"
    )
    with pytest.raises(DatasetInvalid, match="leaves out what the user says"):
        encoder_of(text_tokenizer(forgets)).encode([QUESTION])


def test_answers_that_are_not_trained_on_are_text_without_labels() -> None:
    tokenizer = text_tokenizer(CHATML)
    first, wrong, second, right = talk("Why?", "No idea.", "Really?", "Because.").conversation
    sample = Sample((first, wrong._replace(train=False), second, right))
    (encoded,) = encoder_of(tokenizer).encode([sample]).samples
    assert pieces(encoded, tokenizer)[1:] == ["Because.<|im_end|>", "\n"]
    assert "No idea.<|im_end|>" in tokenizer.decode(encoded.prompt_ids)


def test_a_prompt_that_waits_for_its_answer_is_the_prompt_of_an_answer() -> None:
    for name in ("chatml", "chatml without a generation prompt", "deepseek r1", "mistral", "qwen 3"):
        tokenizer = text_tokenizer(FAMILIES[name].template, eos=FAMILIES[name].eos)
        waiting, answered = encoder_of(tokenizer).encode([Sample((Message("user", "Why?"),)), QUESTION]).samples
        assert waiting.prompt_ids == waiting.input_ids == answered.prompt_ids
        assert waiting.predicted_tokens == 0


def test_tools_and_calls_are_rendered() -> None:
    tokenizer = text_tokenizer(FAMILIES["qwen 2.5"].template)
    call = ToolCall("look_up", '{"word":"überall"}')
    sample = Sample(
        (
            Message("user", "What is it?"),
            Message("assistant", "", tool_calls=(call,)),
            Message("tool", "a word"),
            Message("assistant", "A word."),
        ),
        tools='[{"type":"function","function":{"name":"look_up","description":"Looks up."}}]',
    )
    encoded = encoder_of(tokenizer).encode([sample])
    assert not encoded.counts.left_out
    prompt, calling, *_ = pieces(encoded.samples[0], tokenizer)
    assert prompt.endswith("<|im_start|>assistant\n") or prompt.endswith("<|im_start|>assistant")
    assert calling.endswith('{"name": "look_up", "arguments": {"word": "überall"}}\n</tool_call><|im_end|>')


def test_arguments_are_given_as_text_where_the_template_joins_them_to_text() -> None:
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.tool_calls %}"
        "{{ m.tool_calls[0].function.name + ' ' + m.tool_calls[0].function.arguments }}{% else %}{{ m.content }}"
        "{% endif %}{{ '<|im_end|>\n' }}{% endfor %}" + CHATML_PROMPT
    )
    tokenizer = text_tokenizer(template)
    calling = Message("assistant", "", tool_calls=(ToolCall("look_up", '{"word":"a"}'),))
    (encoded,) = encoder_of(tokenizer).encode([Sample((Message("user", "What?"), calling))]).samples
    assert pieces(encoded, tokenizer)[1] == 'look_up {"word":"a"}<|im_end|>'


def test_the_next_control_token_ends_an_answer_where_the_generation_config_says_so() -> None:
    plain = text_tokenizer(FAMILIES["glm 4"].template, eos="<|endoftext|>")
    user = plain.id_of("<|user|>")
    assert user is not None
    tokenizer = replace(plain, configured_end_ids=frozenset({user}))
    (encoded,) = encoder_of(tokenizer).encode([talk("Why?", "Because.", "Really?", "Yes.")]).samples
    assert pieces(encoded, tokenizer)[1] == "Because.<|user|>"
    assert pieces(encoded, tokenizer)[3] == "Yes.<|endoftext|>"
