"""Seed data for the fuzzer, which would guess no id: a data set, jobs, and a checkpoint with its files."""

from collections.abc import Mapping
from pathlib import Path

from domain.artifacts import ArtifactStore
from domain.datasets.repository import add_dataset
from domain.db import Database
from domain.jobs import actions
from domain.jobs.event_recorder import add_artifact, add_checkpoint, save_log_tail
from domain.jobs.leases import Claim, claim_next
from domain.jobs.submission import submit_job
from domain.settings import Settings
from pocl.storage.manifest import MANIFEST, sha256_of, write_manifest
from tests.support.requests import jsonl, specification

ARTIFACTS = {
    "ranking.jsonl": b'{"rank": 1}\n',
    "answers.jsonl": b'{"sample": 1}\n',
    "result.json": b"{}",
    "report.html": b"<h1>",
}
FILES = {"model.safetensors": bytes(1000), "config.json": b"{}", "folder/käse-1.txt": b"cheese"}


def insert_seed_data(settings: Settings, scratch: Path) -> Mapping[str, str]:
    """Insert the seed data; its ids as environment variables of the fuzzer."""
    database, store = Database(settings.database_url), ArtifactStore(settings.artifact_root)
    scratch.mkdir()
    (scratch / "samples").write_bytes(jsonl(8))
    samples = store.publish_file(scratch / "samples", "datasets/samples.jsonl")
    with database.transaction(write=True) as session:
        dataset = add_dataset(
            session, project="default", name="samples", rows=8, size_bytes=samples.size, sha256=samples.sha256,
            store_key="datasets/samples.jsonl",
        ).id  # fmt: skip
        unused = store.publish_file(scratch / "samples", "datasets/unused.jsonl")
        unused_dataset = add_dataset(
            session, project="default", name="unused", rows=8, size_bytes=unused.size, sha256=unused.sha256,
            store_key="datasets/unused.jsonl",
        ).id  # fmt: skip
    ended = submit_job(database, settings, specification(dataset), project="default")
    with database.transaction(write=True) as session:
        actions.cancel_job(session, "default", ended.id)
    submit_job(database, settings, specification(dataset), project="default")
    with database.transaction(write=True) as session:
        claim = claim_next(session, worker="w1", lease_seconds=3600)
        assert claim is not None
        save_log_tail(session, claim, "Stage 1 has begun.\n", max_bytes=100)
    _add_artifacts(database, store, claim, scratch)
    checkpoint = _add_checkpoint(database, store, claim, scratch / "checkpoint")
    database.close()
    return {
        "FUZZ_DATASET": dataset,
        "FUZZ_UNUSED_DATASET": unused_dataset,
        "FUZZ_JOB": claim.job_id,
        "FUZZ_ENDED": ended.id,
        "FUZZ_CHECKPOINT": checkpoint,
    }


def _add_artifacts(database: Database, store: ArtifactStore, claim: Claim, scratch: Path) -> None:
    for name, content in ARTIFACTS.items():
        (scratch / name).write_bytes(content)
        key = f"jobs/{claim.job_id}/{name}"
        file = store.publish_file(scratch / name, key)
        with database.transaction(write=True) as session:
            add_artifact(
                session, claim, kind=name.partition(".")[0], store_key=key, size_bytes=file.size, sha256=file.sha256
            )


def _add_checkpoint(database: Database, store: ArtifactStore, claim: Claim, scratch: Path) -> str:
    for name, content in FILES.items():
        (scratch / name).parent.mkdir(parents=True, exist_ok=True)
        (scratch / name).write_bytes(content)
    write_manifest(scratch)
    key = f"jobs/{claim.job_id}/checkpoints/final"
    size = store.publish(scratch, key).size_bytes
    with database.transaction(write=True) as session:
        return add_checkpoint(
            session, claim, kind="final", step=9, stage=1, store_key=key, size_bytes=size,
            manifest_sha256=sha256_of(scratch / MANIFEST),
        ).id  # fmt: skip
