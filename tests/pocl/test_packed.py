"""Packed samples give the logits of each by itself, and the gradient of a step does not depend on its micro-batches."""

from collections.abc import Sequence
from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, BloomConfig, GPTNeoXConfig, MambaConfig, PreTrainedModel

from pocl.data.batches import EncodedSample, collate, pack
from pocl.data.micro_batches import micro_batches
from pocl.models.packed import can_pack
from pocl.models.precision import Precision
from pocl.spec import JS
from pocl.teacher.distillation_loss import DistillationLoss
from pocl.teacher.signal import LiveTeacher
from pocl.train.accumulation import normaliser
from tests.pocl.tiny_models import CONFIGS, VOCABULARY, tiny

PACKED = ("gpt2", "opt", "llama", "qwen2", "opt-350m", "cohere", "granite", "mixtral")
FP32 = Precision("fp32", torch.device("cpu"))


def random_samples(count: int = 16) -> list[EncodedSample]:
    generator = torch.Generator().manual_seed(5)
    samples = []
    for index in range(count):
        length = int(torch.randint(2, 40, (1,), generator=generator))
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        # Every seventh has no response token at all.
        prompt_length = length if index % 7 == 6 else 1 + index % length
        samples.append(EncodedSample(f"{index:064x}", tuple(ids), prompt_length=prompt_length))
    return samples


def gradient(
    name: str, samples: Sequence[EncodedSample], *, max_samples: int, max_tokens: int = 10_000, packed: bool
) -> dict[str, Tensor]:
    """The gradient of one optimiser step, as the training loop computes it."""
    student = tiny(name, seed=1)
    training_loss = DistillationLoss(
        student, LiveTeacher(tiny(name), FP32), JS(), shared_vocabulary=VOCABULARY, precision=FP32
    )
    pieces = micro_batches(samples, max_samples=max_samples, max_tokens=max_tokens, packed=packed)
    batches = [(pack if packed else collate)(piece) for piece in pieces]
    scale = normaliser(sum(batch.tokens for batch in batches))
    for batch in batches:
        sums = training_loss.objective(batch, temperature=1.5, kd_weight=0.7, scale=scale)
        torch.autograd.backward(sums.loss)
    return {key: p.grad for key, p in student.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", PACKED)
def test_gradient_of_a_step_does_not_depend_on_its_micro_batches(name: str) -> None:
    samples = random_samples()
    reference = gradient(name, samples, max_samples=1, packed=False)
    for cut in (
        {"max_samples": 4, "packed": False},
        {"max_samples": 16, "packed": False},
        {"max_samples": 1, "packed": True},
        {"max_samples": 4, "packed": True},
        {"max_samples": 16, "packed": True},
        {"max_samples": 16, "max_tokens": 70, "packed": True},
    ):
        gradients = gradient(name, samples, **cut)  # type: ignore[arg-type]  # One dictionary holds both kinds.
        assert gradients.keys() == reference.keys()
        for key, expected in reference.items():
            largest = expected.abs().max().clamp(min=1e-3).item()
            torch.testing.assert_close(gradients[key], expected, rtol=0, atol=2e-4 * largest, msg=f"{key} of {cut}")


@pytest.mark.parametrize("name", CONFIGS)
def test_can_pack_recognises_each_family(name: str) -> None:
    # The attention scores of Gemma 2 are capped.
    assert can_pack(tiny(name), 8) == (name in PACKED)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (BloomConfig(vocab_size=50, hidden_size=32, n_layer=2, n_head=4), False),
        (MambaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2), False),
        (
            GPTNeoXConfig(
                vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
            ),
            True,
        ),
    ],
    ids=["alibi", "recurrent", "parallel layers"],
)
def test_family_with_state_across_tokens_or_alibi_is_not_packed(config: object, expected: bool) -> None:
    model: PreTrainedModel = AutoModelForCausalLM.from_config(deepcopy(config), dtype=torch.float32)
    assert can_pack(model, 8) is expected


def test_samples_longer_than_the_sliding_window_are_not_packed() -> None:
    model = tiny("llama")
    model.config.sliding_window = 8
    assert can_pack(model, 8)
    assert not can_pack(model, 9)


def test_can_pack_leaves_the_model_unchanged() -> None:
    model = tiny("llama").train()
    before = model.config._attn_implementation
    can_pack(model, 8)
    assert (model.training, model.config._attn_implementation) == (True, before)


def test_a_packed_batch_has_the_tokens_of_its_samples() -> None:
    samples = random_samples(5)
    batch, padded = pack(samples), collate(samples)
    assert batch.input_ids[0].tolist() == [token for sample in samples for token in sample.input_ids]
    assert batch.lengths == tuple(len(sample.input_ids) for sample in samples)
    assert batch.tokens == padded.tokens
    assert torch.equal(batch.labels, padded.labels)
    assert torch.equal(batch.last_turn, padded.last_turn)
    assert batch.predicts.sum() == batch.tokens


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=30),
    max_samples=st.integers(1, 8),
    max_tokens=st.integers(1, 200),
    packed=st.booleans(),
    random=st.randoms(use_true_random=False),
)
def test_micro_batches_hold_every_sample_within_the_bounds(
    lengths: list[int], max_samples: int, max_tokens: int, packed: bool, random: object
) -> None:
    samples = [EncodedSample(f"{i:064x}", tuple(range(length)), prompt_length=1) for i, length in enumerate(lengths)]
    pieces = micro_batches(samples, max_samples=max_samples, max_tokens=max_tokens, packed=packed)
    assert sorted(sample.digest for piece in pieces for sample in piece) == [sample.digest for sample in samples]
    for piece in pieces:
        sizes = [len(sample.input_ids) for sample in piece]
        assert 1 <= len(piece) <= max_samples
        assert len(piece) == 1 or (sum(sizes) if packed else len(piece) * max(sizes)) <= max_tokens
    random.shuffle(samples)  # type: ignore[attr-defined] # hypothesis types its random as object.
    assert micro_batches(samples, max_samples=max_samples, max_tokens=max_tokens, packed=packed) == pieces


def test_a_live_teacher_does_not_attend_across_packed_samples() -> None:
    teacher, samples = LiveTeacher(tiny("qwen2"), FP32), random_samples(6)
    torch.testing.assert_close(teacher.hidden(pack(samples)), teacher.hidden(collate(samples)))
