"""Samples to token ids and padded batches, with real byte-level tokenizers whose pad token is the end token."""

import itertools
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from pocl.data.batches import Batch, EncodedSample, Prompting, collate, encode
from pocl.samples.sample import Message, Sample
from tests.pocl.byte_tokenizers import CHATML, byte_tokenizer

PLAIN = byte_tokenizer()
CHAT = byte_tokenizer(CHATML)
BEGINS = byte_tokenizer(begins=True)
END = CHAT.eos_token_id

text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).filter(str.strip)


@st.composite
def conversations(draw: st.DrawFn) -> Sample:
    exchanges = draw(st.lists(st.tuples(text, text), min_size=1, max_size=3))
    messages = [
        message for asked, answered in exchanges for message in (Message("user", asked), Message("assistant", answered))
    ]
    return Sample(tuple(messages))


@st.composite
def encodings(draw: st.DrawFn) -> EncodedSample:
    ids = draw(st.lists(st.integers(0, 9), min_size=2, max_size=9))
    prompt = draw(st.integers(1, len(ids) - 1))
    start, stop = sorted(draw(st.tuples(st.integers(0, prompt), st.integers(0, prompt))))
    return EncodedSample("d", tuple(ids), prompt, ((start, stop),))


def encode_with(
    sample: Sample,
    prompting: Prompting = Prompting.CHAT,
    *,
    length: int = 10_000,
    prompt: int = 9_000,
    begins: bool = False,
) -> EncodedSample:
    tokenizer = CHAT if prompting is Prompting.CHAT else BEGINS if begins else PLAIN
    return encode(sample, tokenizer, prompting, max_length=length, max_prompt_length=prompt, eos_token_id=END)


def decode(ids: Sequence[int], tokenizer: PreTrainedTokenizerFast = CHAT) -> str:
    found = tokenizer.decode(list(ids))
    assert isinstance(found, str)
    return found


def labelled_text(encoded: EncodedSample) -> str:
    return decode([token for token, response in zip(encoded.input_ids, encoded.label_mask, strict=True) if response])


def say(instruction: str, output: str) -> Sample:
    return Sample((Message("user", instruction), Message("assistant", output)))


TALK = Sample(
    (
        Message("user", "Why?"),
        Message("assistant", "Because."),
        Message("user", "Really?"),
        Message("assistant", "Yes."),
    )
)


def test_chat_is_tokenised_as_its_rendered_text() -> None:
    whole = [message._asdict() for message in TALK.conversation]
    ids = CHAT(CHAT.apply_chat_template(whole, tokenize=False))["input_ids"]
    ids_of_sample = encode_with(TALK).input_ids
    assert list(ids_of_sample) == ids[: len(ids_of_sample)]
    assert decode(ids[len(ids_of_sample) :]) == "\n"


def test_labels_are_the_assistant_turns_with_their_end_tokens() -> None:
    assert labelled_text(encode_with(TALK)) == "Because.<|im_end|>Yes.<|im_end|>"


def test_last_turn_is_separated_from_earlier_turns() -> None:
    encoded = encode_with(TALK)
    assert decode(encoded.reference_ids) == "Yes.<|im_end|>"
    assert decode(encoded.prompt_ids).endswith("Really?<|im_end|>\n<|im_start|>assistant\n")


def test_prompt_equals_the_generation_prompt_of_the_template() -> None:
    turns = [message._asdict() for message in TALK.prompt_messages]
    opened = CHAT.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert list(encode_with(TALK).prompt_ids) == CHAT(opened)["input_ids"]


def test_first_reference_is_trained_on_and_the_digest_kept() -> None:
    sample = Sample((Message("user", "Why?"), Message("assistant", "Because.")), "", ("Because.", "So."))
    encoded = encode_with(sample, Prompting.ALPACA)
    assert labelled_text(encoded) == "Because.<|im_end|>"
    assert encoded.digest == sample.digest


