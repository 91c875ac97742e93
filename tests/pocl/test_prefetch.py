"""Micro-batches prepared one ahead, and packed ones filled up to a few shapes: the step stays what it was."""

from threading import Event, current_thread, main_thread

import pytest
import torch
from torch import Tensor

from pocl.data.batches import Batch, EncodedSample, collate
from pocl.data.micro_batches import BUCKETS, bucket_of
from pocl.models.precision import Precision
from pocl.spec import ForwardKL
from pocl.teacher.distillation_loss import training_loss
from pocl.teacher.signal import LiveTeacher
from pocl.train.accumulation import GradientAccumulator, StepMeans
from pocl.train.prefetch import MicroBatchInputs, Prefetcher
from tests.pocl.one_step import samples_of_lengths
from tests.pocl.tiny_models import VOCABULARY, tiny

CPU = torch.device("cpu")
FP32 = Precision("fp32", CPU)
SAMPLES = samples_of_lengths(9, 4, 12, 7, 12, 5)


class StoredTeacher(LiveTeacher):
    """A teacher that has its states, as the cached one has: nothing is computed in the thread that prefetches."""

    def __init__(self) -> None:
        super().__init__(tiny("llama", seed=1), FP32)
        self._states = {sample.digest: super(StoredTeacher, self).hidden(collate([sample])) for sample in SAMPLES}

    def hidden(self, batch: Batch) -> Tensor:
        return torch.cat([self._states[sample.digest] for sample in batch.samples])


def step(
    prefetcher: Prefetcher | None = None, *, longest_sample: int | None = None, micro_batch_tokens: int = 16
) -> tuple[StepMeans, dict[str, Tensor]]:
    model = tiny("llama").train()
    accumulator = GradientAccumulator(
        model,
        training_loss(model, StoredTeacher(), ForwardKL(), shared_vocabulary=VOCABULARY, precision=FP32),
        max_grad_norm=1e9,
        packed=True,
        micro_batch_size=4,
        on_halved=lambda _rows: None,
        micro_batch_tokens=micro_batch_tokens,
        longest_sample=longest_sample,
        prefetcher=prefetcher,
    )
    means = accumulator.step(SAMPLES, temperature=1.5, kd_weight=0.7)
    return means, {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


def test_a_step_with_prefetching_has_the_same_bits() -> None:
    means, gradients = step(Prefetcher(CPU))
    expected_means, expected = step()
    assert means == expected_means
    assert all(torch.equal(gradients[name], gradient) for name, gradient in expected.items())


@pytest.mark.parametrize("micro_batch_tokens", [10, 16, 100])
def test_a_step_of_filled_up_batches_is_that_of_their_samples(micro_batch_tokens: int) -> None:
    means, gradients = step(longest_sample=12, micro_batch_tokens=micro_batch_tokens)
    expected_means, expected = step(micro_batch_tokens=micro_batch_tokens)
    assert means.loss == pytest.approx(expected_means.loss, rel=1e-5)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5)


def test_filled_up_batches_have_few_sizes() -> None:
    assert len({bucket_of(tokens, 4096) for tokens in range(1, 4097)}) == BUCKETS
    assert all(tokens <= bucket_of(tokens, 4096) < tokens + 1024 for tokens in (1, 1024, 1025, 4096, 5000))


def inputs_of(sample: EncodedSample) -> MicroBatchInputs:
    return MicroBatchInputs(collate([sample]), None)


def sample_in(batch: Batch) -> EncodedSample:
    (sample,) = batch.samples
    return sample


def test_the_next_micro_batch_is_prepared_in_a_thread_before_it_is_asked_for() -> None:
    prepared = {sample.digest: Event() for sample in SAMPLES}

    def prepare(sample: EncodedSample) -> MicroBatchInputs:
        assert current_thread() is not main_thread()
        prepared[sample.digest].set()
        return inputs_of(sample)

    order = []
    for index, inputs in enumerate(Prefetcher(CPU).ahead(SAMPLES, prepare)):
        order.append(sample_in(inputs.batch))
        for following in SAMPLES[index + 1 : index + 2]:
            assert prepared[following.digest].wait(timeout=60)
        assert not any(prepared[later.digest].is_set() for later in SAMPLES[index + 2 :])
    assert order == SAMPLES


def test_an_error_of_the_preparation_is_raised_where_its_inputs_would_be() -> None:
    def prepare(sample: EncodedSample) -> MicroBatchInputs:
        if sample is SAMPLES[1]:
            raise torch.OutOfMemoryError
        return inputs_of(sample)

    ahead = Prefetcher(CPU).ahead(SAMPLES, prepare)
    assert sample_in(next(ahead).batch) is SAMPLES[0]
    with pytest.raises(torch.OutOfMemoryError):
        next(ahead)


def test_nothing_is_prepared_where_there_is_nothing() -> None:
    assert list(Prefetcher(CPU).ahead([], inputs_of)) == []


@pytest.mark.cuda
def test_a_step_with_prefetching_on_a_gpu_is_that_without() -> None:
    device = torch.device("cuda")
    batches = [collate([sample], device=device) for sample in SAMPLES]
    ahead = Prefetcher(device).ahead(
        SAMPLES,
        lambda sample: MicroBatchInputs(collate([sample], device=device), torch.ones(1).pin_memory().to(device)),
    )
    for inputs, expected in zip(ahead, batches, strict=True):
        assert torch.equal(inputs.batch.input_ids, expected.input_ids)
        assert inputs.teacher_states is not None
        assert inputs.teacher_states.item() == 1
