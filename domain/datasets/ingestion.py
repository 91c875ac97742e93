"""Ingestion of data sets: check the samples of an uploaded file, publish it, and add its row."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy.orm import Session

from domain.datasets import repository
from domain.datasets.models import Dataset
from domain.errors import EngineRefusal
from domain.ids import new_id
from pocl.errors import DatasetInvalid, FieldError
from pocl.samples.row_invalid import RowInvalid
from pocl.samples.rows import MAX_NAMED, parse_rows
from pocl.storage.manifest import ManifestFile


def count_samples(path: Path) -> int:
    """The number of samples in a JSONL file.

    Raises:
        EngineRefusal: the file holds no sample, or bad ones, of which the first 20 are named by line.
    """
    samples = bad = 0
    field_errors: list[FieldError] = []
    with path.open("rb") as stream:
        for number, outcome in parse_rows(stream):
            if not isinstance(outcome, RowInvalid):
                samples += 1
                continue
            bad += 1
            if len(field_errors) < MAX_NAMED:
                field_errors.append(FieldError(f"/lines/{number}", outcome.code, outcome.detail))
    if bad:
        named = "" if bad <= MAX_NAMED else f"; the first {MAX_NAMED} are named"
        message = f"{bad} of {samples + bad} rows cannot be used{named}. Correct them and upload the file again."
        raise EngineRefusal(DatasetInvalid(message, field_errors=field_errors))
    if not samples:
        raise EngineRefusal(DatasetInvalid("The file holds no row: send one JSON object on each line."))
    return samples


@dataclass(frozen=True)
class StoredDataset:
    """An uploaded file that was checked and is in the artifact store, before its row is added."""

    dataset_id: str
    samples: int
    store_key: str
    file: ManifestFile


def store_dataset(path: Path, publish: Callable[[str], ManifestFile]) -> StoredDataset:
    """Check a JSONL file and publish it: the long part of an upload, which needs no transaction.

    Args:
        publish: stores the file under a key of the artifact store.

    Raises:
        EngineRefusal: see :func:`count_samples`; nothing is published then.
    """
    samples = count_samples(path)
    dataset_id = new_id("ds")
    key = f"datasets/{dataset_id}.jsonl"
    return StoredDataset(dataset_id, samples, key, publish(key))


def add_dataset(session: Session, stored: StoredDataset, *, project: str, name: str) -> Dataset:
    """Add the row of a stored file."""
    return repository.add_dataset(
        session,
        project=project,
        name=name,
        rows=stored.samples,
        size_bytes=stored.file.size,
        sha256=stored.file.sha256,
        store_key=stored.store_key,
        dataset_id=stored.dataset_id,
    )
