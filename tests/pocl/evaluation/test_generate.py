"""Greedy answers are those of transformers, token for token, however prompts are batched."""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig, PreTrainedModel

from pocl.errors import RunStopped
from pocl.evaluation.continuous_batching import LOOK_EVERY
from pocl.evaluation.decoding import Decoding
from pocl.evaluation.generate import generate, model_stop_token_ids
from pocl.evaluation.stop_text import StopText
from pocl.events import Warned
from pocl.inspect.random import SPECIAL_TOKENS
from pocl.models.inference_weights import inference_weights
from pocl.models.precision import Precision, choose_precision
from pocl.models.random import byte_level_tokenizer
from pocl.models.slot_cache import BUCKET, decode_attention
from pocl.models.slot_decoder import SlotDecoder, can_decode_in_slots, fits_window
from tests.pocl.tiny_models import BOS, EOS, FOUR_FAMILIES, PAD, VOCABULARY, tiny
from tests.support.operator_count import count_host_reads, count_operators

Prompts = list[list[int]]
CPU = torch.device("cpu")
OPERATORS_OF_A_STEP = 400
"""Recorded, views included: 377 for a decode step of the tiny Llama, which has four layers."""


def prompts_of(lengths: Sequence[int], seed: int = 0) -> Prompts:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def answers(model: PreTrainedModel, prompts: Prompts, *, new: int = 12, batch: int = 4, eos: set[int]) -> Prompts:
    return generate(model, prompts, Decoding(new, batch, eos, PAD))


def reference(
    model: Any, prompts: Prompts, eos: set[int], new: int = 12, *, no_repeat_ngram: int | None = None
) -> Prompts:
    """What `model.generate` answers to each prompt alone, cut before the first end of sequence."""
    found = []
    for prompt in prompts:
        # Without any, it would fall back to the model's own.
        end = sorted(eos) or [VOCABULARY]
        config = GenerationConfig(
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=PAD,
            bos_token_id=BOS,
            no_repeat_ngram_size=no_repeat_ngram,
        )
        ids = torch.tensor([prompt])
        row = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        tokens = row[0, len(prompt) :].tolist()
        found.append(tokens[:-1] if tokens[-1] in eos else tokens)
    return found


def common_tokens(model: PreTrainedModel, prompts: Prompts) -> set[int]:
    """Tokens that answers contain, so that ending at them ends answers at different places."""
    seen = [token for answer in reference(model, prompts, set()) for token in answer[2:]]
    return set(sorted(set(seen), key=seen.count)[-3:])


@pytest.mark.parametrize("family", [*FOUR_FAMILIES, "gemma2", "opt-350m"])
def test_answers_equal_those_of_transformers(family: str) -> None:
    model, prompts = tiny(family), prompts_of([5, 17, 9, 1, 12, 5, 3])
    assert answers(model, prompts, eos=set()) == reference(model, prompts, set())


@pytest.mark.parametrize("family", [*FOUR_FAMILIES, "gemma2"])
def test_finished_rows_do_not_affect_the_others(family: str) -> None:
    model, prompts = tiny(family), prompts_of([5, 17, 9, 2, 12, 5, 3, 8])
    eos = common_tokens(model, prompts)
    expected = reference(model, prompts, eos)
    assert len({len(answer) for answer in expected}) > 1
    assert answers(model, prompts, batch=8, eos=eos) == expected


@settings(max_examples=20)
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=6), batch=st.integers(1, 7))
def test_answers_do_not_depend_on_batching_and_order(lengths: list[int], batch: int) -> None:
    model, prompts = tiny("llama"), prompts_of(lengths)
    one_by_one = [answers(model, [prompt], new=5, batch=1, eos={7})[0] for prompt in prompts]
    assert answers(model, prompts, new=5, batch=batch, eos={7}) == one_by_one
    assert answers(model, prompts[::-1], new=5, batch=batch, eos={7}) == one_by_one[::-1]


