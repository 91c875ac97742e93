"""The gradient of one optimiser step, whatever is in memory at once and however many processes share it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pocl.data.batches import EncodedSample, collate, pack
from pocl.data.micro_batches import micro_batches
from pocl.errors import OutOfMemory
from pocl.losses.objective import normaliser
from pocl.spec import SFT, Method
from pocl.teacher.distillation_loss import DistillationLoss
from pocl.train.ranks import Ranks, SingleProcess

MICRO_BATCH_TOKENS = 4096
"""In memory at once, unless one row is longer: beyond it products gain nothing from being larger."""


@dataclass(frozen=True)
class StepMeans:
    """One optimiser step, in means over its response tokens."""

    loss: float
    cross_entropy: float
    divergence: float | None
    tokens: int
    """Response tokens, over all ranks."""
    grad_norm: float
    """Before clipping."""


@dataclass
class GradientAccumulator:
    """Leaves the clipped gradient of an optimiser step in the parameters of `model`.

    The gradient is the sum over the response tokens of all micro-batches on all ranks, divided by their number: it
    depends neither on the cut into micro-batches nor on that into ranks, but for rounding.
    """

    model: PreTrainedModel
    training_loss: DistillationLoss
    method: Method
    max_grad_norm: float
    packed: bool
    """Whether rows are packed; else they are padded."""
    micro_batch_size: int
    """At most this many rows in memory at once; lowered when memory runs out."""
    on_halved: Callable[[int], None]
    """Told the new `micro_batch_size`."""
    ranks: Ranks = field(default_factory=SingleProcess)

    def step(self, rows: Sequence[EncodedSample], *, temperature: float, kd_weight: float) -> StepMeans:
        """Accumulate over `rows`, which are the same on all ranks.

        Out of memory on any rank halves the micro-batch on all, and the step starts again.

        Raises:
            OutOfMemory: single rows do not fit.
        """
        mine = self.ranks.local_samples(rows)
        tokens = sum(row.predicted_tokens for row in rows)
        while True:
            generators = _generators(self.model.device)
            parts = self._parts(mine, temperature, kd_weight, normaliser(tokens))
            # Ranks go on together, or start again together.
            if self.ranks.all_reduce_number(parts is None) == 0 and parts is not None:
                return self._over_ranks(parts, tokens)
            if self.micro_batch_size == 1:
                raise OutOfMemory
            self.model.zero_grad(set_to_none=True)
            _set_generators(self.model.device, generators)
            torch.cuda.empty_cache()
            # A limit that no micro-batch had reached is not worth halving.
            self.micro_batch_size = max(map(len, self._micro_batches(rows))) // 2 or 1
            self.on_halved(self.micro_batch_size)

    def _micro_batches(self, rows: Sequence[EncodedSample]) -> list[list[EncodedSample]]:
        return micro_batches(rows, max_samples=self.micro_batch_size, max_tokens=MICRO_BATCH_TOKENS, packed=self.packed)

    def _parts(
        self, rows: Sequence[EncodedSample], temperature: float, kd_weight: float, share: float
    ) -> Tensor | None:
        """This rank's parts of the means of loss, cross-entropy and divergence, `[3]` float64; None without memory.

        Args:
            share: Of one response token.
        """
        device = self.model.device
        form = pack if self.packed else collate
        parts = torch.zeros(3, dtype=torch.float64, device=device)
        # The loss comes multiplied.
        shares = parts.new_tensor([1.0, share, share])
        try:
            for piece in self._micro_batches(rows):
                sums = self.training_loss.objective(
                    form(piece, device=device),
                    method=self.method,
                    temperature=temperature,
                    kd_weight=kd_weight,
                    scale=share,
                )
                torch.autograd.backward(sums.loss)
                divergence = torch.zeros_like(sums.loss) if sums.divergence is None else sums.divergence
                parts += torch.stack([sums.loss.detach(), sums.cross_entropy, divergence]).double() * shares
        except torch.OutOfMemoryError:
            return None
        return parts

    def _over_ranks(self, parts: Tensor, tokens: int) -> StepMeans:
        self.ranks.all_reduce_(parts)
        self.ranks.all_reduce_gradients(self.model.parameters())
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        loss, cross_entropy, divergence = parts.tolist()
        with_teacher = not isinstance(self.method, SFT)
        return StepMeans(loss, cross_entropy, divergence if with_teacher else None, tokens, norm.item())


def _generators(device: torch.device) -> tuple[Tensor, ...]:
    """The states that dropout draws from."""
    if device.type == "cuda":
        return torch.get_rng_state(), torch.cuda.get_rng_state(device)
    return (torch.get_rng_state(),)


def _set_generators(device: torch.device, states: tuple[Tensor, ...]) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
