"""What clients choose for a job besides its specification, and the check of it."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from sqlalchemy.orm import Session

from domain.errors import Unprocessable
from domain.jobs.models import LABEL_KEY
from domain.settings import Settings
from domain.trackers.models import MAX_TRACKERS, TrackerChannel, TrackerOptions
from domain.workers.repository import live_trackers
from pocl.errors import FieldError

MAX_LABELS: Final = 16

MAX_TEXT_LENGTH: Final = 200

MAX_PRIORITY: Final = 100

_TRACKER_NEEDS: Final[Mapping[TrackerChannel, str]] = {
    "tensorboard": "no scheduler that is alive can write TensorBoard files: one needs the extra `trackers`",
    "mlflow": "no scheduler that is alive has MLflow: one needs the extra `trackers`, and MLFLOW_TRACKING_URI",
    "wandb": "no scheduler that is alive reaches Weights & Biases: one needs the extra `trackers`, and WANDB_API_KEY",
    "wandb_offline": "no scheduler that is alive can write files of Weights & Biases: one needs the extra `trackers`",
}


@dataclass(frozen=True)
class Limits:
    """Limits of a job; null for no limit of its own."""

    max_runtime_seconds: int | None = None
    """How long all attempts together may run."""
    max_wait_seconds: int | None = None
    """How long the job may wait in the queue for its first attempt."""
    max_attempts: int | None = None
    """How many attempts may be lost or crash; null for the setting of the service."""


@dataclass(frozen=True)
class JobOptions:
    """What clients choose for a job besides its specification."""

    name: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    priority: int = 0
    limits: Limits = Limits()
    retention: Mapping[str, Any] | None = None
    """The fields of the retention policy that the job has for itself."""
    trackers: Sequence[TrackerOptions] = ()
    """Where its metrics go besides the service; of each kind one at most."""


def check_options(session: Session, settings: Settings, options: JobOptions) -> None:
    """
    Raises:
        Unprocessable: the name, a label, the priority or a limit is not valid, or no scheduler has a tracker.
    """
    name, labels, priority = options.name, options.labels, options.priority
    field_errors = []
    if name is not None and not _is_printable(name):
        field_errors.append(FieldError("/name", "name_invalid", f"use at most {MAX_TEXT_LENGTH} printable characters"))
    if len(labels) > MAX_LABELS:
        field_errors.append(FieldError("/labels", "too_many_labels", f"use at most {MAX_LABELS} labels"))
    for key, value in labels.items():
        if not re.fullmatch(LABEL_KEY, key) or not _is_printable(value):
            detail = f"a key matches {LABEL_KEY}, a value has at most {MAX_TEXT_LENGTH} printable characters"
            field_errors.append(FieldError("/labels", "label_invalid", detail))
            break
    if not 0 <= priority <= MAX_PRIORITY:
        field_errors.append(FieldError("/priority", "priority_invalid", f"use 0 to {MAX_PRIORITY}"))
    attempts = options.limits.max_attempts
    if attempts is not None and attempts > settings.max_attempts:
        detail = f"this service allows at most {settings.max_attempts}"
        field_errors.append(FieldError("/limits/max_attempts", "too_many_attempts", detail))
    field_errors += _check_trackers(session, settings, options.trackers)
    if field_errors:
        raise Unprocessable(field_errors=field_errors)


def _check_trackers(session: Session, settings: Settings, trackers: Sequence[TrackerOptions]) -> list[FieldError]:
    if not trackers:
        return []
    if len(trackers) > MAX_TRACKERS:
        return [FieldError("/trackers", "too_many_trackers", f"use at most {MAX_TRACKERS} trackers")]
    field_errors = []
    available = live_trackers(session, settings.lease_seconds)
    kinds: set[str] = set()
    for index, options in enumerate(trackers):
        if options.kind in kinds:
            detail = f"the job has another tracker of the kind {options.kind}: name one of each kind"
            field_errors.append(FieldError(f"/trackers/{index}/kind", "tracker_repeated", detail))
        kinds.add(options.kind)
        # With no scheduler alive, as while it starts again, nothing is known.
        if available is not None and options.channel not in available:
            detail = f"{_TRACKER_NEEDS[options.channel]}; have the operator set it up, or leave the tracker out"
            field_errors.append(FieldError(f"/trackers/{index}/kind", "tracker_not_available", detail))
    return field_errors


def _is_printable(text: str) -> bool:
    return len(text) <= MAX_TEXT_LENGTH and text.isprintable()
