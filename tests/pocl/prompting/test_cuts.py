"""Chat prompts that are too long, answers that are too long, and the counts of both."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pocl.errors import DatasetInvalid
from pocl.prompting.encoding import SampleEncoder
from pocl.prompting.encoding_warnings import encoding_warnings
from pocl.samples.sample import Message, Sample
from tests.pocl.prompting.chat_templates import CHATML, FAMILIES
from tests.pocl.prompting.encoders import encoder_of, talk
from tests.pocl.prompting.tokenizers import text_tokenizer

TOKENIZER = text_tokenizer(FAMILIES["llama 3"].template, eos="<|eot_id|>")
LONG = " ".join(f"word{index}" for index in range(100))
HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"


def encoder(prompt: int, length: int = 5000) -> SampleEncoder:
    return replace(encoder_of(TOKENIZER), max_length=length, max_prompt_length=prompt)


def test_a_long_question_loses_its_oldest_text_and_nothing_else() -> None:
    result = encoder(80).encode([talk(LONG, "Because.", system="Be brief.")])
    prompt = TOKENIZER.decode(result.samples[0].prompt_ids)
    system = "<s>" + HEADER.format("system") + "Be brief.<|eot_id|>" + HEADER.format("user")
    assert prompt.startswith(system)
    assert prompt.endswith("word99<|eot_id|>" + HEADER.format("assistant"))
    assert LONG.endswith(prompt.removeprefix(system).partition("<|eot_id|>")[0])
    assert 70 <= len(result.samples[0].prompt_ids) <= 80
    assert (result.counts.prompts_cut, result.counts.turns_dropped, result.counts.rows_too_long) == (1, 0, 1)


def test_the_oldest_turns_are_dropped_before_any_text() -> None:
    sample = talk("one", "1", "two", "2", "three", "3", "four", "4", system="Count.")
    whole = encoder(4000).encode([sample]).samples[0]
    result = encoder(len(whole.prompt_ids) - 1).encode([sample])
    expected = encoder(4000).encode([talk("two", "2", "three", "3", "four", "4", system="Count.")]).samples[0]
    assert result.samples[0].input_ids == expected.input_ids
    assert result.samples[0].response_spans == expected.response_spans
    assert (result.counts.prompts_cut, result.counts.turns_dropped) == (1, 1)
    assert result.counts.tokens_cut == len(whole.input_ids) - len(expected.input_ids)


@settings(max_examples=30)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=4), st.integers(35, 90))
def test_every_cut_prompt_has_the_frame_and_fits(words: list[int], limit: int) -> None:
    contents = [" ".join(["word"] * number) for number in words for _ in range(2)]
    (encoded,) = encoder(limit).encode([talk(*contents, system="Be brief.")]).samples
    prompt = TOKENIZER.decode(encoded.prompt_ids)
    assert len(encoded.prompt_ids) <= limit
    assert prompt.startswith("<s>")
    assert prompt.endswith(HEADER.format("assistant"))


def test_a_question_keeps_itself_and_its_context_loses_its_oldest_text() -> None:
    sample = Sample((Message("user", "What is the last word?"), Message("assistant", "word99")), context=LONG)
    result = encoder(80).encode([sample])
    prompt = TOKENIZER.decode(result.samples[0].prompt_ids)
    assert "What is the last word?\n\n" in prompt
    assert "word0 " not in prompt
    assert prompt.endswith("word99<|eot_id|>" + HEADER.format("assistant"))
    assert len(result.samples[0].prompt_ids) <= 80
    longer = replace(sample, conversation=(Message("user", f"{LONG} First?"), Message("assistant", "word99")))
    cut = TOKENIZER.decode(encoder(80).encode([longer]).samples[0].prompt_ids)
    assert cut.startswith("<s>" + HEADER.format("user"))
    assert "First?" in cut


def test_the_result_of_a_tool_that_is_longer_than_the_question_loses_its_text() -> None:
    talk = (
        Message("user", "What is the last word?"),
        Message("assistant", "I look."),
        Message("tool", LONG),
        Message("assistant", "word99"),
    )
    result = encoder(90).encode([Sample(talk)])
    prompt = TOKENIZER.decode(result.samples[0].prompt_ids)
    assert "What is the last word?" in prompt
    assert prompt.endswith("word99<|eot_id|>" + HEADER.format("assistant"))
    assert len(result.samples[0].prompt_ids) <= 90


@pytest.mark.parametrize("sample", [talk("Why?", "So.", system=LONG), talk("one", "1", "two", "2", system=LONG)])
def test_a_frame_that_does_not_fit_is_refused_by_template_and_sample(sample: Sample) -> None:
    with pytest.raises(DatasetInvalid) as refused:
        encoder(80).named("the train set").encode([talk("Why?", "So."), sample])
    message = str(refused.value)
    assert "'default'" in message
    assert "sample 2 of the train set" in message
    assert "data.max_prompt_length is 80" in message


def test_a_question_of_which_nothing_would_be_left_is_refused() -> None:
    (whole,) = encoder(4000).encode([talk("x", "So.")]).samples
    frame = len(whole.prompt_ids) - 1
    assert len(encoder(frame + 1).encode([talk(LONG, "So.")]).samples[0].prompt_ids) <= frame + 1
    with pytest.raises(DatasetInvalid, match="next to nothing left of the last question"):
        encoder(frame).encode([talk(LONG, "So.")])


def test_an_alpaca_prompt_that_loses_its_question_is_counted_and_told() -> None:
    whole = encoder_of(TOKENIZER, template="alpaca")
    limit = len(whole.encode([talk("Why?", "So.")]).samples[0].prompt_ids)
    alpaca = replace(whole, max_prompt_length=limit)
    sample = Sample((Message("user", "What is the last word?"), Message("assistant", "word99")), context=LONG)
    kept = Sample((Message("user", f"{LONG} What is the last word?"), Message("assistant", "word99")))
    result = alpaca.encode([sample, kept, talk("Why?", "So.")])
    assert (result.counts.prompts_cut, result.counts.questions_lost) == (2, 1)
    codes = {warning.code: warning.message for warning in encoding_warnings(alpaca, {"train": result.counts})}
    assert "1 of 3 prompts" in codes["questions_lost"]


def test_an_answer_beyond_the_length_loses_its_end_and_is_counted() -> None:
    result = encoder(50, 60).encode([talk("Why?", LONG), talk("Why?", "So.")])
    assert (result.counts.answers_cut, result.counts.ends_lost, result.counts.prompts_cut) == (1, 1, 0)
    assert len(result.samples[0].input_ids) == 60
    assert result.samples[1].reference_ids[-1] == TOKENIZER.eos_id
    assert result.counts.rows == 2
    assert sum(result.counts.lengths.values()) == 2
    (warning,) = encoding_warnings(encoder(50, 60), {"train": result.counts})
    assert warning.code == "samples_cut"
    assert "1 of 2 answers" in warning.message


def test_tokens_of_the_template_behind_the_answer_do_not_count_as_cut() -> None:
    chatml = text_tokenizer(CHATML)
    whole = encoder_of(chatml).encode([talk("Why?", "So.")]).samples[0]
    assert whole.trailing_tokens == 1
    fits = replace(encoder_of(chatml), max_length=whole.response_stop, max_prompt_length=len(whole.prompt_ids))
    result = fits.encode([talk("Why?", "So.")])
    assert result.samples[0].reference_ids == whole.reference_ids
    assert result.counts.answers_cut == 0
