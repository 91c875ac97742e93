"""A job with all that a job can have made, for a fuzzer that would guess no id of it."""

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

ARTIFACTS = {"ranking.jsonl": b'{"rank": 1}\n', "result.json": b"{}", "report.html": b"<h1>"}
FILES = {"model.safetensors": bytes(1000), "config.json": b"{}", "folder/käse-1.txt": b"cheese"}


def insert_seed_data(settings: Settings, made: Path) -> Mapping[str, str]:
    """Ids of a data set, a job that runs, one that ended, and a checkpoint, as the fuzzer's environment has them."""
    database, store = Database(settings.database_url), ArtifactStore(settings.artifact_root)
    made.mkdir()
    (made / "rows").write_bytes(jsonl(8))
    rows = store.publish_file(made / "rows", "datasets/rows.jsonl")
    with database.transaction(write=True) as session:
        dataset = add_dataset(
            session, project="default", name="rows", rows=8, size_bytes=rows.size, sha256=rows.sha256,
            store_key="datasets/rows.jsonl",
        ).id  # fmt: skip
    ended = submit_job(database, settings, specification(dataset), project="default")
    with database.transaction(write=True) as session:
        actions.cancel_job(session, "default", ended.id)
    submit_job(database, settings, specification(dataset), project="default")
    with database.transaction(write=True) as session:
        held = claim_next(session, worker="w1", lease_seconds=3600)
        assert held is not None
        save_log_tail(session, held, "Stage 1 has begun.\n", max_bytes=100)
    _add_artifacts(database, store, held, made)
    checkpoint = _add_checkpoint(database, store, held, made / "checkpoint")
    database.close()
    return {
        "FUZZ_DATASET": dataset,
        "FUZZ_JOB": held.job_id,
        "FUZZ_ENDED": ended.id,
        "FUZZ_CHECKPOINT": checkpoint,
    }


def _add_artifacts(database: Database, store: ArtifactStore, held: Claim, made: Path) -> None:
    for name, content in ARTIFACTS.items():
        (made / name).write_bytes(content)
        key = f"jobs/{held.job_id}/{name}"
        file = store.publish_file(made / name, key)
        with database.transaction(write=True) as session:
            add_artifact(
                session, held, kind=name.partition(".")[0], store_key=key, size_bytes=file.size, sha256=file.sha256
            )


def _add_checkpoint(database: Database, store: ArtifactStore, held: Claim, made: Path) -> str:
    for name, content in FILES.items():
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_bytes(content)
    write_manifest(made)
    key = f"jobs/{held.job_id}/checkpoints/final"
    size = store.publish(made, key).size_bytes
    with database.transaction(write=True) as session:
        return add_checkpoint(
            session, held, kind="final", step=9, stage=1, store_key=key, size_bytes=size,
            manifest_sha256=sha256_of(made / MANIFEST),
        ).id  # fmt: skip