@given(conversations(), st.sampled_from(Prompting))
def test_responses_are_labelled_whatever_the_text(sample: Sample, prompting: Prompting) -> None:
    encoded = encode_with(sample, prompting)
    answers = [message.content for message in sample.prompt_messages if message.role == "assistant"]
    assert labelled_text(encoded) == "".join(answer + "<|im_end|>" for answer in [*answers, sample.references[0]])
    assert encoded.prompt_ids + encoded.reference_ids == encoded.input_ids


def test_prompt_and_answer_are_tokenised_apart_where_tokens_would_merge() -> None:
    # "\n\n" is one token, so the joint ids of "...Response:\n" and "\n\nWord" do not begin with the prompt's.
    assert len(PLAIN("\n\n")["input_ids"]) == 1
    encoded = encode_with(say("Why?", "\n\nWord"), Prompting.ALPACA)
    prompt = decode(encoded.prompt_ids, PLAIN)
    assert prompt.endswith("### Response:\n")
    assert list(encoded.prompt_ids) == PLAIN(prompt)["input_ids"]
    assert decode(encoded.reference_ids, PLAIN) == "\n\nWord<|im_end|>"


@given(conversations(), st.sampled_from(Prompting), st.integers(1, 60), st.integers(1, 60), st.booleans())
def test_truncation_cuts_the_prompt_left_and_the_response_right(
    sample: Sample, prompting: Prompting, prompt: int, room: int, begins: bool
) -> None:
    begins = begins and prompting is Prompting.ALPACA
    whole = encode_with(sample, prompting, begins=begins)
    cut = encode_with(sample, prompting, length=prompt + room, prompt=prompt, begins=begins)
    assert len(cut.prompt_ids) == min(prompt, len(whole.prompt_ids))
    assert len(cut.input_ids) <= prompt + room
    kept = len(cut.prompt_ids) - (1 if begins and prompt > 1 else 0)
    assert cut.prompt_ids[-kept:] == whole.prompt_ids[-kept:]
    assert cut.reference_ids == whole.reference_ids[: prompt + room - len(cut.prompt_ids)]
    assert len(cut.reference_ids) >= 1


@given(conversations(), st.integers(1, 60))
def test_truncation_moves_the_labels_with_their_tokens(sample: Sample, prompt: int) -> None:
    whole, cut = encode_with(sample), encode_with(sample, prompt=prompt)
    assert cut.label_mask == whole.label_mask[-len(cut.input_ids) :]


def test_only_an_uncut_response_has_its_end_token() -> None:
    sample = say("Why?", "The answer is a word.")
    whole = encode_with(sample)
    fits, short = (
        encode_with(sample, length=len(whole.input_ids) - less, prompt=len(whole.prompt_ids)) for less in (0, 1)
    )
    assert fits == whole
    assert whole.reference_ids[-1] == END
    assert short.reference_ids == whole.reference_ids[:-1]
    assert END not in short.reference_ids


def test_response_marker_survives_a_long_prompt() -> None:
    encoded = encode_with(say("long " * 500, "Word."), Prompting.ALPACA, prompt=20)
    assert decode(encoded.prompt_ids, PLAIN).endswith("long \n\n### Response:\n")


def test_begin_token_comes_first_and_survives_truncation() -> None:
    sample = say("long " * 50, "Word.")
    whole = encode_with(sample, Prompting.ALPACA, begins=True)
    cut = encode_with(sample, Prompting.ALPACA, begins=True, prompt=20)
    assert decode(whole.prompt_ids, BEGINS).startswith("<s>Below is")
    assert cut.prompt_ids[0] == BEGINS.bos_token_id
    assert cut.prompt_ids.count(BEGINS.bos_token_id) == 1
    assert len(cut.prompt_ids) == 20


