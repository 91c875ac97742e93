"""Seed data for the fuzzer, which would guess no id: a data set, jobs, a checkpoint with its files, keys, projects and
webhooks.
"""

from collections.abc import Mapping
from pathlib import Path

from sqlalchemy.orm import Session

from domain.artifacts import ArtifactStore
from domain.datasets.repository import add_dataset
from domain.db import Database
from domain.jobs import actions
from domain.jobs.engine_logs import LogChunk, append_log
from domain.jobs.event_recorder import add_artifact, add_checkpoint
from domain.jobs.leases import Claim, claim_next
from domain.jobs.submission import submit_job
from domain.keys.repository import create_key
from domain.projects.repository import create_project
from domain.settings import Settings
from domain.webhooks.deliveries import add_test_delivery
from domain.webhooks.repository import add_endpoint, database_time
from pocl.events import CheckpointKind
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
        append_log(session, claim, [LogChunk(0, b"Stage 1 has begun.\n")], max_bytes=1000)
    _add_artifacts(database, store, claim, scratch)
    with database.transaction(write=True) as session:
        keys, webhooks = _add_keys(session), _add_webhooks(session)
        for project in ("fuzzed", "unused"):
            create_project(session, project)
    checkpoint = _add_checkpoint(database, store, claim, scratch / "checkpoint", "final")
    unused_checkpoint = _add_checkpoint(database, store, claim, scratch / "unused", "best")
    database.close()
    return {
        "FUZZ_DATASET": dataset,
        "FUZZ_UNUSED_DATASET": unused_dataset,
        "FUZZ_JOB": claim.job_id,
        "FUZZ_ENDED": ended.id,
        "FUZZ_CHECKPOINT": checkpoint,
        "FUZZ_UNUSED_CHECKPOINT": unused_checkpoint,
        "FUZZ_PROJECT": "fuzzed",
        "FUZZ_UNUSED_PROJECT": "unused",
        **keys,
        **webhooks,
    }


def _add_keys(session: Session) -> dict[str, str]:
    names = ("FUZZ_KEY", "FUZZ_UNUSED_KEY")
    return {name: create_key(session, project="default", name=name, scopes=["read"])[0].id for name in names}


def _add_webhooks(session: Session) -> dict[str, str]:
    used, changed, unused = (
        add_endpoint(session, project="default", url="https://hooks.example/", description="", events=None, labels={})
        for _ in range(3)
    )
    delivery = add_test_delivery(session, "default", used.id, now=database_time(session))
    return {
        "FUZZ_WEBHOOK": used.id,
        "FUZZ_CHANGED_WEBHOOK": changed.id,
        "FUZZ_UNUSED_WEBHOOK": unused.id,
        "FUZZ_DELIVERY": delivery.id,
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


def _add_checkpoint(database: Database, store: ArtifactStore, claim: Claim, scratch: Path, kind: CheckpointKind) -> str:
    for name, content in FILES.items():
        (scratch / name).parent.mkdir(parents=True, exist_ok=True)
        (scratch / name).write_bytes(content)
    write_manifest(scratch)
    key = f"jobs/{claim.job_id}/checkpoints/{kind}"
    size = store.publish(scratch, key).size_bytes
    with database.transaction(write=True) as session:
        return add_checkpoint(
            session, claim, kind=kind, step=9, stage=1, store_key=key, size_bytes=size,
            manifest_sha256=sha256_of(scratch / MANIFEST),
        ).id  # fmt: skip
