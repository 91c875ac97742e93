"""Gradient accumulation: the gradient of one optimiser step, from any number of micro-batches and processes."""

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pocl.data.batches import Batch, EncodedSample, FixedShape, collate, pack
from pocl.data.micro_batches import bucket_of, micro_batches
from pocl.errors import OutOfMemory
from pocl.models.compiled_layers import CompiledLayers
from pocl.out_of_memory import is_out_of_memory, release_memory
from pocl.teacher.distillation_loss import TrainingLoss
from pocl.train.prefetch import MicroBatchInputs, Prefetcher
from pocl.train.ranks import Ranks, SingleProcess

MICRO_BATCH_TOKENS = 4096
"""Tokens of a micro-batch on a CPU: beyond it products gain nothing from being larger."""


def normaliser(tokens: int) -> float:
    """The factor of every sum over tokens in an optimiser step of `tokens` valid tokens: 1 / tokens, 0 for none."""
    return 1 / tokens if tokens else 0.0


@dataclass(frozen=True)
class StepMeans:
    """One optimiser step, in means over its response tokens."""

    loss: float
    """The objective, with weight and tau squared."""
    cross_entropy: float
    """Nats per token at temperature 1."""
    divergence: float | None
    """Per token, without tau squared; None without a teacher."""
    tokens: int
    """Response tokens, over all ranks."""
    grad_norm: float
    """Euclidean norm of the gradient before clipping."""


@dataclass
class GradientAccumulator:
    """Leaves the clipped gradient of an optimiser step in the parameters of `model`.

    The gradient is the sum over the response tokens of all micro-batches on all ranks, divided by their number: it
    depends neither on the cut into micro-batches nor on that into ranks, but for rounding.
    """

    model: PreTrainedModel
    training_loss: TrainingLoss
    max_grad_norm: float
    packed: bool
    """Whether the samples of a micro-batch are packed (concatenated); else they are padded."""
    micro_batch_size: int
    """Samples of a micro-batch at most; halved when memory runs out."""
    on_halved: Callable[[int], None]
    """Called with the new `micro_batch_size`."""
    ranks: Ranks = field(default_factory=SingleProcess)
    micro_batch_tokens: int = MICRO_BATCH_TOKENS
    """Tokens of a micro-batch at most, unless a single sample is longer."""
    compiled_layers: CompiledLayers = field(default_factory=CompiledLayers)
    """The student's layers as they run in a step."""
    longest_sample: int | None = None
    """No sample has more tokens; where this is given, packed batches are filled up to a few shapes for compiled layers,
    which are compiled for each shape anew."""
    prefetcher: Prefetcher | None = None
    """Prepares micro-batches one ahead; None prepares each when it is its turn."""

    def step(self, samples: Sequence[EncodedSample], *, temperature: float, kd_weight: float) -> StepMeans:
        """Accumulate over `samples`, which are the same on all ranks.

        Out of memory on any rank halves the micro-batch on all, and the step starts again.

        Raises:
            OutOfMemory: a single sample does not fit.
        """
        local_samples = self.ranks.local_samples(samples)
        tokens = sum(sample.predicted_tokens for sample in samples)
        while True:
            rng_states = _rng_states(self.model.device)
            means = self._accumulate(local_samples, temperature, kd_weight, normaliser(tokens))
            # Ranks go on together, or start again together.
            if self.ranks.all_reduce_number(means is None) == 0 and means is not None:
                return self._reduce_and_clip(means, tokens)
            if self.micro_batch_size == 1:
                raise OutOfMemory("A micro-batch of one sample does not fit into memory.")
            self.model.zero_grad(set_to_none=True)
            _restore_rng_states(self.model.device, rng_states)
            release_memory()
            # Halving a limit that no micro-batch had reached would change nothing.
            self.micro_batch_size = max(map(len, self._micro_batches(samples))) // 2 or 1
            self.on_halved(self.micro_batch_size)

    def _micro_batches(self, samples: Sequence[EncodedSample]) -> list[list[EncodedSample]]:
        return micro_batches(
            samples, max_samples=self.micro_batch_size, max_tokens=self.micro_batch_tokens, packed=self.packed
        )

    def _accumulate(
        self, samples: Sequence[EncodedSample], temperature: float, kd_weight: float, scale: float
    ) -> Tensor | None:
        """Add the gradients of this rank's `samples`, each sum over tokens multiplied by `scale`.

        Returns:
            This rank's summands of the means of loss, cross-entropy and divergence, `[3]` float64; None when memory
            ran out.
        """
        means = torch.zeros(3, dtype=torch.float64, device=self.model.device)
        product_weights, layers = self.training_loss.product_weights, self.compiled_layers
        try:
            with product_weights.in_use(), layers.in_use(), closing(self._inputs(samples)) as micro_batches_inputs:
                for inputs in micro_batches_inputs:
                    layers.begin_micro_batch()
                    sums = self.training_loss.objective(
                        inputs.batch,
                        temperature=temperature,
                        kd_weight=kd_weight,
                        scale=scale,
                        teacher_states=inputs.teacher_states,
                    )
                    torch.autograd.backward(sums.loss)
                    product_weights.collect_gradients()
                    divergence = torch.zeros_like(sums.loss) if sums.divergence is None else sums.divergence
                    summands = torch.stack([sums.loss.detach(), sums.cross_entropy, divergence]).double()
                    # The loss is multiplied already, since its gradient must be.
                    summands[1:] *= scale
                    means += summands
        except Exception as error:
            if is_out_of_memory(error):
                return None
            raise
        return means

    def _inputs(self, samples: Sequence[EncodedSample]) -> Generator[MicroBatchInputs]:
        """The inputs of each micro-batch of `samples`."""
        pieces = self._micro_batches(samples)
        if self.prefetcher is not None:
            yield from self.prefetcher.ahead(pieces, self._prepare)
            return
        for piece in pieces:
            yield self._prepare(piece)

    def _prepare(self, samples: Sequence[EncodedSample]) -> MicroBatchInputs:
        batch = self._batch(samples)
        return MicroBatchInputs(batch, self.training_loss.teacher_states(batch))

    def _batch(self, samples: Sequence[EncodedSample]) -> Batch:
        device = self.model.device
        if not self.packed:
            return collate(samples, device=device)
        if self.longest_sample is None:
            return pack(samples, device=device)
        bucket = bucket_of(sum(len(sample.input_ids) for sample in samples), self.micro_batch_tokens)
        # A bound that is the same for all batches of the bucket.
        sequences = self.micro_batch_size + -(-bucket // self.longest_sample)
        return pack(samples, device=device, shape=FixedShape(bucket, sequences, self.longest_sample))

    def _reduce_and_clip(self, means: Tensor, tokens: int) -> StepMeans:
        """Sum means and gradients over all ranks, and clip the gradient.

        What is reported is copied to the host as one tensor: the step's only wait for a GPU.
        """
        self.ranks.all_reduce_(means)
        self.ranks.all_reduce_gradients(self.model.parameters())
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        loss, cross_entropy, divergence, grad_norm = torch.cat([means, norm.double().unsqueeze(0)]).tolist()
        has_divergence = self.training_loss.has_divergence
        return StepMeans(loss, cross_entropy, divergence if has_divergence else None, tokens, grad_norm)


def _rng_states(device: torch.device) -> tuple[Tensor, ...]:
    """The states of the generators that dropout draws from."""
    if device.type == "cuda":
        return torch.get_rng_state(), torch.cuda.get_rng_state(device)
    return (torch.get_rng_state(),)


def _restore_rng_states(device: torch.device, states: tuple[Tensor, ...]) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