@pytest.mark.parametrize(("length", "prompt"), [(8, 8), (8, 0), (8, 9)])
def test_lengths_without_room_for_a_response_are_refused(length: int, prompt: int) -> None:
    with pytest.raises(ValueError, match="max_prompt_length"):
        encode_with(TALK, length=length, prompt=prompt)


def labels_of_samples(encoded_samples: list[EncodedSample]) -> list[tuple[int, int, int, bool]]:
    """(sample, position, next token, of the last turn?) for each position whose next token is labelled."""
    return [
        (at, position, encoded.input_ids[position + 1], position + 1 >= encoded.prompt_length)
        for at, encoded in enumerate(encoded_samples)
        for position in range(len(encoded.input_ids) - 1)
        if encoded.label_mask[position + 1]
    ]


def labels_of_batch(batch: Batch) -> list[tuple[int, int, int, bool]]:
    where = batch.predicts.nonzero().tolist()
    return [
        (*at, *what)
        for at, what in zip(where, zip(batch.labels.tolist(), batch.last_turn.tolist(), strict=True), strict=True)
    ]


@given(st.lists(encodings(), min_size=1, max_size=4), st.integers(0, 9), st.integers(0, 3))
def test_labels_are_the_next_tokens_shifted_once(encoded_samples: list[EncodedSample], pad: int, extra: int) -> None:
    length = max(len(encoded.input_ids) for encoded in encoded_samples) + extra
    batch = collate(encoded_samples, pad, length=length)
    assert labels_of_batch(batch) == labels_of_samples(encoded_samples)
    assert batch.tokens == len(batch.labels) == int(batch.predicts.sum())


@given(st.lists(encodings(), min_size=1, max_size=4), st.integers(0, 9))
def test_padding_is_on_the_right_and_masked(encoded_samples: list[EncodedSample], pad: int) -> None:
    batch = collate(encoded_samples, pad)
    lengths = [len(encoded.input_ids) for encoded in encoded_samples]
    assert batch.attention_mask.sum(dim=1).tolist() == lengths
    for ids, encoded in zip(batch.input_ids.tolist(), encoded_samples, strict=True):
        assert tuple(ids[: len(encoded.input_ids)]) == encoded.input_ids
        assert set(ids[len(encoded.input_ids) :]) <= {pad}


def test_oracle_of_the_next_token_is_right_at_every_label() -> None:
    encoded_samples = [encode_with(TALK), encode_with(say("Why?", "The answer is a word."))]
    batch = collate(encoded_samples, END)
    oracle = torch.nn.functional.one_hot(batch.input_ids.roll(-1, dims=1), len(CHAT))
    assert torch.equal(oracle[batch.predicts].argmax(-1), batch.labels)


def test_end_token_is_labelled_and_padding_with_its_id_is_not() -> None:
    assert CHAT.pad_token_id == CHAT.eos_token_id
    encoded_samples = [encode_with(say("Why?", "No.")), encode_with(say("Why?", "The answer is a word."))]
    batch = collate(encoded_samples, CHAT.pad_token_id)
    assert (batch.labels == END).sum() == 2
    assert batch.tokens == sum(len(encoded.reference_ids) for encoded in encoded_samples)
    assert not (batch.predicts & (batch.attention_mask == 0)).any()


@given(st.permutations([say("Why?", "No."), TALK, say("How?", "The answer is a word.")]))
def test_labels_of_a_batch_are_those_of_its_samples_in_order(samples: list[Sample]) -> None:
    encoded_samples = [encode_with(sample) for sample in samples]
    alone = list(itertools.chain.from_iterable(collate([encoded]).labels.tolist() for encoded in encoded_samples))
    assert collate(encoded_samples).labels.tolist() == alone


def test_sample_longer_than_the_batch_is_refused() -> None:
    encoded = encode_with(TALK)
    with pytest.raises(ValueError, match="more than"):
        collate([encoded], length=len(encoded.input_ids) - 1)
    with pytest.raises(ValueError, match="needs a sample"):
        collate([])
