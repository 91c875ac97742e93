"""Samples on both sides of a `longrope` model's first length are each read as plain transformers reads them alone."""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config, PhimoeConfig, PreTrainedConfig, PreTrainedModel

from pocl.data.batches import Batch, collate, pack
from pocl.errors import SpecInvalid
from pocl.evaluation.decoding import Decoding
from pocl.evaluation.generate import generate
from pocl.evaluation.sampling import Sampler
from pocl.inspect import check_sequence_length
from pocl.models.packed import can_pack
from pocl.models.precision import Precision
from pocl.models.rope_scaling import rope_switch_length, sample_lengths, scale_rope_per_sample
from pocl.teacher.distillation_loss import CrossEntropyLoss
from tests.pocl.one_step import samples_of_lengths
from tests.pocl.tiny_models import CONFIGS, PAD

FP32 = Precision("fp32", torch.device("cpu"))
SWITCH = 16
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.3, 1.6],
    "long_factor": [1.5, 3.0, 6.0, 9.0],
    "original_max_position_embeddings": SWITCH,
}
_NO_LLAMA = ("model_type", "rope_parameters", "architectures")
_LLAMA = {name: value for name, value in CONFIGS["llama"].to_dict().items() if name not in _NO_LLAMA}
MODELS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**{**_LLAMA, "rope_parameters": LONGROPE}),
    "phi3": Phi3Config(
        **{**_LLAMA, "rope_parameters": LONGROPE, "original_max_position_embeddings": SWITCH, "sliding_window": None}
    ),
    "phimoe": PhimoeConfig(
        **{**_LLAMA, "rope_parameters": {**LONGROPE, "short_mscale": 1.1, "long_mscale": 1.3}, "sliding_window": None},
        num_local_experts=2,
    ),
}
# Of each side of the switch, and at it.
SAMPLES = samples_of_lengths(9, 40, 4, SWITCH, 25, SWITCH + 1)


def plain(name: str) -> PreTrainedModel:
    """The model as transformers builds it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(deepcopy(MODELS[name]), dtype=torch.float32)
    model.train(False)
    return model


def ours(name: str) -> PreTrainedModel:
    model = plain(name)
    scale_rope_per_sample(model)
    return model


def log_probabilities(model: PreTrainedModel, ids: Sequence[int]) -> torch.Tensor:
    """Of each next token, where the text is read by itself, `[tokens, V]`."""
    logits: torch.Tensor = model(input_ids=torch.tensor([ids]), use_cache=False).logits
    return logits[0].double().log_softmax(-1)


def losses_alone(model: PreTrainedModel) -> list[torch.Tensor]:
    """The cross-entropies of each sample's response tokens."""
    losses = []
    for sample in SAMPLES:
        places = torch.arange(sample.prompt_length, len(sample.input_ids))
        log_q = log_probabilities(model, sample.input_ids)
        losses.append(-log_q[places - 1, torch.tensor(sample.input_ids)[places]])
    return losses


def gradients(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


@pytest.mark.parametrize("join", [collate, pack], ids=["padded", "packed"])
@pytest.mark.parametrize("name", MODELS)
def test_scores_of_a_mixed_batch_are_those_of_each_sample_alone(name: str, join: Any) -> None:
    with torch.no_grad():
        expected = torch.cat(losses_alone(plain(name)))
        batch: Batch = join(SAMPLES)
        assert CrossEntropyLoss(ours(name), FP32).scores(batch).double().numpy() == pytest.approx(
            expected.numpy(), rel=1e-5, abs=1e-5
        )
        # The batch as transformers reads it.
        assert CrossEntropyLoss(plain(name), FP32).scores(batch).double().numpy() != pytest.approx(
            expected.numpy(), rel=1e-3
        )


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_gradient_of_a_packed_batch_is_that_of_its_samples_alone(name: str) -> None:
    reference, model = plain(name), ours(name)
    assert can_pack(model, 64)
    torch.cat(losses_alone(reference)).sum().backward()
    loss = CrossEntropyLoss(model, FP32)
    loss.objective(pack(SAMPLES), temperature=1.0, kd_weight=0.0, scale=1.0).loss.backward()
    expected, actual = gradients(reference), gradients(model)
    assert expected.keys() == actual.keys()
    for parameter, gradient in expected.items():
        assert (actual[parameter] - gradient).norm() <= 1e-4 * gradient.norm()


@pytest.mark.parametrize("name", MODELS)
def test_answers_that_grow_beyond_the_switch_are_those_without_a_cache(name: str) -> None:
    reference, model = plain(name), ours(name)
    prompts = [list(sample.input_ids[:length]) for sample, length in zip(SAMPLES, (5, 30, 3, 14, 17, 16), strict=True)]
    expected = []
    with torch.no_grad():
        for prompt in prompts:
            ids = list(prompt)
            for _ in range(12):
                ids.append(int(log_probabilities(reference, ids)[-1].argmax()))
            expected.append(ids[len(prompt) :])
    assert generate(model, prompts, Decoding(12, 4, set(), PAD)) == expected
    # The fourth prompt has 14 tokens: an end before the switch, at it, and after it.
    for end in expected[3][1:4]:
        cut = [answer[: answer.index(end)] if end in answer else answer for answer in expected]
        assert generate(model, prompts, Decoding(12, 4, {end}, PAD)) == cut


def test_sampled_answers_beyond_the_switch_do_not_depend_on_their_batch() -> None:
    model = ours("llama")
    prompts = [list(sample.input_ids[:length]) for sample, length in zip(SAMPLES[:3], (9, 20, 3), strict=True)]
    sampler, keys = Sampler(1.0, 0.9, seed=3), ["a", "b", "c"]
    together = generate(model, prompts, Decoding(20, 3, set(), PAD, sampler=sampler), keys=keys)
    alone = [
        generate(model, [prompt], Decoding(20, 1, set(), PAD, sampler=sampler), keys=[key])[0]
        for prompt, key in zip(prompts, keys, strict=True)
    ]
    assert together == alone


def test_lengths_are_of_the_sample_of_each_token() -> None:
    padded_left, packed, decoding = [0, 0, 0, 1, 2], [0, 1, 0, 1, 2], [7, 7, 3, 0, 4]
    assert sample_lengths(torch.tensor([padded_left, packed])).tolist() == [[1, 1, 3, 3, 3], [2, 2, 3, 3, 3]]
    assert sample_lengths(torch.tensor(decoding).unsqueeze(1)).flatten().tolist() == [8, 8, 4, 1, 5]


def test_other_models_are_left_as_they_are() -> None:
    model = AutoModelForCausalLM.from_config(deepcopy(CONFIGS["llama"]))
    before = [type(module) for module in model.modules()]
    scale_rope_per_sample(model)
    assert [type(module) for module in model.modules()] == before
    assert rope_switch_length(model) is None
    assert rope_switch_length(plain("phi3")) == SWITCH


def test_dynamic_scaling_changes_no_text_that_is_accepted() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**{**_LLAMA, "rope_parameters": rope}))
    before = model.model.rotary_emb.inv_freq.clone()
    longest = int(model.config.max_position_embeddings)
    model(input_ids=torch.full((1, longest), 5))
    assert torch.equal(model.model.rotary_emb.inv_freq, before)
    with pytest.raises(SpecInvalid):
        check_sequence_length(longest + 1, longest)
