"""The curriculum as a loop: stages, epochs, optimiser steps.

One optimiser step, :meth:`Trainer.step`, takes a batch of samples with T response tokens in all. With p the teacher's
and q the student's distribution of a token at temperature tau, w the KD weight and D the divergence of the method,

    loss = 1/T  sum over response tokens of  (1 - w) CE + w s D(p, q),   s = tau^2 or 1  (pocl.losses.objective)
    gradient = d loss / d weights, scaled down to a norm of `max_grad_norm` where it is larger
    weights <- AdamW(weights, gradient) at the learning rate of the schedule

From here to the gradient a step passes the modules below, and each calls only modules further down the list; of a
cached and a live teacher, and of the three ways to the loss, it takes one:

    train/loop                  sets the learning rate, refuses a loss that is not finite, and takes the AdamW step
    train/schedule              the learning rate of the step
    train/evaluations           how many evaluations are left
    train/eta                   the time of the step, and what is left
    train/state                 the metrics of the step, for the training state
    train/accumulation          sums gradients over micro-batches and ranks, and clips them
    train/ranks                 which samples this process works on; sums over processes
    data/micro_batches          cuts the batch into pieces that fit in memory
    teacher/distillation_loss   joins teacher, student and objective for a micro-batch
    teacher/cache               the teacher's final hidden states from memory-mapped files
    teacher/signal              the same from the teacher itself
    data/batches                a micro-batch as tensors, padded or packed, with labels shifted by one
    prompting/encoded_sample    which tokens of a sample are its responses
    models/product_weights      copies of weights in the format of the products; their gradients in fp32
    models/compiled_layers      decoder layers with a compiled forward, where the specification asks for it
    models/heads                runs the student up to its output head, at the positions that predict a response token
    models/packed               attention that does not cross from one packed sample into the next
    models/attention_span       how far back attention reaches, when a model is tried
    models/batched_attention    the same by products over padded rows, where no varlen kernel can run
    data/packing              where the samples of a packed batch are
    data/transfer             arrays of the host on the device, in one copy
    models/precision            autocast
    models/rounding             whether a packed batch was computed right, when a model is tried
    models/positions            position ids that follow from the padding
    losses/fused                the objective from hidden states, chunk by chunk of tokens
    losses/fused_cross_entropy  the same without a teacher
    losses/dense                the objective from full logits, for output heads that are no linear map
    losses/objective            temperature, tau squared, KD weight and the shared vocabulary
    losses/registry             the divergence of the method
    losses/buffers              formats, sizes and memory of the pass
    losses/both_heads           the heads of student and teacher, chunk by chunk and tile by tile
    losses/projection           logits of a chunk: products with the output heads
    losses/tile                 cross-entropy and divergence of a tile of tokens, and their gradient in place
    losses/gradient             the closed-form gradient of the divergence
    losses/divergence           the divergence itself
    losses/backprojection       products back to hidden states and the head's weight
    losses/sums                 the mixed sum, joined to autograd, which carries the gradient on through the student

Everything random is drawn from (seed, stage, epoch), so the position in :class:`TrainState` is all that a resumed run
needs to see the same batches in the same order.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from torch import Tensor

from pocl.callbacks import ShouldStop
from pocl.data.batches import EncodedSample
from pocl.errors import LossDiverged, RunStopped
from pocl.events import PhaseChanged, Sink, StageFinished, StageStarted, StepLogged, Warned
from pocl.models.compiled_layers import CompiledLayers
from pocl.out_of_memory import HALVED_IS_NOT_EXACT, fit_or_refuse
from pocl.plan import StagePlan
from pocl.spec import ByConvergence, DistillationSpec
from pocl.teacher.distillation_loss import TrainingLoss
from pocl.train import checkpoint
from pocl.train.accumulation import MICRO_BATCH_TOKENS, GradientAccumulator, StepMeans
from pocl.train.checkpoint import Student
from pocl.train.checkpoint_writer import CheckpointWriter
from pocl.train.eta import EtaEstimator
from pocl.train.evaluations import StudentEvaluations, StudentScoring
from pocl.train.optimizer import allocate_moments, make_optimizer
from pocl.train.prefetch import Prefetcher
from pocl.train.ranks import Ranks, SingleProcess
from pocl.train.schedule import batches, cosine, shuffled
from pocl.train.selection import best_chosen_by, best_epoch, has_converged
from pocl.train.state import FinishedStage, MetricRow, TrainState


@dataclass
class Trainer:
    """Trains a student through the stages of `table` and leaves checkpoints below `workdir`."""

    spec: DistillationSpec
    table: tuple[StagePlan, ...]
    samples: Sequence[EncodedSample]
    """Training samples in the order of the curriculum, of which each stage takes the first ones."""
    student: Student
    training_loss: TrainingLoss
    """The loss of a micro-batch."""
    workdir: Path
    sink: Sink
    should_stop: ShouldStop
    state: TrainState
    """Where to go on; it is changed in place."""
    packed: bool
    """Whether the samples of a micro-batch are packed (concatenated); else they are padded."""
    scoring: StudentScoring | None = None
    """Scores the student; None without samples to evaluate on."""
    micro_batch_tokens: int = MICRO_BATCH_TOKENS
    """Tokens of a micro-batch at most, unless a single sample is longer."""
    eta: EtaEstimator = field(default_factory=EtaEstimator)
    ranks: Ranks = field(default_factory=SingleProcess)
    """The processes that share each step."""
    compiled_layers: CompiledLayers = field(default_factory=CompiledLayers)
    """The student's layers as they run in a step."""
    prefetcher: Prefetcher | None = None
    """Prepares micro-batches ahead; None prepares each when it is its turn."""
    should_pause: ShouldStop = lambda: False
    """Called at the end of each stage but the last; true stops the run there."""
    best_epoch_weights: dict[str, Tensor] | None = None
    """The weights, on the host, after the best epoch so far of a stage that is scored after each."""
    accumulator: GradientAccumulator = field(init=False)
    evaluations: StudentEvaluations = field(init=False)
    checkpoints: CheckpointWriter = field(init=False)

    def __post_init__(self) -> None:
        self.evaluations = StudentEvaluations(self.scoring, self.spec, self.state, self.sink, self.eta)
        self.checkpoints = CheckpointWriter(self.workdir, self.spec, self.student, self.state, self.sink)
        self.accumulator = GradientAccumulator(
            model=self.student.model,
            training_loss=self.training_loss,
            max_grad_norm=self.spec.training.max_grad_norm,
            packed=self.packed,
            micro_batch_size=self.state.micro_batch_size,
            on_halved=self._note_halved,
            ranks=self.ranks,
            compiled_layers=self.compiled_layers,
            longest_sample=self.spec.data.max_length if self.compiled_layers.are_compiled else None,
            prefetcher=self.prefetcher,
            micro_batch_tokens=self.micro_batch_tokens,
        )

    def run(self) -> TrainState:
        """Train what is left of the curriculum.

        Raises:
            RunStopped: when asked to stop; the training state is saved.
            LossDiverged, OutOfMemory, DiskFull: the last checkpoint is whole.
        """
        try:
            self.evaluations.score_initial()
            for stage in self.table:
                if self.state.stage == stage.index:
                    self._run_stage(stage)
                # Just ended. Of a state further on, this was done before it was saved, perhaps on another machine.
                if self.state.stage == stage.index + 1 and self.state.stage_step == 0:
                    self._score_stage(stage)
                    if stage is not self.table[-1] and self.should_pause():
                        raise RunStopped
        except RunStopped:
            # Scores are saved as steps are, so that a resumed run need not compute them again.
            if not self.checkpoints.is_saved:
                self._save("training", self.state.stage)
            raise
        if best_chosen_by(self.state.evaluations, self.spec.evaluation.best_by) == "cross_entropy":
            message = f"{self.spec.evaluation.best_by} is the same after every stage: the best one is by cross-entropy"
            self.sink(Warned(code="best_by_cross_entropy", message=message))
        return self.state

    def _run_stage(self, stage: StagePlan) -> None:
        state = self.state
        self.sink(PhaseChanged(phase="training", stage=stage.index))
        self.sink(
            StageStarted(
                stage=stage.index,
                samples=stage.samples,
                temperature=stage.temperature,
                kd_weight=stage.kd_weight,
                steps=stage.steps,
                first_step=state.step - state.stage_step,
            )
        )
        # Before the first micro-batch, which can be halved; the state of the optimiser cannot.
        fit_or_refuse(lambda: allocate_moments(self.student.optimizer), "The state of the optimiser")
        while not self._stage_is_over(stage):
            for samples in self._batches_left_in_epoch(stage):
                self._save_if_due()
                self.step(stage, samples)
            self._score_epoch()
            state.epoch += 1
            state.batch = 0
        self._finish_stage(stage)

    def _stage_is_over(self, stage: StagePlan) -> bool:
        if self.state.batch > 0:
            # Its last epoch may be trained, and not yet scored.
            return False
        if self.state.stage_step >= stage.steps:
            return True
        curriculum, advance = self.spec.curriculum, self.spec.curriculum.advance
        return (
            isinstance(advance, ByConvergence)
            and curriculum.ends_by_convergence
            and has_converged(self.state.epoch_scores, patience=advance.patience, min_delta=advance.min_delta)
        )

    def _batches_left_in_epoch(self, stage: StagePlan) -> list[Sequence[EncodedSample]]:
        state, training = self.state, self.spec.training
        epoch_batches = batches(
            shuffled(self.samples[: stage.samples], self.spec.seed, stage.index, state.epoch),
            training.batch_size,
            last_batch=training.last_batch,
        )
        # A control with a fixed number of steps may end inside an epoch.
        budget = stage.steps - state.stage_step
        return epoch_batches[state.batch : state.batch + budget]

    def step(self, stage: StagePlan, samples: Sequence[EncodedSample]) -> None:
        """One optimiser step over `samples`, on the schedule of `stage`.

        Raises:
            LossDiverged: the loss or its gradient is not finite; the weights are as before.
            OutOfMemory: a single sample does not fit.
        """
        state, optimizer = self.state, self.student.optimizer
        tokens = sum(len(sample.input_ids) for sample in samples)
        learning_rate = self._learning_rate(stage)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        with self.eta.step(tokens):
            means = self.accumulator.step(samples, temperature=stage.temperature, kd_weight=stage.kd_weight)
            if not (math.isfinite(means.loss) and math.isfinite(means.grad_norm)):
                what = "gradient" if math.isfinite(means.loss) else "loss"
                culprits = ", ".join(sample.digest[:12] for sample in samples[:8])
                raise LossDiverged(f"the {what} is not finite at step {state.step + 1}; its samples are {culprits}")
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        state.step += 1
        state.stage_step += 1
        state.batch += 1
        state.tokens_seen += tokens
        self._log(stage, means, learning_rate)

    def _learning_rate(self, stage: StagePlan) -> float:
        training = self.spec.training
        carried = self.spec.curriculum.optimizer_at_stage == "carry"
        return cosine(
            self.state.stage_step + (stage.first_step if carried else 0),
            total=sum(planned.steps for planned in self.table) if carried else stage.steps,
            peak=training.learning_rate,
            floor=training.min_learning_rate,
            warmup=training.warmup_steps,
        )

    def _note_halved(self, micro_batch_size: int) -> None:
        self.state.micro_batch_size = micro_batch_size
        self.state.note_not_exact(HALVED_IS_NOT_EXACT)
        message = f"out of memory: the micro-batch is now {micro_batch_size} rows"
        self.sink(Warned(code="micro_batch_halved", message=message))

    def _log(self, stage: StagePlan, means: StepMeans, learning_rate: float) -> None:
        state = self.state
        stages_after = self.table[stage.index + 1 :]
        steps_left = stage.steps - state.stage_step + sum(planned.steps for planned in stages_after)
        row = MetricRow(
            step=state.step,
            stage=stage.index,
            loss=means.loss,
            cross_entropy=means.cross_entropy,
            divergence=means.divergence,
            temperature=stage.temperature,
            learning_rate=learning_rate,
        )
        state.log(row)
        epochs_left = stage.epochs - state.epoch + sum(planned.epochs for planned in stages_after)
        evaluations = self.evaluations.count_left(stages=1 + len(stages_after), epochs=epochs_left)
        low, high = self.eta.seconds_left_range(steps=steps_left, evaluations=evaluations)
        self.sink(
            StepLogged(
                **row.model_dump(),
                total_steps=state.step + steps_left,
                grad_norm=means.grad_norm,
                kd_weight=stage.kd_weight,
                tokens=means.tokens,
                tokens_seen=state.tokens_seen,
                tokens_per_second=self.eta.tokens_per_second,
                eta_seconds=self.eta.seconds_left(steps=steps_left, evaluations=evaluations),
                eta_low_seconds=low,
                eta_high_seconds=high,
            )
        )

    def _score_epoch(self) -> None:
        score = self.evaluations.score_epoch()
        if score is None:
            return
        self.state.epoch_scores.append(score)
        if best_epoch(self.state.epoch_scores) == len(self.state.epoch_scores):
            self.best_epoch_weights = checkpoint.copy_weights(self.student.model)
        self.sink(PhaseChanged(phase="training", stage=self.state.stage))

    def _finish_stage(self, stage: StagePlan) -> None:
        state, epochs = self.state, self.state.epoch
        kept_epoch = self._restore_best_epoch()
        state.finished_stages.append(
            FinishedStage(
                kept_epoch=kept_epoch,
                samples=stage.samples,
                temperature=stage.temperature,
                kd_weight=stage.kd_weight,
                method=self.spec.method,
                recipe=self.spec.recipe_digest,
                end_step=state.step,
            )
        )
        state.stage += 1
        state.epoch = state.batch = state.stage_step = 0
        state.epoch_scores = []
        if self.spec.curriculum.optimizer_at_stage == "restart":
            self.student.optimizer = make_optimizer(self.student.model, self.spec.training)
        # The checkpoint of a stage gets the scores of the stage; until then it is there to continue from.
        is_scored = self.evaluations.scores_stage(is_last=stage is self.table[-1])
        self._save("training" if is_scored else "stage", stage.index)
        self.sink(StageFinished(stage=stage.index, step=state.step, epochs=epochs, kept_epoch=kept_epoch))

    def _restore_best_epoch(self) -> int | None:
        """Give the student the weights of the stage's best epoch, where it was scored after each.

        The moments of an optimiser that is carried into the next stage stay those of the last epoch.

        Returns:
            How many epochs of the stage the weights were trained for; None where no epoch was scored.
        """
        scores, weights = self.state.epoch_scores, self.best_epoch_weights
        if weights is None:
            return None
        kept_epoch = best_epoch(scores)
        if kept_epoch < len(scores):
            checkpoint.set_weights(self.student.model, weights)
        self.best_epoch_weights = None
        return kept_epoch

    def _score_stage(self, stage: StagePlan) -> None:
        """Score the stage that has just ended, and keep its weights if it is the best so far."""
        made = self.state.evaluation_keys
        self.evaluations.score_stage_on_validation(stage.index)
        self.evaluations.score_stage_on_others(stage.index, is_last=stage is self.table[-1])
        # A stage that another run trained has its checkpoint there.
        if self.state.evaluation_keys != made and self.state.finished_stages[-1].recipe == self.spec.recipe_digest:
            self.checkpoints.add_scores(stage.index)
        if self.evaluations.best_stage == stage.index:
            self.checkpoints.keep_best(stage.index)

    def _save_if_due(self) -> None:
        """Save on the interval, and look whether to stop.

        Looked at before a step and not after it, so that a stage end, which is saved anyway, is saved once.
        """
        if self.checkpoints.steps_since_saved >= self.spec.checkpoints.every_steps:
            self._save("training", self.state.stage)
        if self.should_stop():
            raise RunStopped

    def _save(self, kind: Literal["training", "stage"], stage: int) -> None:
        self.checkpoints.save(kind, stage, self.best_epoch_weights)