@pytest.mark.parametrize("family", FOUR_FAMILIES)
def test_pad_and_end_tokens_in_a_prompt_are_ordinary(family: str) -> None:
    model = tiny(family)
    prompts = [[PAD, 9, PAD, 11], [PAD], [5, 6, PAD, PAD, PAD, 8, 9]]
    assert answers(model, prompts, eos={PAD}) == reference(model, prompts, {PAD})


# The answers of gemma2 are generated padded, since it caps its scores.
@pytest.mark.parametrize(("family", "size"), [("gpt2", 3), ("llama", 2), ("gemma2", 2)])
def test_banned_ngrams_are_those_of_transformers(family: str, size: int) -> None:
    model, prompts = tiny(family), prompts_of([5, 1, 9, 3, 7, 2])
    # A prompt that repeats itself bans tokens from the first one on.
    prompts[3] = [5, 6, 7, 5, 6, 7, 5, 6]
    eos = common_tokens(model, prompts)
    for end in (eos, set[int]()):
        banned = generate(model, prompts, Decoding(24, 4, end, PAD, no_repeat_ngram=size))
        assert banned == reference(model, prompts, end, 24, no_repeat_ngram=size)
    assert banned != answers(model, prompts, new=24, eos=set())


# gemma2 is answered in padded batches, and the last two are answered without a cache and in slots.
@pytest.mark.parametrize("family", ["gemma2", "llama", "gpt2"])
@pytest.mark.parametrize("uncached", [False, True])
def test_a_text_that_ends_an_answer_ends_it_where_cutting_afterwards_does(
    family: str, uncached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompts = tiny(family), prompts_of([5, 17, 9, 2, 12, 5, 3, 8])
    if uncached:
        for name in ("can_decode_in_slots", "can_decode_padded"):
            monkeypatch.setattr(f"pocl.evaluation.generate.{name}", lambda *_, **__: False)
        monkeypatch.setattr("pocl.evaluation.generate._trials", {})

    def decode(ids: Sequence[int]) -> str:
        # Texts may end inside a token, and begin there.
        return "".join(f"{token:02x}" for token in ids)

    whole = answers(model, prompts, new=24, eos=set())
    end = max((decode(answer)[11:14] for answer in whole), key=lambda text: sum(text in decode(each) for each in whole))
    for batch in (8, 3, 1):
        stopped = generate(model, prompts, Decoding(24, batch, set(), PAD, stop_text=StopText(end, decode)))
        assert [decode(answer).partition(end)[0] for answer in stopped] == [
            decode(answer).partition(end)[0] for answer in whole
        ]
        for answer, uncut in zip(stopped, whole, strict=True):
            assert uncut[: len(answer)] == answer
            assert (end in decode(answer)) == (end in decode(uncut))
            assert end not in decode(answer[:-1])
    assert any(end in decode(answer) for answer in whole)


def test_rows_whose_text_has_ended_free_their_slots() -> None:
    model, prompts = tiny("llama"), prompts_of([5] * 12)
    steps = 0

    def count() -> bool:
        nonlocal steps
        steps += 1
        return False

    # Any token is the end.
    any_text = StopText(".", lambda ids: "." * len(ids))
    stopped = generate(model, prompts, Decoding(64, 2, set(), PAD, stop_text=any_text), should_stop=count)
    assert [len(answer) for answer in stopped] == [1] * len(prompts)
    assert steps <= len(prompts) // 2 * (LOOK_EVERY + 2)


def test_answer_ends_before_the_end_token() -> None:
    model, prompts = tiny("gpt2"), prompts_of([4])
    whole = answers(model, prompts, eos=set())[0]
    end = whole[5]
    assert answers(model, prompts, eos={end})[0] == whole[: whole.index(end)]


def test_answer_ends_with_the_models_positions() -> None:
    prompts = prompts_of([60, 3])
    assert [len(answer) for answer in answers(tiny("gpt2"), prompts, new=10, eos=set())] == [4, 10]


def test_finished_row_stays_within_the_positions_of_the_model() -> None:
    # One of eight ends by its positions: too few to leave the batch.
    model, prompts = tiny("gpt2"), prompts_of([60, *[3] * 7])
    assert answers(model, prompts, new=30, batch=8, eos=set())[1:] == reference(model, prompts[1:], set(), new=30)


def test_waiting_prompts_take_the_place_of_finished_rows() -> None:
    model, slots = tiny("llama"), []
    prompts = prompts_of([5, 17, 9, 2, 12, 5, 3, 8] * 4)
    eos = common_tokens(model, prompts)
    model.get_output_embeddings().register_forward_hook(lambda _m, _a, out: slots.append(len(out)))
    found = answers(model, prompts, batch=8, eos=eos)
    assert max(slots) == 8
    assert slots[-1] < 8
    # A row goes on to the next look after its end; and while no prompt waits, less than half of the slots are empty.
    assert sum(slots) <= 2 * sum(len(answer) + 1 + LOOK_EVERY for answer in found)


@pytest.mark.parametrize("lengths", [[3, 0], [64]])
def test_empty_and_overlong_prompts_are_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="prompt"):
        answers(tiny("gpt2"), prompts_of(lengths), eos=set())


