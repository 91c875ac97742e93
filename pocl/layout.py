"""The contract of a run with whoever starts it: what its directory holds, and how its process ends.

WORKDIR/
    .lock                    locked by the process that works here
    spec.json                the specification as it is run
    inputs.json              digests of the samples, models and tokenizer with which the run began
    events.jsonl             one event a line
    ranking.jsonl            the samples from easy to hard
    ranking.json             the inputs of that ranking and its digest; without it the ranking does not count
    ranking.partial.jsonl    a ranking under way, one batch a line
    checkpoints/
        step-00000120/       the weights after a step, loadable by from_pretrained
            training/        what continuing needs besides the weights
    answers.jsonl            the greedy answers of all evaluations, one a line
    best/                    the weights of the stage that scores best
    best-00000120/           the same, where they are not in the format of the checkpoint after that step
    about.json               how whoever started the run calls it, for the head of the report, if they said so
    compared/                answers.jsonl and result.json of the run that a control is compared with, if it has one
    final/                   the weights of the last stage
    result.json              the figures
    report.html              the figures for people
    cache/                   what runs share, unless the caller keeps that elsewhere

Readers outside the engine take the names from here, so this module imports nothing that is heavy.
"""

import enum
from pathlib import Path
from typing import Final

LOCK_FILE: Final = ".lock"
SPEC_FILE: Final = "spec.json"
INPUTS_FILE: Final = "inputs.json"
EVENTS_FILE: Final = "events.jsonl"
RANKING_FILE: Final = "ranking.jsonl"
RANKING_INPUTS_FILE: Final = "ranking.json"
PARTIAL_RANKING_FILE: Final = "ranking.partial.jsonl"
CHECKPOINTS_DIR: Final = "checkpoints"
TRAINING_DIR: Final = "training"
BEST_DIR: Final = "best"
FINAL_DIR: Final = "final"
ANSWERS_FILE: Final = "answers.jsonl"
RESULT_FILE: Final = "result.json"
REPORT_FILE: Final = "report.html"
COMPARED_DIR: Final = "compared"
ABOUT_FILE: Final = "about.json"
CACHE_DIR: Final = "cache"
MODEL_DIGESTS_FILE: Final = "model-digests.json"
WEIGHTS_FILE: Final = "model.safetensors"
"""The weights within the directory of a checkpoint, as transformers names them."""

_STEP_PREFIX: Final = "step-"
_STEP_DIGITS: Final = 8


class ExitCode(enum.IntEnum):
    """The exit status of `python -m pocl run`."""

    DONE = 0
    FAILED = 1
    """The last event has the reason."""
    USAGE = 2
    """The specification or the command line is wrong; nothing was started."""
    STOPPED = 75
    """The run was asked to stop and saved its state: the same command continues it. EX_TEMPFAIL of sysexits.h."""


def checkpoint_name(step: int) -> str:
    """The name of the directory that holds the state after an optimiser step, e.g. `step-00000120`."""
    return f"{_STEP_PREFIX}{step:0{_STEP_DIGITS}d}"


def checkpoint_dir(step: int) -> Path:
    """Where the state after an optimiser step is, relative to the directory of the run."""
    return Path(CHECKPOINTS_DIR, checkpoint_name(step))


def step_of(checkpoint: Path) -> int:
    """The optimiser step that the directory of a checkpoint is named after.

    Raises:
        ValueError: the path does not name a checkpoint.
    """
    prefix, _, step = checkpoint.name.partition(_STEP_PREFIX)
    if prefix or not step.isdecimal():
        raise ValueError(f"{checkpoint.name} is not the name of a checkpoint")
    return int(step)


def checkpoints_in(root: Path) -> list[Path]:
    """The directories of checkpoints in `root`, by ascending step."""
    return sorted(root.glob(_STEP_PREFIX + "?" * _STEP_DIGITS))
