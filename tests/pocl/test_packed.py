"""Packed samples give the logits of each by itself, and the gradient of a step does not depend on its micro-batches."""

from collections.abc import Sequence
from copy import deepcopy
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, BloomConfig, GPTNeoXConfig, MambaConfig, PreTrainedModel

from pocl.data.batches import EncodedSample, FixedShape, collate, pack
from pocl.data.micro_batches import micro_batches
from pocl.models.heads import response_hidden_states
from pocl.models.packed import can_pack, reason_not_to_pack
from pocl.models.precision import Precision
from pocl.spec import JS
from pocl.teacher.distillation_loss import DistillationLoss
from pocl.teacher.signal import LiveTeacher
from pocl.train.accumulation import normaliser
from tests.pocl.one_step import samples_of_lengths
from tests.pocl.tiny_models import CONFIGS, VOCABULARY, tiny

PACKED = ("gpt2", "opt", "llama", "qwen2", "opt-350m", "cohere", "granite", "mixtral")
FP32 = Precision("fp32", torch.device("cpu"))
BF16 = Precision("bf16", torch.device("cpu"))


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


@pytest.mark.parametrize("precision", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_can_pack_recognises_each_family(name: str, precision: Precision) -> None:
    # The attention scores of Gemma 2 are capped.
    assert can_pack(tiny(name).train(), 8, precision) == (name in PACKED)


def test_why_a_model_is_not_packed_is_said() -> None:
    capped, windowed = tiny("gemma2"), tiny("llama")
    windowed.config.sliding_window = 8
    assert reason_not_to_pack(capped, 8) == "it fails on packed samples: attention scores are capped"
    assert reason_not_to_pack(windowed, 9) == "it attends to the last 8 tokens, and samples may have 9"
    assert reason_not_to_pack(windowed, 8) is None


def test_a_model_that_attends_across_samples_is_not_packed() -> None:
    model = tiny("llama")

    def leak(_module: object, _args: object, hidden: Tensor) -> Tensor:
        return hidden + hidden.mean(1, keepdim=True)

    model.get_submodule("model.layers.1").register_forward_hook(leak)
    for precision in (None, BF16):
        reason = reason_not_to_pack(model, 9, precision)
        assert reason is not None
        assert "differ" in reason


def test_a_model_that_fails_in_training_alone_is_not_packed() -> None:
    model = tiny("llama")

    def fail(module: torch.nn.Module, _args: object) -> None:
        if module.training:
            raise RuntimeError("no training here")

    model.get_submodule("model.layers.1").register_forward_pre_hook(fail)
    assert reason_not_to_pack(model, 9) is None
    assert reason_not_to_pack(model.train(), 9) == "it fails on packed samples: no training here"
    assert model.training


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
    model = tiny("gpt2").train()
    before, state = model.config._attn_implementation, torch.get_rng_state()
    assert can_pack(model, 8, BF16)
    assert (model.training, model.config._attn_implementation) == (True, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_packed_batch_has_the_tokens_of_its_samples() -> None:
    samples = random_samples(5)
    batch, padded = pack(samples), collate(samples)
    assert batch.input_ids[0].tolist() == [token for sample in samples for token in sample.input_ids]
    assert batch.packing is not None
    assert batch.packing.lengths == tuple(len(sample.input_ids) for sample in samples)
    assert batch.tokens == padded.tokens
    assert torch.equal(batch.labels, padded.labels)
    assert torch.equal(batch.last_turn, padded.last_turn)
    assert batch.predicts.sum() == batch.tokens


def test_a_batch_filled_up_to_a_shape_has_the_loss_and_gradient_of_its_samples() -> None:
    samples = random_samples(5)
    tokens = sum(len(sample.input_ids) for sample in samples)
    filled = partial(pack, shape=FixedShape(tokens=tokens + 100, sequences=12, max_length=40))
    results = []
    for batch_of in (pack, filled):
        student = tiny("llama", seed=1).double()
        loss = DistillationLoss(
            student, LiveTeacher(tiny("llama").double(), FP32), JS(), shared_vocabulary=VOCABULARY, precision=FP32
        )
        sums = loss.objective(batch_of(samples), temperature=1.5, kd_weight=0.7, scale=0.1)
        torch.autograd.backward(sums.loss)
        results.append([sums.loss.detach(), *(p.grad for p in student.parameters() if p.grad is not None)])
    for plain, with_filling in zip(*results, strict=True):
        torch.testing.assert_close(with_filling, plain, rtol=1e-6, atol=1e-9)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(0, 150))
def test_batches_of_a_shape_are_alike(lengths: list[int], more: int) -> None:
    samples = samples_of_lengths(*lengths)
    shape = FixedShape(tokens=sum(lengths) + more, sequences=len(lengths) + 5, max_length=40)
    batch = pack(samples, shape=shape)
    assert batch.packing is not None
    assert batch.input_ids.shape == batch.packing.position_ids.shape == (1, shape.tokens)
    assert batch.packing.cu_seqlens.shape == (shape.sequences + 1,)
    assert batch.packing.max_length == shape.max_length >= max(batch.packing.lengths)
    assert int(batch.packing.position_ids.max()) < shape.max_length
    assert int(batch.attention_mask.sum()) == sum(lengths)
    assert torch.equal(batch.labels, pack(samples).labels)
    assert torch.equal(batch.predicting, pack(samples).predicting)


@pytest.mark.parametrize(
    "shape", [FixedShape(19, 9, 40), FixedShape(100, 3, 40), FixedShape(100, 9, 11)], ids=["tokens", "number", "long"]
)
def test_samples_that_do_not_fit_a_shape_are_refused(shape: FixedShape) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        pack(samples_of_lengths(12, 8), shape=shape)


@pytest.mark.parametrize("device", ["meta", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_a_batch_has_one_form_on_every_device(device: str) -> None:
    samples = random_samples(6)
    for batch_of in (pack, collate):
        here, there = batch_of(samples), batch_of(samples, device=device)
        assert (here.tokens, here.samples) == (there.tokens, there.samples)
        pairs = [(vars(here), vars(there))]
        if here.packing is not None:
            assert there.packing is not None
            assert (here.packing.lengths, here.packing.groups) == (there.packing.lengths, there.packing.groups)
            pairs.append((vars(here.packing), vars(there.packing)))
        for fields, others in pairs:
            for name, tensor in fields.items():
                if isinstance(tensor, Tensor):
                    assert (tensor.shape, tensor.dtype) == (others[name].shape, others[name].dtype), name
                    assert others[name].device.type == device


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


@pytest.mark.parametrize(("name", "packs"), [("qwen2", True), ("gemma2", False)])
def test_a_live_teacher_does_not_attend_across_packed_samples(name: str, packs: bool) -> None:
    teacher, samples = LiveTeacher(tiny(name), FP32), samples_of_lengths(3, 8, 5, 8)
    assert (teacher.reason_not_to_pack(8) is None) == packs
    torch.testing.assert_close(teacher.hidden(pack(samples)), teacher.hidden(collate(samples)), rtol=1e-4, atol=1e-4)


def test_a_live_teacher_pads_samples_that_are_longer_than_its_window() -> None:
    model = tiny("llama")
    model.config.sliding_window = 8
    teacher = LiveTeacher(model, FP32)
    reasons = [teacher.reason_not_to_pack(length) is None for length in (9, 7, 10, 8, 9)]
    assert reasons == [False, True, False, True, False]


@pytest.mark.parametrize("heads", [(4, 2), (2, 1), (3, 3)], ids=["shared", "one", "width of no kernel"])
def test_packed_samples_have_the_logits_and_gradients_of_padded_ones_to_the_last_digits(heads: tuple[int, int]) -> None:
    config = deepcopy(CONFIGS["llama"])
    config.num_attention_heads, config.num_key_value_heads = heads
    config.head_dim = 10 if heads == (3, 3) else 8
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    samples = samples_of_lengths(40, 3, 17, 33, 8)
    results = []
    for batch in (pack(samples), collate(samples)):
        model.zero_grad()
        rows = (batch.input_ids, batch.attention_mask, batch.predicting)
        hidden = response_hidden_states(model, *rows, batch.packing)
        (hidden * torch.linspace(-1, 1, hidden.numel(), dtype=torch.float64).view(hidden.shape)).sum().backward()
        results.append([hidden.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    for packed, padded in zip(*results, strict=True):
        # The norms of the family compute in fp32.
        torch.testing.assert_close(packed, padded, rtol=1e-5, atol=1e-5 * padded.abs().max().item())
