"""The warm-up of a model before it ranks: a few steps by cross-entropy, after which it has its weights again.

Everything random follows from the seed, so that a ranking that was interrupted warms up again to the same weights.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, islice

import torch

from pocl.data.batches import EncodedSample
from pocl.errors import LossDiverged, RunStopped
from pocl.out_of_memory import fit_or_refuse
from pocl.spec import Training
from pocl.train import checkpoint
from pocl.train.accumulation import GradientAccumulator
from pocl.train.optimizer import allocate_moments, make_optimizer
from pocl.train.schedule import batches, cosine, shuffled


@dataclass(frozen=True)
class WarmUp:
    """Trains a model for a while."""

    accumulator: GradientAccumulator
    """Of the model, with cross-entropy alone for its loss."""
    samples: Sequence[EncodedSample]
    """What the batches are drawn from; their order has a part in them."""
    training: Training
    steps: int
    seed: int
    should_stop: Callable[[], bool]

    @contextmanager
    def trained(self) -> Iterator[None]:
        """The model is trained while the block lasts, and has its weights again after it.

        Raises:
            RunStopped: `should_stop` turned true before it was trained.
            LossDiverged: the loss or its gradient is not finite.
            OutOfMemory: a single sample does not fit.
        """
        model = self.accumulator.model
        weights = checkpoint.copy_weights(model)
        try:
            self._train()
            yield
        finally:
            checkpoint.set_weights(model, weights)

    def _train(self) -> None:
        # Dropout draws from the global generator, which the run seeds again before it trains.
        torch.manual_seed(self.seed)
        training, model = self.training, self.accumulator.model
        optimizer = make_optimizer(model, training)
        fit_or_refuse(lambda: allocate_moments(optimizer), "The state of the optimiser")
        for step, samples in enumerate(islice(self._batches(), self.steps)):
            if self.should_stop():
                raise RunStopped
            learning_rate = cosine(
                step,
                total=self.steps,
                peak=training.learning_rate,
                floor=training.min_learning_rate,
                warmup=training.warmup_steps,
            )
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            means = self.accumulator.step(samples, temperature=1.0, kd_weight=0.0)
            if not (math.isfinite(means.loss) and math.isfinite(means.grad_norm)):
                raise LossDiverged(f"the loss is not finite at step {step + 1} of the warm-up before the ranking")
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def _batches(self) -> Iterator[Sequence[EncodedSample]]:
        training = self.training
        for epoch in count():
            order = shuffled(self.samples, self.seed, epoch)
            yield from batches(order, training.batch_size, last_batch=training.last_batch)
