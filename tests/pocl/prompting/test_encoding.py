"""Samples to token ids, with real byte-level tokenizers: what is labelled, and what is cut."""

from dataclasses import replace
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocl.errors import DatasetInvalid
from pocl.prompting.encoded_sample import EncodedSample
from pocl.samples.sample import Message, Sample
from tests.pocl.encoders import BEGINS, CHAT, END, PLAIN, TALK, decode, encode_with, say

text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).filter(str.strip)


@st.composite
def conversations(draw: st.DrawFn) -> Sample:
    exchanges = draw(st.lists(st.tuples(text, text), min_size=1, max_size=3))
    messages = [
        message for asked, answered in exchanges for message in (Message("user", asked), Message("assistant", answered))
    ]
    return Sample(tuple(messages))


def labelled_text(encoded: EncodedSample) -> str:
    return decode([token for token, response in zip(encoded.input_ids, encoded.label_mask, strict=True) if response])


def test_chat_is_tokenised_as_its_rendered_text() -> None:
    whole = [{"role": message.role, "content": message.content} for message in TALK.conversation]
    assert list(encode_with(TALK).input_ids) == CHAT(CHAT.apply_chat_template(whole, tokenize=False))["input_ids"]


def test_labels_are_the_assistant_turns_with_their_end_tokens() -> None:
    assert labelled_text(encode_with(TALK)) == "Because.<|im_end|>Yes.<|im_end|>"


def test_last_turn_is_separated_from_earlier_turns() -> None:
    encoded = encode_with(TALK)
    assert decode(encoded.reference_ids) == "Yes.<|im_end|>"
    assert decode(encoded.prompt_ids).endswith("Really?<|im_end|>\n<|im_start|>assistant\n")


def test_prompt_equals_the_generation_prompt_of_the_template() -> None:
    turns = [{"role": message.role, "content": message.content} for message in TALK.prompt_messages]
    opened = CHAT.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert list(encode_with(TALK).prompt_ids) == CHAT(opened)["input_ids"]


def test_first_reference_is_trained_on_and_the_digest_kept() -> None:
    sample = Sample((Message("user", "Why?"), Message("assistant", "Because.")), "", ("Because.", "So."))
    encoded = encode_with(sample, "alpaca")
    assert labelled_text(encoded) == "Because.<|im_end|>"
    assert encoded.digest == sample.digest


@given(conversations(), st.sampled_from(["chat", "alpaca"]))
def test_responses_are_labelled_whatever_the_text(sample: Sample, template: Literal["chat", "alpaca"]) -> None:
    encoded = encode_with(sample, template)
    answers = [message.content for message in sample.prompt_messages if message.role == "assistant"]
    assert labelled_text(encoded) == "".join(answer + "<|im_end|>" for answer in [*answers, sample.references[0]])
    assert encoded.input_ids[: encoded.response_stop] == encoded.prompt_ids + encoded.reference_ids


def test_prompt_and_answer_are_tokenised_apart_where_tokens_would_merge() -> None:
    # "\n\n" is one token, so the joint ids of "...Response:\n" and "\n\nWord" do not begin with the prompt's.
    assert len(PLAIN("\n\n")["input_ids"]) == 1
    encoded = encode_with(say("Why?", "\n\nWord"), "alpaca")
    prompt = decode(encoded.prompt_ids, PLAIN)
    assert prompt.endswith("### Response:\n")
    assert list(encoded.prompt_ids) == PLAIN(prompt)["input_ids"]
    assert decode(encoded.reference_ids, PLAIN) == "\n\nWord<|im_end|>"


@given(conversations(), st.integers(1, 60), st.integers(1, 60), st.booleans())
def test_alpaca_prompts_are_cut_from_the_left_and_responses_from_the_right(
    sample: Sample, prompt: int, room: int, begins: bool
) -> None:
    whole = encode_with(sample, "alpaca", begins=begins)
    cut = encode_with(sample, "alpaca", length=prompt + room, prompt=prompt, begins=begins)
    assert len(cut.prompt_ids) == min(prompt, len(whole.prompt_ids))
    assert len(cut.input_ids) <= prompt + room
    kept = len(cut.prompt_ids) - (1 if begins and prompt > 1 else 0)
    assert cut.prompt_ids[-kept:] == whole.prompt_ids[-kept:]
    assert cut.reference_ids == whole.reference_ids[: prompt + room - len(cut.prompt_ids)]
    assert len(cut.reference_ids) >= 1


@given(conversations(), st.integers(1, 60))
def test_cuts_of_alpaca_prompts_move_the_labels_with_their_tokens(sample: Sample, prompt: int) -> None:
    whole, cut = encode_with(sample, "alpaca"), encode_with(sample, "alpaca", prompt=prompt)
    assert cut.label_mask == whole.label_mask[-len(cut.input_ids) :]


@given(conversations(), st.integers(1, 90), st.integers(1, 60))
def test_chat_samples_fit_into_every_length_and_keep_their_answer_or_are_refused(
    sample: Sample, prompt: int, room: int
) -> None:
    whole = encode_with(sample)
    try:
        cut = encode_with(sample, length=prompt + room, prompt=prompt)
    except DatasetInvalid:
        # Nothing would be left of the last question.
        assert prompt < len(encode_with(replace(sample, conversation=sample.conversation[-2:])).prompt_ids)
        return
    assert len(cut.prompt_ids) <= prompt
    assert len(cut.input_ids) <= prompt + room
    assert cut.reference_ids == whole.reference_ids[: prompt + room - len(cut.prompt_ids)]
    assert len(cut.reference_ids) >= 1


def test_only_an_uncut_response_has_its_end_token() -> None:
    sample = say("Why?", "The answer is a word.")
    whole = encode_with(sample)
    fits, short = (
        encode_with(sample, length=whole.response_stop - less, prompt=len(whole.prompt_ids)) for less in (0, 1)
    )
    assert fits.reference_ids == whole.reference_ids
    assert whole.reference_ids[-1] == END
    assert short.reference_ids == whole.reference_ids[:-1]
    assert END not in short.reference_ids


def test_response_marker_survives_a_long_prompt() -> None:
    encoded = encode_with(say("long " * 500, "Word."), "alpaca", prompt=20)
    assert decode(encoded.prompt_ids, PLAIN).endswith("long \n\n### Response:\n")


def test_begin_token_comes_first_and_survives_truncation() -> None:
    sample = say("long " * 50, "Word.")
    whole = encode_with(sample, "alpaca", begins=True)
    cut = encode_with(sample, "alpaca", begins=True, prompt=20)
    assert decode(whole.prompt_ids, BEGINS).startswith("<s>Below is")
    assert cut.prompt_ids[0] == BEGINS.bos_token_id
    assert cut.prompt_ids.count(BEGINS.bos_token_id) == 1
    assert len(cut.prompt_ids) == 20


@pytest.mark.parametrize(("length", "prompt"), [(8, 8), (8, 0), (8, 9)])
def test_lengths_without_room_for_a_response_are_refused(length: int, prompt: int) -> None:
    with pytest.raises(ValueError, match="max_prompt_length"):
        encode_with(TALK, length=length, prompt=prompt)
