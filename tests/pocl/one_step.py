"""The gradient of one optimiser step of a tiny student: here, or as one of several ranks.

    python -m tests.pocl.one_step RANK WORLD_SIZE RENDEZVOUS_FILE OUT.safetensors

runs every case of `CASES` as that rank, and writes the gradients and means that it ends with.
"""

import sys
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from pocl.data.batches import Batch, EncodedSample
from pocl.models.precision import Precision
from pocl.spec import ForwardKL
from pocl.teacher.distillation_loss import DistillationLoss
from pocl.teacher.signal import LiveTeacher
from pocl.train.accumulation import GradientAccumulator, StepMeans
from pocl.train.ranks import Ranks, SingleProcess, process_group
from tests.pocl.tiny_models import VOCABULARY, tiny

CPU = torch.device("cpu")
PRECISION = Precision("fp32", CPU)
MEANS = "means"


def samples_of_lengths(*lengths: int, silent: Iterable[int] = ()) -> list[EncodedSample]:
    """Samples of these lengths in tokens; those at the indices `silent` have no response token."""
    generator = torch.Generator().manual_seed(4)
    return [
        EncodedSample(
            f"{index:03}",
            tuple(torch.randint(VOCABULARY, (length,), generator=generator).tolist()),
            length if index in silent else length // 2,
        )
        for index, length in enumerate(lengths)
    ]


SAMPLES: dict[str, list[EncodedSample]] = {
    "sixteen": samples_of_lengths(4, 30, 7, 7, 22, 3, 12, 7, 9, 15, 2, 30, 5, 18, 6, 11, silent=(3, 8)),
    # The second of two ranks has no sample, or only one without a response token.
    "one": samples_of_lengths(9),
    "one silent of two": samples_of_lengths(9, 8, silent=(1,)),
    "silence": samples_of_lengths(9, 8, 5, silent=(0, 1, 2)),
}
CASES = [(name, packed) for name in SAMPLES for packed in (False, True)]


class OutOfMemoryTeacher(LiveTeacher):
    """A teacher that runs out of memory over more than `max_samples` samples, and says so by `error`."""

    def __init__(self, max_samples: int, error: Exception | None = None) -> None:
        super().__init__(tiny("llama", seed=1), PRECISION)
        self._max_samples = max_samples
        self._error = error or torch.OutOfMemoryError()
        self.failures = 0

    def hidden(self, batch: Batch) -> Tensor:
        if len(batch.samples) > self._max_samples:
            self.failures += 1
            raise self._error
        return super().hidden(batch)


def make_accumulator(
    *,
    packed: bool,
    ranks: Ranks | None = None,
    teacher: LiveTeacher | None = None,
    micro_batch_size: int = 16,
    student: str = "qwen2",
    halved: list[int] | None = None,
) -> GradientAccumulator:
    model = tiny(student).train()
    live = LiveTeacher(tiny("llama", seed=1), PRECISION) if teacher is None else teacher
    return GradientAccumulator(
        model=model,
        training_loss=DistillationLoss(model, live, ForwardKL(), shared_vocabulary=VOCABULARY, precision=PRECISION),
        max_grad_norm=1e9,
        packed=packed,
        micro_batch_size=micro_batch_size,
        on_halved=([] if halved is None else halved).append,
        ranks=SingleProcess() if ranks is None else ranks,
    )


def run_step(accumulator: GradientAccumulator, samples: list[EncodedSample]) -> tuple[StepMeans, dict[str, Tensor]]:
    """Means and gradients of a step over `samples`."""
    means = accumulator.step(samples, temperature=1.5, kd_weight=0.85)
    parameters = accumulator.model.named_parameters()
    return means, {name: parameter.grad for name, parameter in parameters if parameter.grad is not None}


def as_tensor(means: StepMeans) -> Tensor:
    divergence = 0.0 if means.divergence is None else means.divergence
    return torch.tensor(
        [means.loss, means.cross_entropy, divergence, means.tokens, means.grad_norm], dtype=torch.float64
    )


def run_as_rank(ranks: Ranks) -> dict[str, Tensor]:
    """Means and gradients of this rank after each case, by `case/parameter`."""
    results: dict[str, Tensor] = {}

    def record(case: str, accumulator: GradientAccumulator, samples: list[EncodedSample]) -> None:
        means, gradients = run_step(accumulator, samples)
        results[f"{case}/{MEANS}"] = as_tensor(means)
        results.update({f"{case}/{name}": gradient for name, gradient in gradients.items()})

    for name, packed in CASES:
        record(f"{name} {packed}", make_accumulator(packed=packed, ranks=ranks, micro_batch_size=3), SAMPLES[name])
    # Some of the experts are chosen by the tokens of one rank only.
    record("experts", make_accumulator(packed=False, ranks=ranks, student="mixtral"), SAMPLES["one silent of two"])
    teacher = OutOfMemoryTeacher(max_samples=1 if ranks.rank == 1 else 99)
    accumulator = make_accumulator(packed=True, ranks=ranks, teacher=teacher)
    record("memory", accumulator, SAMPLES["sixteen"])
    results["memory/size"] = torch.tensor([accumulator.micro_batch_size, teacher.failures])
    return results


if __name__ == "__main__":
    rank, world_size, rendezvous, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
    with process_group(
        CPU, rank=rank, world_size=world_size, init_method=f"file://{rendezvous}", timeout=timedelta(seconds=60)
    ) as group:
        save_file(run_as_rank(group), out)
