"""The checkpoints of a run, written as it goes on and announced: training states, ends of stages, the best weights."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from torch import Tensor

from pocl.events import CheckpointSaved, Sink
from pocl.export.model_card import TRAINED_DTYPE
from pocl.layout import BEST_DIR, CHECKPOINTS_DIR, checkpoint_dir
from pocl.spec import DistillationSpec
from pocl.storage.manifest import read_manifest
from pocl.train import checkpoint
from pocl.train.checkpoint import Student
from pocl.train.state import TrainState


@dataclass
class CheckpointWriter:
    """Writes the checkpoints of one run below `workdir`."""

    workdir: Path
    spec: DistillationSpec
    student: Student
    state: TrainState
    sink: Sink
    _saved: tuple[int, ...] = field(init=False)
    """Steps and scores of the training state on disk."""

    def __post_init__(self) -> None:
        self._saved = self._progress

    @property
    def steps_since_saved(self) -> int:
        """The optimiser steps that are not on disk."""
        return self.state.step - self._saved[0]

    @property
    def is_saved(self) -> bool:
        """Whether the training state on disk has all steps and scores."""
        return self._progress == self._saved

    def save(
        self, kind: Literal["training", "stage"], stage: int, best_epoch_weights: Mapping[str, Tensor] | None
    ) -> None:
        """Save the training state, and drop those beyond the number to keep.

        Args:
            best_epoch_weights: Those after the best epoch so far of a stage that is scored after each.

        Raises:
            DiskFull, LossDiverged: as :func:`pocl.train.checkpoint.save`; older checkpoints are untouched.
        """
        root = self.workdir / CHECKPOINTS_DIR
        directory = checkpoint.save(root, self.state, self.student, best_epoch_weights=best_epoch_weights)
        self._saved = self._progress
        self._announce(kind, directory, stage, step=self.state.step)
        keep, stage_ends = self.spec.checkpoints.keep, set(self.state.stage_ends)
        checkpoint.prune(root, step=self.state.step, keep=keep, stage_ends=stage_ends)

    def add_scores(self, stage: int) -> None:
        """Add the scores of the stage that has just ended to its checkpoint, which is then announced as the stage's.

        Raises:
            DiskFull: when there is no space; the checkpoint is as it was.
        """
        export, directory = self.student.export, self.workdir / checkpoint_dir(self.state.step)
        card = export.card(self.student.model, self.state.progress, read_manifest(directory).requires)
        checkpoint.add_scores(directory, self.state, card=card)
        self._saved = self._progress
        self._announce("stage", directory, stage, step=self.state.step)

    def keep_best(self, stage: int) -> None:
        """Keep the weights at the end of `stage` as the best ones."""
        step, best = self.state.stage_ends[stage], self.workdir / BEST_DIR
        source = self.workdir / checkpoint_dir(step)
        exported = self.student.export.link(self.student.model, source, best, self.state.progress)
        # `best/` changes with the next better stage; the directory that is announced does not.
        announced = source if exported.dtype == TRAINED_DTYPE else checkpoint.keep_rounded_best(best, step)
        self._announce("best", announced, stage, step=step)

    @property
    def _progress(self) -> tuple[int, ...]:
        return self.state.step, len(self.state.evaluations), len(self.state.row_scores)

    def _announce(self, kind: Literal["training", "stage", "best"], directory: Path, stage: int, *, step: int) -> None:
        self.sink(
            CheckpointSaved(
                kind=kind,
                path=directory.relative_to(self.workdir).as_posix(),
                step=step,
                stage=stage,
                size_bytes=read_manifest(directory).size_bytes,
            )
        )
