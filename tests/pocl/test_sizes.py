"""Sizes follow from memory and shapes alone, grow with memory, and fit into it."""

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from pocl.models.precision import Precision
from pocl.sizes import ModelShape, RunSizes, Workload, choose_sizes
from pocl.spec import resolve

GIB = 1 << 30
MIB = 1 << 20
H100, L4, SMALL_CARD = 81559 * MIB, 23034 * MIB, 4096 * MIB
CONFIGS: dict[str, PreTrainedConfig] = {
    "smollm2-135m": LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    ),
    "smollm2-360m": LlamaConfig(
        vocab_size=49152, hidden_size=960, intermediate_size=2560, num_hidden_layers=32, num_attention_heads=15,
        num_key_value_heads=5, tie_word_embeddings=True,
    ),
    "gpt2": GPT2Config(),
    "gpt2-xl": GPT2Config(n_embd=1600, n_layer=48, n_head=25),
    "qwen2-0.5b": Qwen2Config(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, tie_word_embeddings=True,
    ),
    "qwen2-1.5b": Qwen2Config(
        vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
        num_key_value_heads=2, tie_word_embeddings=True,
    ),
}  # fmt: skip
PAIRS = [("smollm2-135m", "smollm2-360m"), ("gpt2", "gpt2-xl"), ("qwen2-0.5b", "qwen2-1.5b")]


@cache
def shape(name: str) -> ModelShape:
    with torch.device("meta"):
        return ModelShape.of(AutoModelForCausalLM.from_config(CONFIGS[name]))


def workload(student: str, teacher: str, *, number_bytes: int = 2, has_fused_head: bool = True) -> Workload:
    return Workload(shape(student), shape(teacher), number_bytes, has_fused_head, prompt_tokens=256, answer_tokens=256)


def free_after_loading(card: int, work: Workload) -> int:
    """What a card has left with both models on it, and half a gigabyte for CUDA itself."""
    assert work.teacher is not None
    return card - 4 * work.student.parameters - work.number_bytes * work.teacher.parameters - GIB // 2


def peak_bytes(work: Workload, sizes: RunSizes) -> dict[str, int]:
    """What each phase takes beside the weights, as estimated."""
    training = (
        sizes.micro_batch_tokens * work.micro_batch_token_bytes + sizes.loss_chunk_tokens * work.chunk_token_bytes
    )
    return {
        "training": work.training_state_bytes + training,
        "generation": work.training_state_bytes + sizes.generation_rows * work.generation_row_bytes,
        "scoring": work.training_state_bytes + sizes.scoring_tokens * work.scoring_token_bytes,
    }


works = st.builds(
    lambda pair, number_bytes, fused: workload(*pair, number_bytes=number_bytes, has_fused_head=fused),
    st.sampled_from(PAIRS),
    st.sampled_from([2, 4]),
    st.booleans(),
)
SMALLEST = RunSizes(micro_batch_tokens=64, loss_chunk_tokens=16, generation_rows=1, scoring_tokens=64)


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
@pytest.mark.parametrize("card", [H100, L4])
def test_every_phase_fits_the_card(student: str, teacher: str, card: int) -> None:
    work = workload(student, teacher)
    free = free_after_loading(card, work)
    assert max(peak_bytes(work, choose_sizes(work, free)).values()) <= free


def test_a_batch_of_the_paper_is_one_micro_batch_on_a_large_card() -> None:
    """64 samples of Dolly's lengths have about 11,400 tokens."""
    work = workload("smollm2-135m", "smollm2-360m")
    sizes = choose_sizes(work, free_after_loading(H100, work))
    assert sizes == RunSizes(
        micro_batch_tokens=16384, loss_chunk_tokens=2048, generation_rows=512, scoring_tokens=65536
    )


def test_a_card_without_room_gets_the_smallest_sizes() -> None:
    work = workload("qwen2-0.5b", "qwen2-1.5b")
    assert choose_sizes(work, free_after_loading(SMALL_CARD, work)) == SMALLEST
    assert choose_sizes(work, 0) == SMALLEST


@given(works, st.integers(0, 200 * GIB), st.integers(0, 200 * GIB))
def test_sizes_grow_with_memory(work: Workload, one: int, other: int) -> None:
    less, more = (choose_sizes(work, free) for free in sorted((one, other)))
    assert all(getattr(less, name) <= getattr(more, name) for name in RunSizes.__annotations__)


@given(works, st.integers(0, 200 * GIB))
def test_estimate_stays_under_the_memory_unless_a_size_is_the_smallest(work: Workload, free: int) -> None:
    sizes = choose_sizes(work, free)
    if all(getattr(sizes, name) > getattr(SMALLEST, name) for name in RunSizes.__annotations__):
        assert max(peak_bytes(work, sizes).values()) <= free


