"""Greedy answers are those of transformers, token for token, however prompts are batched."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig, PreTrainedModel

from pocl.errors import RunStopped
from pocl.evaluation.generate import generate, model_stop_token_ids
from pocl.inspect.random import SPECIAL_TOKENS
from pocl.models.random import byte_level_tokenizer
from tests.pocl.tiny_models import BOS, EOS, FOUR_FAMILIES, PAD, VOCABULARY, tiny

Prompts = list[list[int]]


def prompts_of(lengths: Sequence[int], seed: int = 0) -> Prompts:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def answers(model: PreTrainedModel, prompts: Prompts, *, new: int = 12, batch: int = 4, eos: set[int]) -> Prompts:
    return generate(model, prompts, max_new_tokens=new, batch_size=batch, eos_token_ids=eos, pad_id=PAD)


def reference(model: Any, prompts: Prompts, eos: set[int], new: int = 12) -> Prompts:
    """What `model.generate` answers to each prompt alone, cut before the first end of sequence."""
    found = []
    for prompt in prompts:
        # Without any, it would fall back to the model's own.
        end = sorted(eos) or [VOCABULARY]
        config = GenerationConfig(
            max_new_tokens=new, do_sample=False, eos_token_id=end, pad_token_id=PAD, bos_token_id=BOS
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


def test_finished_rows_leave_the_batch_before_all_are_finished() -> None:
    model, rows = tiny("llama"), []
    prompts = prompts_of([5, 17, 9, 2, 12, 5, 3, 8])
    eos = common_tokens(model, prompts)
    model.get_output_embeddings().register_forward_hook(lambda _m, _a, out: rows.append(len(out)))
    found = answers(model, prompts, batch=8, eos=eos)
    going_on = [sum(len(answer) >= step for answer in found) for step in range(len(rows))]
    assert all(held < 4 / 3 * alive for held, alive in zip(rows, going_on, strict=True))
    assert rows[-1] < 8


@pytest.mark.parametrize("lengths", [[3, 0], [64]])
def test_empty_and_overlong_prompts_are_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="prompt"):
        answers(tiny("gpt2"), prompts_of(lengths), eos=set())


def test_keys_must_match_the_prompts() -> None:
    with pytest.raises(ValueError, match="2 prompts have 1 keys"):
        generate(
            tiny("gpt2"), [[4], [5]], max_new_tokens=1, batch_size=1, eos_token_ids=set(), pad_id=PAD, keys=["a"]
        )  # fmt: skip


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
    generate(
        tiny("llama"), prompts_of([3] * 5), max_new_tokens=2, batch_size=2, eos_token_ids=set(), pad_id=PAD,
        on_progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert seen == [(2, 5), (4, 5), (5, 5)]


def test_stop_ends_generation_within_a_batch_and_restores_the_mode() -> None:
    model, asked = tiny("llama").train(), []

    def stop_at_third() -> bool:
        asked.append(True)
        return len(asked) == 3

    with pytest.raises(RunStopped):
        generate(
            model, prompts_of([3]), max_new_tokens=50, batch_size=1, eos_token_ids=set(), pad_id=PAD,
            should_stop=stop_at_third,
        )  # fmt: skip
    assert model.training


def test_head_is_applied_to_the_last_column_alone() -> None:
    model, rows = tiny("llama"), []
    model.get_output_embeddings().register_forward_hook(lambda _m, _a, out: rows.append(tuple(out.shape)))
    answers(model, prompts_of([9, 4]), new=3, eos=set())
    assert rows == [(2, 1, VOCABULARY)] * 3


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
