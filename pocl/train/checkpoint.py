"""Checkpoints: the full training state on disk, saved atomically and restored bit for bit.

    checkpoints/step-00000120/     from_pretrained loads this directory
        config.json, model.safetensors, tokenizer.json, ..., manifest.json
        training/                  what resuming needs besides the weights
            optimizer.safetensors  the moments of each parameter
            best_epoch.safetensors  the weights after the best epoch of the stage, where it ends by convergence
            rng.safetensors        the states of the generators
            state.json             position and history
            row_scores.json        the scores of each sample of the evaluations that are compared in the end
            manifest.json

Nothing is pickled. A directory counts only with both manifests intact.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import load_file, save_file
from torch.optim import AdamW
from transformers import PreTrainedModel

from pocl.errors import CheckpointCorrupt, LossDiverged, WorkdirMismatch
from pocl.export.model_card import CARD_FILE
from pocl.export.student import StudentExport
from pocl.layout import TRAINING_DIR, WEIGHTS_FILE, checkpoint_name, checkpoints_in, step_of
from pocl.storage import manifest
from pocl.train.state import EvaluatedRows, TrainState

_STATE, _OPTIMIZER, _RNG = "state.json", "optimizer.safetensors", "rng.safetensors"
_BEST_EPOCH = "best_epoch.safetensors"
_WEIGHTS = {"config.json", WEIGHTS_FILE}
_POSITION = {_STATE, _OPTIMIZER, _RNG}
_ROW_SCORES = "row_scores.json"
_EVALUATED_ROWS = TypeAdapter(list[EvaluatedRows])


@dataclass
class Student:
    """What is trained, and what its checkpoints hold besides."""

    model: PreTrainedModel
    export: StudentExport
    """What is saved with its weights."""
    optimizer: AdamW


@dataclass(frozen=True)
class ResumePoint:
    """A checkpoint to resume from, with its training state."""

    directory: Path
    state: TrainState


def save(
    root: Path,
    state: TrainState,
    student: Student,
    *,
    best_epoch_weights: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """Write the training state below `root` and return its directory.

    Args:
        best_epoch_weights: Those of :func:`copy_weights` after the best epoch of the stage; None where there are none.

    Raises:
        DiskFull: when there is no space; older checkpoints are untouched.
        LossDiverged: when a weight or a moment is not finite; nothing is written.
    """
    target = root / checkpoint_name(state.step)
    model = student.model
    moments = _optimizer_tensors(model, student.optimizer)
    _refuse_non_finite(state.step, {**dict(model.named_parameters()), **moments})
    with manifest.new_directory(target) as scratch:
        exported = student.export.write(model, scratch, state.progress_before_scores)
        training = scratch / TRAINING_DIR
        training.mkdir()
        save_file(moments, training / _OPTIMIZER)
        save_file(_rng_tensors(), training / _RNG)
        if best_epoch_weights is not None:
            save_file(dict(best_epoch_weights), training / _BEST_EPOCH)
        _write_state(training, state)
        manifest.write_manifest(training)
        manifest.write_manifest(scratch, weights=exported.weights)
    return target


def add_scores(directory: Path, state: TrainState, *, card: str | None) -> None:
    """Give the checkpoint of a stage's end the scores of the stage: in its training state, and on its card.

    The directory is replaced atomically by one that shares all other files with it.

    Args:
        card: The new card; None leaves the card.

    Raises:
        DiskFull: when there is no space; the checkpoint is as it was.
    """
    linked, training = manifest.read_manifest(directory), manifest.read_manifest(directory / TRAINING_DIR)
    with manifest.new_directory(directory) as scratch:
        (scratch / TRAINING_DIR).mkdir()
        _write_state(scratch / TRAINING_DIR, state)
        manifest.link_files(directory / TRAINING_DIR, scratch / TRAINING_DIR, training)
        if card is not None:
            (scratch / CARD_FILE).write_text(card, encoding="utf-8")
        manifest.link_files(directory, scratch, linked)


def find_resume_point(root: Path) -> tuple[ResumePoint | None, list[str]]:
    """The newest whole training state below `root`, and a sentence for each damaged one that was skipped.

    Raises:
        WorkdirMismatch: it is whole, but another version of the engine wrote it. To skip it would discard its steps.
    """
    skipped: list[str] = []
    for directory in reversed(checkpoints_in(root)):
        if not (directory / TRAINING_DIR).is_dir():
            continue
        try:
            _verify(directory, _WEIGHTS)
            _verify(directory / TRAINING_DIR, _POSITION)
            state = _state_in(directory)
        except CheckpointCorrupt as error:
            skipped.append(f"{directory.name} was passed over: {error}")
            continue
        return ResumePoint(directory, state), skipped
    return None, skipped


def restore_optimizer(directory: Path, model: PreTrainedModel, optimizer: AdamW) -> None:
    """Fill the optimiser and the random generators from a training state that :func:`find_resume_point` returned."""
    tensors = load_file(directory / TRAINING_DIR / _OPTIMIZER)
    for name, parameter in _trained(model):
        if f"{name}:exp_avg" in tensors:
            optimizer.state[parameter] = {
                key: _to_device_of(tensors[f"{name}:{key}"], parameter) for key in ("step", "exp_avg", "exp_avg_sq")
            }
    generators = load_file(directory / TRAINING_DIR / _RNG)
    torch.set_rng_state(generators["cpu"])
    if "cuda" in generators and torch.cuda.is_available():
        torch.cuda.set_rng_state(generators["cuda"])


def copy_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """A copy of the trained weights on the host, by name."""
    return {name: parameter.detach().to("cpu", copy=True).contiguous() for name, parameter in _trained(model)}


def set_weights(model: PreTrainedModel, weights: Mapping[str, torch.Tensor]) -> None:
    """Give `model` the weights of :func:`copy_weights`."""
    with torch.no_grad():
        for name, parameter in _trained(model):
            parameter.copy_(weights[name])


def read_best_epoch_weights(directory: Path) -> dict[str, torch.Tensor] | None:
    """The weights after the best epoch of the stage in the training state `directory`; None where there are none."""
    path = directory / TRAINING_DIR / _BEST_EPOCH
    return load_file(path) if path.exists() else None


def prune(root: Path, *, step: int, keep: int, stage_ends: set[int]) -> None:
    """Keep the newest `keep` training states up to `step`, and of older checkpoints the weights of stage ends alone.

    A training state beyond `step` was skipped as damaged. Counted among the newest it would displace a whole one, so
    it is deleted; the run writes it again.
    """
    newer = 0
    for directory in reversed(checkpoints_in(root)):
        step_of_directory, resumable = step_of(directory), (directory / TRAINING_DIR).is_dir()
        if step_of_directory > step:
            if resumable:
                manifest.discard(directory)
        elif newer < keep:
            newer += 1
        elif step_of_directory not in stage_ends:
            manifest.discard(directory)
        elif resumable:
            manifest.discard(directory / TRAINING_DIR)


def keep_rounded_best(best: Path, step: int) -> Path:
    """A directory with the files of `best/`, the weights after `step`, that later ones do not replace.

    Of earlier such directories the newest is kept, which somebody may be reading.
    """
    earlier = sorted(best.parent.glob(f"{best.name}-*"))
    target = best.with_name(f"{best.name}-{step:08d}")
    with manifest.new_directory(target) as scratch:
        manifest.link_files(best, scratch, manifest.read_manifest(best))
    for directory in [each for each in earlier if each != target][:-1]:
        manifest.discard(directory)
    return target


def _write_state(training: Path, state: TrainState) -> None:
    row_scores = _EVALUATED_ROWS.dump_json(state.row_scores)
    (training / _ROW_SCORES).write_bytes(row_scores)
    state.row_scores_digest = hashlib.sha256(row_scores).hexdigest()
    (training / _STATE).write_text(state.model_dump_json(), encoding="utf-8")


def _state_in(directory: Path) -> TrainState:
    """
    Raises:
        CheckpointCorrupt: the scores of each sample are not those that the state names.
        WorkdirMismatch: another version of the engine wrote it.
    """
    training = directory / TRAINING_DIR
    try:
        state = TrainState.model_validate_json((training / _STATE).read_bytes())
        # Earlier versions kept the scores in the state itself.
        if state.row_scores_digest is not None:
            state.row_scores = _EVALUATED_ROWS.validate_json(_named_row_scores(training, state.row_scores_digest))
        return state
    except ValidationError as error:
        message = f"the training state of {directory.name} cannot be read by this version"
        raise WorkdirMismatch(message) from error


def _named_row_scores(training: Path, digest: str) -> bytes:
    path = training / _ROW_SCORES
    content = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(content).hexdigest() != digest:
        raise CheckpointCorrupt(f"{_ROW_SCORES} of {training.parent.name} is not the file that its state names")
    return content


def _verify(directory: Path, needed: set[str]) -> None:
    listed = {file.path for file in manifest.verify(directory).files}
    if missing := sorted(needed - listed):
        # A manifest that lists no file is valid by itself.
        raise CheckpointCorrupt(f"the manifest of {directory.name} does not list {missing[0]}")


def _refuse_non_finite(step: int, tensors: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        # With a number that is not finite an extreme is not finite either, and aminmax is one pass without a copy.
        if tensor.numel() and not torch.stack(tensor.detach().aminmax()).isfinite().all():
            raise LossDiverged(f"{name} is not finite after step {step}")


def _trained(model: PreTrainedModel) -> Iterator[tuple[str, torch.nn.Parameter]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def _optimizer_tensors(model: PreTrainedModel, optimizer: AdamW) -> dict[str, torch.Tensor]:
    return {
        f"{name}:{key}": value.detach().cpu().contiguous()
        for name, parameter in _trained(model)
        for key, value in _moments(optimizer, parameter).items()
    }


def _moments(optimizer: AdamW, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
    # Empty until the optimiser's first step.
    return dict(optimizer.state.get(parameter, {}))


def _rng_tensors() -> dict[str, torch.Tensor]:
    generators = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        generators["cuda"] = torch.cuda.get_rng_state()
    return generators


def _to_device_of(tensor: torch.Tensor, parameter: torch.nn.Parameter) -> torch.Tensor:
    # Fused AdamW keeps its step counter on the parameter's device.
    return tensor.to(parameter.device)