@given(works, st.integers(0, 200 * GIB))
def test_every_size_is_a_power_of_two_that_the_specification_takes(work: Workload, free: int) -> None:
    sizes = choose_sizes(work, free)
    assert all(getattr(sizes, name).bit_count() == 1 for name in RunSizes.__annotations__)
    posted = {"teacher": {"random": {}}, "student": {"random": {}}, "data": {"train": {"path": "rows.jsonl"}}}
    assert RunSizes.pinned_in(resolve(posted | {part: dict(fields) for part, fields in sizes.choices.items()})) == sizes


@given(works, st.integers(1, 128))
def test_a_little_more_free_memory_changes_nothing(work: Workload, gib: int) -> None:
    room = (1 << gib.bit_length() - 1) * GIB
    free = work.training_state_bytes + room
    assert choose_sizes(work, free) == choose_sizes(work, free + room // 3)


def test_a_teacher_that_is_not_loaded_yet_leaves_the_same_room_as_one_that_is() -> None:
    loaded = workload("smollm2-135m", "smollm2-360m")
    assert loaded.teacher is not None
    lazy = replace(loaded, unloaded_parameters=loaded.teacher.parameters)
    free = free_after_loading(L4, loaded)
    assert choose_sizes(lazy, free + loaded.number_bytes * loaded.teacher.parameters) == choose_sizes(loaded, free)
    with torch.device("meta"):
        teacher = AutoModelForCausalLM.from_config(CONFIGS["smollm2-360m"])
    posted = resolve({"teacher": {"random": {}}, "student": {"random": {}}, "data": {"train": {"path": "rows.jsonl"}}})
    precision = Precision("bf16", torch.device("cpu"))
    read = Workload.of(posted, layers_of("llama"), teacher, precision=precision, has_fused_head=True)
    assert read.unloaded_parameters == loaded.teacher.parameters


def test_sizes_on_a_cpu_follow_from_the_vocabulary_alone() -> None:
    small, large = workload("gpt2", "gpt2-xl"), workload("qwen2-0.5b", "qwen2-1.5b")
    sizes = choose_sizes(small, None)
    assert (sizes.loss_chunk_tokens, choose_sizes(large, None).loss_chunk_tokens) == (1024, 512)
    assert choose_sizes(large, None) == replace(sizes, loss_chunk_tokens=512)
    dense = choose_sizes(workload("qwen2-0.5b", "qwen2-1.5b", has_fused_head=False), None)
    assert dense.scoring_tokens * shape("qwen2-0.5b").vocabulary <= 1 << 25


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama", "qwen2"])
@pytest.mark.parametrize("format_", [torch.float32, torch.bfloat16])
def test_estimate_covers_what_autograd_keeps_of_a_token(name: str, format_: torch.dtype) -> None:
    model = layers_of(name)
    kept = [kept_bytes(model, tokens, format_) for tokens in (16, 32)]
    one = ModelShape.of(model)
    estimate = Workload(one, None, format_.itemsize, True, 1, 1).micro_batch_token_bytes
    # What does not grow with the tokens, such as weights in bf16, falls out of the difference.
    assert estimate / 4 < (kept[1] - kept[0]) / 16 <= estimate


def layers_of(name: str) -> PreTrainedModel:
    """Two layers of a family, wide enough that what does not grow with the width counts little."""
    shared: dict[str, Any] = {
        "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64,
        "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
    }  # fmt: skip
    configs: dict[str, PreTrainedConfig] = {
        # Attention with dropout keeps its weights on a CPU; kernels of a GPU draw them again.
        "gpt2": GPT2Config(**shared, attn_pdrop=0.0),
        "opt": OPTConfig(**shared, ffn_dim=512, word_embed_proj_dim=128),
        "llama": LlamaConfig(**shared, intermediate_size=352, num_key_value_heads=2),
        "qwen2": Qwen2Config(**shared, intermediate_size=512, num_key_value_heads=2),
    }
    model: PreTrainedModel = AutoModelForCausalLM.from_config(configs[name], dtype=torch.float32)
    model.train()
    return model


def kept_bytes(model: PreTrainedModel, tokens: int, format_: torch.dtype) -> int:
    """Bytes that autograd keeps of a pass through the layers; weights aside."""
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    ids = torch.zeros(1, tokens, dtype=torch.long)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=format_ == torch.bfloat16),
    ):
        # Kept alive until the bytes are counted: freed memory would be given out again.
        output = model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        total = sum(storage.nbytes() for storage in kept.values())
        del output
    return total
