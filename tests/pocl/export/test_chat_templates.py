"""Templates that leave with a student ask it as it was taught."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import AutoTokenizer

from pocl.export.chat_templates import alpaca_chat_template, with_defaults
from pocl.models.tokenizers import text_tokenizer
from pocl.prompting.alpaca import alpaca_turns, tokenise_alpaca
from pocl.samples.sample import Message, Sample
from tests.pocl.byte_tokenizers import byte_tokenizer

CONVERSATIONS = [
    [("user", "What is the answer?"), ("assistant", "A word.")],
    [
        ("system", "Be short."),
        ("user", "Why?"),
        ("assistant", "So."),
        ("user", "And 'now'?\n"),
        ("assistant", " Later "),
    ],
]


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_alpaca_template_renders_to_the_ids_that_are_trained(
    conversation: list[tuple[str, str]], begins: bool, tmp_path: Path
) -> None:
    tokenizer = byte_tokenizer(begins=begins)
    text = text_tokenizer(tokenizer)
    sample = Sample(tuple(Message(role, content) for role, content in conversation))  # type: ignore[arg-type]  # Roles.
    assert text.eos_id is not None
    trained = tokenise_alpaca(alpaca_turns(sample), text, text.eos_id)
    tokenizer.chat_template = alpaca_chat_template(text)
    tokenizer.save_pretrained(tmp_path)
    served = AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": role, "content": content} for role, content in conversation]
    whole = served.apply_chat_template(messages, tokenize=True, return_dict=False)
    prompt = served.apply_chat_template(messages[:-1], tokenize=True, return_dict=False, add_generation_prompt=True)
    assert (tuple(whole), tuple(prompt)) == (trained.ids, trained.ids[: trained.prompt_length])


values = st.recursive(
    st.none() | st.booleans() | st.integers(-1000, 1000) | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@given(values, values)
def test_variables_have_the_values_of_the_training_unless_given(trained: object, given_value: object) -> None:
    template = ImmutableSandboxedEnvironment().from_string(with_defaults("{{ v | tojson }}", {"v": trained}))  # type: ignore[dict-item]  # JSON.
    plain = ImmutableSandboxedEnvironment().from_string("{{ v | tojson }}")
    assert template.render() == plain.render(v=trained)
    assert template.render(v=given_value) == plain.render(v=given_value)