def test_keys_must_match_the_prompts() -> None:
    with pytest.raises(ValueError, match="2 prompts have 1 keys"):
        generate(tiny("gpt2"), [[4], [5]], Decoding(1, 1, set(), PAD), keys=["a"])


def test_no_prompts_give_no_answers() -> None:
    assert answers(tiny("gpt2"), [], eos=set()) == []


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_restored_and_dropout_is_off(training: bool) -> None:
    model, prompts = tiny("gpt2"), prompts_of([4, 6])
    expected = answers(model, prompts, eos=set())
    model.train(training)
    assert answers(model, prompts, eos=set()) == expected
    assert model.training is training


def test_progress_counts_answered_prompts() -> None:
    seen: list[tuple[int, int]] = []
    decoding = Decoding(2, 2, set(), PAD)
    generate(tiny("llama"), prompts_of([3] * 5), decoding, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 5) for done in range(1, 6)]


def test_stop_ends_generation_within_a_batch_and_restores_the_mode() -> None:
    model, asked = tiny("llama").train(), []

    def stop_at_third() -> bool:
        asked.append(True)
        return len(asked) == 3

    with pytest.raises(RunStopped):
        generate(model, prompts_of([3]), Decoding(50, 1, set(), PAD), should_stop=stop_at_third)
    assert model.training


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_head_is_applied_to_the_last_token_of_each_row_alone(family: str) -> None:
    model, rows = tiny(family), []
    model.get_output_embeddings().register_forward_hook(lambda _m, _a, out: rows.append(out[..., 0].numel()))
    answers(model, prompts_of([9, 4]), new=9, eos=set())
    # Trying the model reads its rows whole; what follows is two prompts, together or apart, and eight tokens of each.
    assert rows[-8:] == [2] * 8
    assert rows[-9:-8] == [2] or rows[-10:-8] == [1, 1]


def test_a_model_that_cannot_decode_in_slots_is_answered_padded_and_says_so() -> None:
    warned: list[str] = []

    def answered(family: str, new: int = 4) -> None:
        model, prompts = tiny(family), prompts_of([5, 9])
        found = generate(
            model,
            prompts,
            Decoding(new, 2, set(), PAD),
            sink=lambda event: warned.append(event.code if isinstance(event, Warned) else ""),
        )
        assert found == reference(model, prompts, set(), new)

    answered("llama")
    assert warned == []
    answered("gemma2")
    assert warned == ["generation_padded"]


def test_a_row_longer_than_the_sliding_window_is_answered_padded() -> None:
    model = tiny("llama")
    assert fits_window(model, 1000)
    model.config.sliding_window = 8
    assert fits_window(model, 8)
    assert not fits_window(model, 9)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", [*FOUR_FAMILIES, "cohere", "granite", "mixtral"])
