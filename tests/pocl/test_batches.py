"""Padded batches of encoded samples, whose pad token is the end token."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pocl.data.batches import Batch, EncodedSample, collate
from pocl.samples.sample import Sample
from tests.pocl.encoders import CHAT, END, TALK, encode_with, say


@st.composite
def encodings(draw: st.DrawFn) -> EncodedSample:
    ids = draw(st.lists(st.integers(0, 9), min_size=2, max_size=9))
    prompt = draw(st.integers(1, len(ids) - 1))
    start, stop = sorted(draw(st.tuples(st.integers(0, prompt), st.integers(0, prompt))))
    trailing = draw(st.integers(0, len(ids) - prompt))
    return EncodedSample("d", tuple(ids), prompt, ((start, stop),), trailing)


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
