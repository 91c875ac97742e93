"""The loss of a micro-batch: which models it asks, and that fused and full logits agree on it."""

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pocl.data.batches import Batch, collate
from pocl.losses.sums import ObjectiveSum
from pocl.models.precision import Precision
from pocl.spec import JS, SFT, ForwardKL, Method
from pocl.teacher.distillation_loss import CrossEntropyLoss, DistillationLoss, training_loss
from pocl.teacher.signal import LiveTeacher
from tests.pocl.one_step import samples_of_lengths
from tests.pocl.tiny_models import VOCABULARY, tiny

FP32 = Precision("fp32", torch.device("cpu"))
METHODS: list[Method] = [SFT(), JS()]


def batch() -> Batch:
    return collate(samples_of_lengths(9, 4, 12, 7, silent=(1,)))


class OpaqueLinear(nn.Linear):
    """A linear layer that the engine cannot know to be one, so that full logits are computed."""


def with_opaque_head(model: PreTrainedModel) -> PreTrainedModel:
    head = model.get_output_embeddings()
    opaque = OpaqueLinear(head.in_features, head.out_features, bias=False)
    opaque.weight = head.weight
    model.set_output_embeddings(opaque)
    return model


def objective_and_gradients(model: PreTrainedModel, method: Method) -> tuple[ObjectiveSum, dict[str, Tensor]]:
    teacher = LiveTeacher(tiny("llama", seed=1), FP32)
    loss = training_loss(model, teacher, method, shared_vocabulary=VOCABULARY, precision=FP32)
    sums = loss.objective(batch(), temperature=1.5, kd_weight=0.7, scale=0.25)
    torch.autograd.backward(sums.loss)
    return sums, {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_fused_and_full_logits_give_one_objective_and_gradient(method: Method) -> None:
    fused, gradients = objective_and_gradients(tiny("llama"), method)
    dense, expected = objective_and_gradients(with_opaque_head(tiny("llama")), method)
    torch.testing.assert_close(fused.loss, dense.loss)
    torch.testing.assert_close(fused.cross_entropy, dense.cross_entropy)
    torch.testing.assert_close(fused.divergence, dense.divergence)
    assert gradients.keys() == expected.keys()
    scale = max(each.abs().max().item() for each in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5 * scale)


def test_fused_and_full_logits_give_the_same_scores() -> None:
    teacher = LiveTeacher(tiny("llama", seed=1), FP32)
    for fused, dense in zip(
        *(
            DistillationLoss(model, teacher, ForwardKL(), shared_vocabulary=VOCABULARY, precision=FP32).scores(batch())
            for model in (tiny("llama"), with_opaque_head(tiny("llama")))
        ),
        strict=True,
    ):
        torch.testing.assert_close(fused, dense, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        CrossEntropyLoss(tiny("llama"), FP32).scores(batch()),
        CrossEntropyLoss(with_opaque_head(tiny("llama")), FP32).scores(batch()),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("kd_weight", [0.0, 0.3, 1.0])
def test_sft_is_cross_entropy_whatever_temperature_and_weight_are(kd_weight: float) -> None:
    loss = training_loss(tiny("llama"), None, SFT(), shared_vocabulary=None, precision=FP32)
    sums = loss.objective(batch(), temperature=1.0 + kd_weight, kd_weight=kd_weight, scale=1.0)
    assert sums.loss.item() == sums.cross_entropy.item()
    assert sums.divergence is None
    assert not loss.has_divergence


def test_scores_are_those_of_eval_mode_and_leave_the_mode_as_it_was() -> None:
    model = tiny("gpt2").train()
    loss = CrossEntropyLoss(model, FP32)
    assert torch.equal(loss.scores(batch()), loss.scores(batch()))
    assert model.training


def test_a_method_that_needs_a_teacher_is_refused_without_one() -> None:
    with pytest.raises(ValueError, match="needs a teacher"):
        training_loss(tiny("llama"), None, ForwardKL(), shared_vocabulary=None, precision=FP32)
