"""Samples to token ids and padded batches, with real byte-level tokenizers whose pad token is the end token."""

import itertools
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from pocl.data.batches import Batch, EncodedSample, Prompting, collate, encode
from pocl.data.samples import Message, Sample
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
    return Sample(tuple(messages[:-1]), "", (messages[-1].content,))


@st.composite
def encodings(draw: st.DrawFn) -> EncodedSample:
    ids = draw(st.lists(st.integers(0, 9), min_size=2, max_size=9))
    prompt = draw(st.integers(1, len(ids) - 1))
    start, stop = sorted(draw(st.tuples(st.integers(0, prompt), st.integers(0, prompt))))
    return EncodedSample("d", tuple(ids), prompt, ((start, stop),))


def encoded(
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


def labelled_text(row: EncodedSample) -> str:
    return decode([token for token, response in zip(row.input_ids, row.label_mask, strict=True) if response])


def say(instruction: str, output: str) -> Sample:
    return Sample((Message("user", instruction),), "", (output,))


TALK = Sample((Message("user", "Why?"), Message("assistant", "Because."), Message("user", "Really?")), "", ("Yes.",))


def test_a_chat_is_tokenised_as_its_rendered_text() -> None:
    whole = [message._asdict() for message in (*TALK.messages, Message("assistant", "Yes."))]
    ids = CHAT(CHAT.apply_chat_template(whole, tokenize=False))["input_ids"]
    got = encoded(TALK).input_ids
    assert list(got) == ids[: len(got)]
    assert decode(ids[len(got) :]) == "\n"


def test_every_assistant_turn_is_labelled_with_its_end_token_and_nothing_else() -> None:
    assert labelled_text(encoded(TALK)) == "Because.<|im_end|>Yes.<|im_end|>"


def test_the_last_turn_is_told_from_the_earlier() -> None:
    row = encoded(TALK)
    assert decode(row.reference_ids) == "Yes.<|im_end|>"
    assert decode(row.prompt_ids).endswith("Really?<|im_end|>\n<|im_start|>assistant\n")


def test_the_prompt_is_what_the_template_gives_for_generation() -> None:
    turns = [message._asdict() for message in TALK.messages]
    opened = CHAT.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert list(encoded(TALK).prompt_ids) == CHAT(opened)["input_ids"]


def test_the_first_reference_is_trained_on_and_the_digest_kept() -> None:
    sample = Sample((Message("user", "Why?"),), "", ("Because.", "So."))
    row = encoded(sample, Prompting.ALPACA)
    assert labelled_text(row) == "Because.<|im_end|>"
    assert row.digest == sample.digest


@given(conversations(), st.sampled_from(Prompting))
def test_responses_are_labelled_whatever_the_text(sample: Sample, prompting: Prompting) -> None:
    row = encoded(sample, prompting)
    answers = [message.content for message in sample.messages if message.role == "assistant"]
    assert labelled_text(row) == "".join(answer + "<|im_end|>" for answer in [*answers, sample.references[0]])
    assert row.prompt_ids + row.reference_ids == row.input_ids


def test_a_tokenizer_that_merges_across_the_border_has_the_sides_tokenised_apart() -> None:
    # "\n\n" is one token, so the joint ids of "...Response:\n" and "\n\nWord" do not begin with the prompt's.
    assert len(PLAIN("\n\n")["input_ids"]) == 1
    row = encoded(say("Why?", "\n\nWord"), Prompting.ALPACA)
    prompt = decode(row.prompt_ids, PLAIN)
    assert prompt.endswith("### Response:\n")
    assert list(row.prompt_ids) == PLAIN(prompt)["input_ids"]
    assert decode(row.reference_ids, PLAIN) == "\n\nWord<|im_end|>"


@given(conversations(), st.sampled_from(Prompting), st.integers(1, 60), st.integers(1, 60), st.booleans())
def test_truncation_cuts_the_prompt_left_and_the_response_right(
    sample: Sample, prompting: Prompting, prompt: int, room: int, begins: bool
) -> None:
    begins = begins and prompting is Prompting.ALPACA
    whole = encoded(sample, prompting, begins=begins)
    cut = encoded(sample, prompting, length=prompt + room, prompt=prompt, begins=begins)
    assert len(cut.prompt_ids) == min(prompt, len(whole.prompt_ids))
    assert len(cut.input_ids) <= prompt + room
    kept = len(cut.prompt_ids) - (1 if begins and prompt > 1 else 0)
    assert cut.prompt_ids[-kept:] == whole.prompt_ids[-kept:]
    assert cut.reference_ids == whole.reference_ids[: prompt + room - len(cut.prompt_ids)]
    assert len(cut.reference_ids) >= 1


@given(conversations(), st.integers(1, 60))
def test_truncation_moves_the_labels_with_their_tokens(sample: Sample, prompt: int) -> None:
    whole, cut = encoded(sample), encoded(sample, prompt=prompt)
    assert cut.label_mask == whole.label_mask[-len(cut.input_ids) :]


def test_a_cut_response_has_no_end_token_and_a_whole_one_has() -> None:
    sample = say("Why?", "The answer is a word.")
    whole = encoded(sample)
    fits, short = (encoded(sample, length=len(whole.input_ids) - less, prompt=len(whole.prompt_ids)) for less in (0, 1))
    assert fits == whole
    assert whole.reference_ids[-1] == END
    assert short.reference_ids == whole.reference_ids[:-1]
    assert END not in short.reference_ids


def test_the_response_marker_survives_a_long_prompt() -> None:
    row = encoded(say("long " * 500, "Word."), Prompting.ALPACA, prompt=20)
    assert decode(row.prompt_ids, PLAIN).endswith("long \n\n### Response:\n")


def test_a_begin_token_that_the_tokenizer_adds_comes_first_and_survives_the_cut() -> None:
    sample = say("long " * 50, "Word.")
    whole = encoded(sample, Prompting.ALPACA, begins=True)
    cut = encoded(sample, Prompting.ALPACA, begins=True, prompt=20)
    assert decode(whole.prompt_ids, BEGINS).startswith("<s>Below is")
    assert cut.prompt_ids[0] == BEGINS.bos_token_id
    assert cut.prompt_ids.count(BEGINS.bos_token_id) == 1
    assert len(cut.prompt_ids) == 20


@pytest.mark.parametrize(("length", "prompt"), [(8, 8), (8, 0), (8, 9)])
def test_lengths_that_leave_no_room_are_refused(length: int, prompt: int) -> None:
    with pytest.raises(ValueError, match="max_prompt_length"):
        encoded(TALK, length=length, prompt=prompt)


def naive_labels(rows: list[EncodedSample]) -> list[tuple[int, int, int, bool]]:
    """(row, position, next token, of the last turn?) for each position whose next token is labelled."""
    return [
        (at, position, row.input_ids[position + 1], position + 1 >= row.prompt_length)
        for at, row in enumerate(rows)
        for position in range(len(row.input_ids) - 1)
        if row.label_mask[position + 1]
    ]


def found_labels(batch: Batch) -> list[tuple[int, int, int, bool]]:
    where = batch.predicts.nonzero().tolist()
    return [
        (*at, *what)
        for at, what in zip(where, zip(batch.labels.tolist(), batch.last_turn.tolist(), strict=True), strict=True)
    ]


@given(st.lists(encodings(), min_size=1, max_size=4), st.integers(0, 9), st.integers(0, 3))
def test_labels_are_the_next_tokens_shifted_once(rows: list[EncodedSample], pad: int, extra: int) -> None:
    length = max(len(row.input_ids) for row in rows) + extra
    batch = collate(rows, pad, length=length)
    assert found_labels(batch) == naive_labels(rows)
    assert batch.tokens == len(batch.labels) == int(batch.predicts.sum())


@given(st.lists(encodings(), min_size=1, max_size=4), st.integers(0, 9))
def test_padding_is_on_the_right_and_known_by_length(rows: list[EncodedSample], pad: int) -> None:
    batch = collate(rows, pad)
    lengths = [len(row.input_ids) for row in rows]
    assert batch.attention_mask.sum(dim=1).tolist() == lengths
    for ids, row in zip(batch.input_ids.tolist(), rows, strict=True):
        assert tuple(ids[: len(row.input_ids)]) == row.input_ids
        assert set(ids[len(row.input_ids) :]) <= {pad}


def test_a_model_that_knows_the_next_token_is_right_at_every_label() -> None:
    rows = [encoded(TALK), encoded(say("Why?", "The answer is a word."))]
    batch = collate(rows, END)
    oracle = torch.nn.functional.one_hot(batch.input_ids.roll(-1, dims=1), len(CHAT))
    assert torch.equal(oracle[batch.predicts].argmax(-1), batch.labels)


def test_the_end_token_is_a_label_and_padding_is_none_though_they_have_one_id() -> None:
    assert CHAT.pad_token_id == CHAT.eos_token_id
    rows = [encoded(say("Why?", "No.")), encoded(say("Why?", "The answer is a word."))]
    batch = collate(rows, CHAT.pad_token_id)
    assert (batch.labels == END).sum() == 2
    assert batch.tokens == sum(len(row.reference_ids) for row in rows)
    assert not (batch.predicts & (batch.attention_mask == 0)).any()


@given(st.permutations([say("Why?", "No."), TALK, say("How?", "The answer is a word.")]))
def test_a_batch_is_its_rows_one_after_another(samples: list[Sample]) -> None:
    rows = [encoded(sample) for sample in samples]
    alone = list(itertools.chain.from_iterable(collate([row]).labels.tolist() for row in rows))
    assert collate(rows).labels.tolist() == alone


def test_a_row_without_room_for_its_length_is_refused() -> None:
    row = encoded(TALK)
    with pytest.raises(ValueError, match="more than"):
        collate([row], length=len(row.input_ids) - 1)
    with pytest.raises(ValueError, match="needs a sample"):
        collate([])
