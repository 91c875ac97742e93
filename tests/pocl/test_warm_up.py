"""The warm-up before a ranking: repeatable, and the student has its own weights again after it."""

import pytest
import torch

from pocl.data.batches import EncodedSample
from pocl.errors import RunStopped
from pocl.models.precision import Precision
from pocl.spec import Training
from pocl.teacher.distillation_loss import CrossEntropyLoss
from pocl.train import checkpoint
from pocl.train.accumulation import GradientAccumulator
from pocl.train.warm_up import WarmUp
from tests.pocl.one_step import samples_of_lengths
from tests.pocl.tiny_models import tiny

FP32 = Precision("fp32", torch.device("cpu"))
SAMPLES = samples_of_lengths(9, 4, 12, 7, 5)


def warm_up(steps: int = 5, stop_at: int | None = None) -> WarmUp:
    model = tiny("llama")
    accumulator = GradientAccumulator(
        model=model,
        training_loss=CrossEntropyLoss(model, FP32),
        max_grad_norm=1.0,
        packed=False,
        micro_batch_size=2,
        on_halved=lambda _size: None,
    )
    polls = iter(range(steps))
    training = Training(batch_size=2, learning_rate=0.01)
    return WarmUp(accumulator, SAMPLES, training, steps, 10, lambda: next(polls) == stop_at)


def loss_on(model: torch.nn.Module, samples: list[EncodedSample]) -> float:
    ids = [torch.tensor([sample.input_ids]) for sample in samples]
    with torch.no_grad():
        return sum(float(model(input_ids=each, labels=each).loss) for each in ids)


def test_model_is_trained_within_the_block_and_has_its_weights_after_it() -> None:
    warm, again = warm_up(), warm_up()
    model = warm.accumulator.model
    before, loss_before = checkpoint.copy_weights(model), loss_on(model, SAMPLES)
    with warm.trained(), again.trained():
        trained = checkpoint.copy_weights(model)
        assert loss_on(model, SAMPLES) < loss_before
        repeated = checkpoint.copy_weights(again.accumulator.model)
    assert all(torch.equal(trained[name], repeated[name]) for name in trained)
    assert not any(torch.equal(trained[name], before[name]) for name in trained)
    after = checkpoint.copy_weights(model)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_stopped_warm_up_leaves_the_weights_alone() -> None:
    warm = warm_up(stop_at=3)
    before = checkpoint.copy_weights(warm.accumulator.model)
    with pytest.raises(RunStopped), warm.trained():
        pytest.fail("was not stopped")
    after = checkpoint.copy_weights(warm.accumulator.model)
    assert all(torch.equal(after[name], before[name]) for name in before)
