"""Chat prompts that are too long, answers that are too long, and the counts of both."""

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from pocl.prompting.encoding import SampleEncoder
from pocl.prompting.encoding_warnings import encoding_warnings
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
@given(st.lists(st.integers(1, 20), min_size=1, max_size=4), st.integers(25, 90))
def test_every_cut_prompt_has_the_frame_and_fits(words: list[int], limit: int) -> None:
    contents = [" ".join(["word"] * number) for number in words for _ in range(2)]
    (encoded,) = encoder(limit).encode([talk(*contents, system="Be brief.")]).samples
    prompt = TOKENIZER.decode(encoded.prompt_ids)
    assert len(encoded.prompt_ids) <= limit
    assert prompt.startswith("<s>")
    assert prompt.endswith(HEADER.format("assistant"))


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
