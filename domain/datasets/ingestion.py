"""Ingestion of data sets: read the samples of an uploaded file, store them, and add the row of the data set."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from domain.datasets import repository
from domain.datasets.models import Dataset
from domain.errors import engine_refusals
from domain.ids import new_id
from pocl.samples.limited_storing import SampleStorer
from pocl.samples.reading import ReadReport
from pocl.spec import FileFormat, ReadOptions
from pocl.storage.manifest import ManifestFile, sha256_of


@dataclass(frozen=True)
class UploadedFile:
    """A file as a client sent it, and how it is to be read."""

    path: Path
    options: ReadOptions
    format_hint: FileFormat | None = None
    """The format that its name or media type says; the content decides, where it can."""


@dataclass(frozen=True)
class StoredDataset:
    """An uploaded file whose samples are in the artifact store, before its row is added."""

    dataset_id: str
    report: ReadReport
    source_size_bytes: int
    source_sha256: str
    store_key: str
    file: ManifestFile


def store_dataset(
    upload: UploadedFile,
    publish: Callable[[Path, str], ManifestFile],
    *,
    storer: SampleStorer,
    directory: Path | None = None,
    dataset_id: str | None = None,
) -> StoredDataset:
    """Read an uploaded file and publish its samples: the long part of an upload, which needs no transaction.

    Args:
        directory: where the samples are written first; beside the file unless given.
        dataset_id: the id of the data set; a new one unless given.
        publish: stores a file under a key of the artifact store.
        storer: of the file; another thread may cancel it.

    Raises:
        EngineRefusal: the file cannot be read, holds no sample, or has rows that are none, of which the first 20 are
            named; nothing is published then.
        ProcessCrashed: the process that read it died.
        StoringCancelled: `storer` was cancelled.
    """
    samples = (directory or upload.path.parent) / f"{upload.path.name}.samples"
    try:
        with engine_refusals():
            report = storer.store(samples, upload.options, hint=upload.format_hint)
        dataset_id = dataset_id or new_id("ds")
        key = samples_key(dataset_id)
        size, digest = upload.path.stat().st_size, sha256_of(upload.path)
        return StoredDataset(dataset_id, report, size, digest, key, publish(samples, key))
    finally:
        samples.unlink(missing_ok=True)


def samples_key(dataset_id: str) -> str:
    """The key of a data set's samples in the artifact store."""
    return f"datasets/{dataset_id}.jsonl"


def add_dataset(session: Session, stored: StoredDataset, *, project: str, name: str) -> Dataset:
    """Add the row of stored samples."""
    report = stored.report
    return repository.add_dataset(
        session,
        project=project,
        name=name,
        rows=report.rows,
        prompts=report.prompts,
        ingestion=describe_ingestion(stored),
        size_bytes=stored.file.size,
        sha256=stored.file.sha256,
        store_key=stored.store_key,
        dataset_id=stored.dataset_id,
    )


def describe_ingestion(stored: StoredDataset) -> dict[str, Any]:
    """How an uploaded file was read, as the row has it."""
    report = stored.report
    return {
        "format": report.format,
        "compressed": report.compressed,
        "size_bytes": stored.source_size_bytes,
        "sha256": stored.source_sha256,
        "forms": dict(report.forms),
        "ignored_columns": [{"name": column, "rows": rows} for column, rows in report.ignored.most_common()],
        "more_ignored": report.more_ignored,
        "with_difficulty": report.with_difficulty,
        "reasoning_columns": [{"name": column, "rows": rows} for column, rows in report.reasoning.most_common()],
        "skipped": report.bad,
        "first_skipped": [asdict(error) for error in report.bad_rows],
    }
