"""Samples to text, by the Alpaca prompt and by chat templates of different manners."""

import pytest
from transformers import PreTrainedTokenizerFast

from pocl.data.prompting import Prompting, Turn, assistant_turns, end_of_response_id
from pocl.errors import DatasetInvalid, ModelUnsupported, SpecInvalid
from pocl.samples.sample import Message, Sample
from tests.pocl.byte_tokenizers import CHATML, byte_tokenizer

PLAIN = byte_tokenizer()
CHAT = byte_tokenizer(CHATML)
END = PLAIN.eos_token_id


def asked(*messages: Message, answers: tuple[str, ...], context: str = "") -> Sample:
    return Sample((*messages, Message("assistant", answers[0])), context, answers)


QUESTION = asked(Message("user", "Why?"), answers=("Because.", "So."))
TALK = asked(
    Message("system", "Be brief."),
    Message("user", "Why?"),
    Message("assistant", "Because."),
    Message("user", "Really?"),
    answers=("Yes.",),
)
TALK_MESSAGES = list(TALK.conversation)


def rendered(tokenizer: PreTrainedTokenizerFast, messages: list[Message]) -> str:
    return str(tokenizer.apply_chat_template([message._asdict() for message in messages], tokenize=False))


def turns(sample: Sample, chat_template: str) -> list[Turn]:
    return assistant_turns(sample, byte_tokenizer(chat_template), Prompting.CHAT, END)


def test_auto_follows_whether_the_tokenizer_has_a_chat_template() -> None:
    assert Prompting.choose("auto", PLAIN) is Prompting.ALPACA
    assert Prompting.choose("auto", CHAT) is Prompting.CHAT
    assert Prompting.choose("alpaca", CHAT) is Prompting.ALPACA
    assert Prompting.choose("chat", CHAT) is Prompting.CHAT


def test_chat_without_a_chat_template_is_refused_by_name() -> None:
    with pytest.raises(SpecInvalid) as refused:
        Prompting.choose("chat", PLAIN)
    assert refused.value.field_errors[0].pointer == "/data/template"


def test_alpaca_prompt_equals_that_of_the_experiments() -> None:
    assert assistant_turns(QUESTION, PLAIN, Prompting.ALPACA, END) == [
        Turn(
            "Below is an instruction that describes a task. Write a response that appropriately completes the "
            "request.\n\n### Instruction:\nWhy?\n\n### Response:\n",
            "Because.",
            has_end_token=True,
        )
    ]


def test_alpaca_prompt_with_an_input_equals_that_of_the_experiments() -> None:
    sample = asked(Message("user", "Sum up."), context="A text.", answers=("Text.",))
    assert assistant_turns(sample, PLAIN, Prompting.ALPACA, END)[0].prompt == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n### Instruction:\nSum up.\n\n"
        "### Input:\nA text.\n\n### Response:\n"
    )


def test_alpaca_repeats_its_headings_for_each_turn_and_a_system_message_leads() -> None:
    first, last = assistant_turns(TALK, PLAIN, Prompting.ALPACA, END)
    assert first == Turn("Be brief.\n\n### Instruction:\nWhy?\n\n### Response:\n", "Because.", has_end_token=True)
    assert last == Turn("\n\n### Instruction:\nReally?\n\n### Response:\n", "Yes.", has_end_token=True)


def test_concatenated_chat_turns_are_the_rendered_conversation() -> None:
    text = "".join(turn.prompt + turn.answer + "<|im_end|>" for turn in turns(TALK, CHATML))
    assert text + "\n" == rendered(CHAT, TALK_MESSAGES)
    assert [turn.answer for turn in turns(TALK, CHATML)] == ["Because.", "Yes."]


def test_an_input_follows_its_instruction_in_a_chat() -> None:
    sample = asked(Message("user", "Sum up."), context="A text.", answers=("Text.",))
    prompt = "<|im_start|>user\nSum up.\n\nA text.<|im_end|>\n<|im_start|>assistant\n"
    assert turns(sample, CHATML) == [Turn(prompt, "Text.", has_end_token=True)]


def test_template_that_strips_text_keeps_its_turns() -> None:
    messages = (Message("user", "Why?"), Message("assistant", " Because. \n"), Message("user", "Really?"))
    first, _ = turns(asked(*messages, answers=("Yes.",)), CHATML.replace("message.content", "message.content | trim"))
    assert (first.answer, first.has_end_token) == ("Because.", True)


def test_space_before_the_end_token_is_ignored() -> None:
    first, last = turns(TALK, CHATML.replace("}}<|im_end|>", "}} <|im_end|>"))
    assert first.has_end_token
    assert last.prompt.startswith("\n<|im_start|>user")


def test_template_without_end_tokens_leaves_earlier_turns_unclosed() -> None:
    plain = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    first, last = turns(TALK, plain)
    assert first == Turn("system: Be brief.\nuser: Why?\nassistant: ", "Because.", has_end_token=False)
    assert last == Turn("\nuser: Really?\nassistant: ", "Yes.", has_end_token=True)


def test_turns_rewritten_by_the_template_become_prompt() -> None:
    forgets = CHATML.replace("{{ message.content }}", "{{ message.content.split('</think>')[-1] }}")
    messages = (Message("user", "Why?"), Message("assistant", "<think>Hm</think>So."), Message("user", "Really?"))
    (only,) = turns(asked(*messages, answers=("Yes.",)), forgets)
    assert only.answer == "Yes."
    assert "So.<|im_end|>" in only.prompt
    assert "Hm" not in only.prompt


def test_sample_refused_by_the_template_is_invalid_data() -> None:
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('No system role') }}{% endif %}" + CHATML
    with pytest.raises(DatasetInvalid, match="No system role"):
        turns(TALK, refusing)
    assert len(turns(QUESTION, refusing)) == 1


def test_response_ends_with_end_of_turn_or_end_of_sequence() -> None:
    turn_end = byte_tokenizer(CHATML.replace("<|im_end|>", "<s>"))
    nothing = byte_tokenizer(CHATML.replace("<|im_end|>", ""))
    assert end_of_response_id(CHAT, Prompting.CHAT) == CHAT.eos_token_id
    assert end_of_response_id(turn_end, Prompting.CHAT) == turn_end.bos_token_id
    assert end_of_response_id(nothing, Prompting.CHAT) == nothing.eos_token_id
    assert end_of_response_id(turn_end, Prompting.ALPACA) == turn_end.eos_token_id


def test_tokenizer_without_an_end_token_is_refused() -> None:
    endless = byte_tokenizer()
    endless.eos_token = None
    with pytest.raises(ModelUnsupported):
        end_of_response_id(endless, Prompting.ALPACA)


def test_template_that_renders_no_conversation_is_refused() -> None:
    with pytest.raises(ModelUnsupported):
        end_of_response_id(byte_tokenizer("{{ raise_exception('never') }}"), Prompting.CHAT)
