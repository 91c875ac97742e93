"""Validation of large uploads after they were answered: a lease on each, held by the API process that reads the file.

A data set that is `validating` has its file in the artifact store, under :func:`source_key`. A process that dies leaves
a lease that expires, and any other goes on with it. No function commits; leases go by the database's clock.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Final

import sqlalchemy as sa
from sqlalchemy.orm import Session

from domain.datasets.ingestion import StoredDataset, describe_ingestion
from domain.datasets.models import Dataset
from domain.db import db_now
from pocl.errors import FieldError
from pocl.spec import FileFormat, ReadOptions

MAX_VALIDATIONS: Final = 3
"""How often the reading of a file may end in the death of its process before the data set is refused."""


@dataclass(frozen=True)
class Refusal:
    """Why a file is no data set."""

    code: str
    message: str
    """One sentence that says what to do."""
    retryable: bool = False
    """Whether the same file may be accepted another time."""
    errors: Sequence[FieldError] = ()


@dataclass(frozen=True)
class ValidationClaim:
    """The lease of one process on a data set that it validates."""

    dataset_id: str
    number: int
    """How often the validation was begun, by which a process that lost its lease changes nothing."""
    options: ReadOptions
    format_hint: FileFormat | None


def source_key(dataset_id: str) -> str:
    """The key of the uploaded file in the artifact store, until it is validated."""
    return f"uploads/{dataset_id}"


def add_validating(
    session: Session,
    *,
    dataset_id: str,
    project: str,
    name: str,
    store_key: str,
    options: ReadOptions,
    format_hint: FileFormat | None,
) -> Dataset:
    """Add the row of a data set whose file is still to be read.

    Args:
        store_key: where its samples will be.
    """
    dataset = Dataset(
        id=dataset_id,
        project=project,
        name=name,
        rows=0,
        size_bytes=0,
        sha256="",
        store_key=store_key,
        status="validating",
        upload={"options": options.model_dump(mode="json"), "format_hint": format_hint},
    )
    session.add(dataset)
    session.flush()
    return dataset


def count_waiting(session: Session) -> int:
    """The number of data sets whose validation nobody holds."""
    return session.scalar(sa.select(sa.func.count()).select_from(Dataset).where(*_waits())) or 0


def exists(session: Session, dataset_id: str) -> bool:
    """Whether the data set has not been deleted."""
    return session.scalar(sa.select(Dataset.id).where(Dataset.id == dataset_id)) is not None


def claim_validation(session: Session, *, lease_seconds: float) -> ValidationClaim | None:
    """Claim the data set that has waited for longest; null where none waits."""
    dataset = session.scalars(
        sa.select(Dataset).where(*_waits()).order_by(Dataset.id).limit(1).with_for_update(skip_locked=True)
    ).one_or_none()
    if dataset is None:
        return None
    number = dataset.validations + 1
    upload = dataset.upload or {}
    session.execute(
        sa.update(Dataset)
        .where(Dataset.id == dataset.id)
        .values(validations=number, validated_until=db_now(lease_seconds))
    )
    options = ReadOptions.model_validate(upload.get("options", {}))
    return ValidationClaim(dataset.id, number, options, upload.get("format_hint"))


def renew_validation(session: Session, claim: ValidationClaim, *, lease_seconds: float) -> bool:
    """Renew the lease; false where the process has lost it, or the data set was deleted."""
    return _write(session, claim, {"validated_until": db_now(lease_seconds)})


def release_validation(session: Session, claim: ValidationClaim) -> bool:
    """Give the lease back uncounted, since the process ends."""
    return _write(session, claim, {"validated_until": None, "validations": claim.number - 1})


def complete_validation(session: Session, claim: ValidationClaim, stored: StoredDataset) -> bool:
    """Make the data set ready; false where the process has lost its lease."""
    report = stored.report
    columns = {
        "status": "ready",
        "rows": report.rows,
        "prompts": report.prompts,
        "ingestion": describe_ingestion(stored),
        "size_bytes": stored.file.size,
        "sha256": stored.file.sha256,
    }
    return _write(session, claim, {**columns, "upload": None, "validated_until": None})


def refuse_validation(session: Session, claim: ValidationClaim, refusal: Refusal) -> bool:
    """Refuse the data set; false where the process has lost its lease."""
    described = {**asdict(refusal), "errors": [asdict(error) for error in refusal.errors]}
    return _write(session, claim, {"status": "refused", "refusal": described, "upload": None, "validated_until": None})


def _waits() -> tuple[sa.ColumnElement[bool], ...]:
    expired = sa.or_(Dataset.validated_until.is_(None), Dataset.validated_until < db_now())
    return Dataset.status == "validating", expired


def _write(session: Session, claim: ValidationClaim, columns: dict[str, object]) -> bool:
    held = sa.update(Dataset).where(
        Dataset.id == claim.dataset_id, Dataset.status == "validating", Dataset.validations == claim.number
    )
    changed = session.execute(
        held.values(**columns).returning(Dataset.id), execution_options={"synchronize_session": False}
    )
    return bool(changed.all())