def test_families_that_decode_in_slots(family: str, precision: Literal["fp32", "bf16"]) -> None:
    model = tiny(family)
    with inference_weights(model, Precision(precision, CPU), rows=4):
        assert can_decode_in_slots(model)


@pytest.mark.skipif(choose_precision("auto", CPU).name != "bf16", reason="this machine emulates products in bf16")
@pytest.mark.parametrize("family", FOUR_FAMILIES)
def test_bits_of_a_row_do_not_depend_on_its_neighbours_in_bf16(family: str) -> None:
    model, prompts = tiny(family), prompts_of([5, 17, 9, 2, 12, 5, 3, 8])

    def logits_of_first(order: list[int], bucket: int) -> torch.Tensor:
        """The logits after the first prompt and after three more tokens, among the prompts in this order."""
        decoder = SlotDecoder(model, len(order), 60)
        read = [decoder.read([prompts[each]], torch.tensor([slot]))[0] for slot, each in enumerate(order)]
        found = [read[order.index(0)]]
        positions = torch.tensor([len(prompts[each]) for each in order])
        with decode_attention(model):
            for token in (7, 8, 9):
                tokens = torch.tensor([token if each == 0 else token + each for each in order])
                found.append(decoder.step(tokens, positions, bucket)[order.index(0)])
                positions += 1
        return torch.stack(found)

    with torch.no_grad(), inference_weights(model, Precision("bf16", CPU), rows=8):
        alone = logits_of_first([0], BUCKET)
        for order in ([0, 1], [3, 2, 0, 5], [7, 6, 5, 4, 3, 2, 1, 0]):
            assert torch.equal(logits_of_first(order, BUCKET), alone)


def test_model_has_its_own_weights_again_after_generating_in_bf16() -> None:
    model = tiny("gpt2")
    before = dict(model.named_parameters())
    logits = model(input_ids=torch.tensor([[4, 5, 6]])).logits
    generate(model, prompts_of([4]), Decoding(2, 1, set(), PAD, Precision("bf16", CPU)))
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert torch.equal(model(input_ids=torch.tensor([[4, 5, 6]])).logits, logits)


def test_operators_of_a_token_do_not_grow_with_the_rows_in_flight() -> None:
    def operators_of_eight_tokens(rows: int) -> int:
        model, prompts = tiny("llama"), prompts_of([4] * rows)
        # The first call tries the model too.
        answers(model, prompts, new=2, batch=rows, eos={1})
        counts = [count_operators(partial(answers, model, prompts, new=new, batch=rows, eos={1})) for new in (9, 17)]
        return counts[1] - counts[0]

    few, many = operators_of_eight_tokens(2), operators_of_eight_tokens(16)
    assert many <= few <= 8 * OPERATORS_OF_A_STEP


def test_host_reads_twice_in_the_tokens_between_two_looks_at_most() -> None:
    model, prompts = tiny("llama"), prompts_of([4] * 16)
    answers(model, prompts, new=2, batch=16, eos={1})
    reads = [count_host_reads(partial(answers, model, prompts, new=new, batch=16, eos={1})) for new in (17, 49)]
    assert reads[1] - reads[0] <= 2 * 32 / LOOK_EVERY


def test_training_after_generating_under_the_same_autocast_has_gradients() -> None:
    model = tiny("llama")
    with torch.autocast("cpu", torch.bfloat16):
        answers(model, prompts_of([4]), new=2, eos=set())
        model(input_ids=torch.tensor([[4, 5, 6]])).logits.float().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_stop_tokens_are_those_of_config_and_tokenizer() -> None:
    model, tokenizer = tiny("llama"), byte_level_tokenizer(64)
    assert model_stop_token_ids(model, tokenizer) == {EOS, SPECIAL_TOKENS["<|eos|>"]}
    model.generation_config.eos_token_id = [4, 5]
    assert model_stop_token_ids(model, tokenizer) == {4, 5, SPECIAL_TOKENS["<|eos|>"]}
