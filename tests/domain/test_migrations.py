"""The migrations make the schema that the rows are declared with, and keep the rows that are there."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext

import migrations
from domain.db import Base
from domain.schema import upgrade
from domain.settings import Settings


def test_migrated_schema_is_the_declared_one(engine: sa.Engine, settings: Settings) -> None:
    upgrade(settings)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []


def test_a_column_without_a_migration_is_detected(engine: sa.Engine, settings: Settings) -> None:
    upgrade(settings)
    with engine.begin() as connection:
        connection.execute(sa.text("ALTER TABLE jobs DROP COLUMN percent"))
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        ((operation, _schema, table, column),) = compare_metadata(context, Base.metadata)
    assert (operation, table, column.name) == ("add_column", "jobs", "percent")


def test_checks_of_enumerations_are_migrated_as_declared(engine: sa.Engine, settings: Settings) -> None:
    # Alembic does not compare CHECK constraints.
    upgrade(settings)
    migrated = checks_of(engine)
    with engine.begin() as connection:
        Base.metadata.drop_all(connection)
        Base.metadata.create_all(connection)
    assert migrated == checks_of(engine)
    assert len(migrated) == 6


def checks_of(engine: sa.Engine) -> set[tuple[str, str | None, str]]:
    inspector = sa.inspect(engine)
    return {
        (table, check["name"], check["sqltext"])
        for table in Base.metadata.tables
        for check in inspector.get_check_constraints(table)
    }


def test_upgrade_may_be_repeated_and_run_from_many_threads_at_once(engine: sa.Engine, settings: Settings) -> None:
    with ThreadPoolExecutor(4) as pool:
        for running in [pool.submit(upgrade, settings) for _ in range(8)]:
            running.result()
    assert sa.inspect(engine).has_table("jobs")


@pytest.mark.system
def test_processes_that_start_together_migrate_an_empty_home_once(tmp_path: Path) -> None:
    program = "from domain.schema import upgrade; from domain.settings import Settings; upgrade(Settings())"
    # Started elsewhere: the migrations are found by their package, not by the working directory.
    environment = {**os.environ, "POCL_HOME": str(tmp_path / "fresh 100%")}
    started = [subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, env=environment) for _ in range(3)]
    assert [process.wait() for process in started] == [0, 0, 0]
    assert (tmp_path / "fresh 100%").stat().st_mode & 0o777 == 0o700


def migrate(engine: sa.Engine, revision: str, *, down: bool = False) -> None:
    with engine.begin() as connection:
        config = Config(attributes={"connection": connection})
        config.set_main_option("script_location", str(Path(str(migrations.__file__)).parent))
        (command.downgrade if down else command.upgrade)(config, revision)


def test_downgrade_leaves_nothing_behind(engine: sa.Engine, settings: Settings) -> None:
    upgrade(settings)
    migrate(engine, "base", down=True)
    assert sa.inspect(engine).get_table_names() == ["alembic_version"]


# --- Rows of an older schema ----------------------------------------------------------------------------

TableContents = dict[str, list[dict[str, Any]]]


def rows_of_0004(dialect: str) -> TableContents:
    """A row in every table of revision 0004, with a value in every column."""

    def moment(seconds: int) -> datetime | int:
        at = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=seconds, microseconds=1)
        # SQLite keeps microseconds since 1970.
        return (at - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1) if dialect == "sqlite" else at

    reason = {
        "code": "storage_failed",
        "message": "The artefact is gone.",
        "fault": None,
        "hint": "",
        "retryable": True,
    }
    job = {
        "id": "job_1",
        "project": "default",
        "name": "my artefact",
        "labels": {"of": "artefact"},
        "priority": 7,
        "spec": {"preset": "quick"},
        "resolved": {"preset": "quick", "seed": 1, "teacher": None},
        "device": "cpu",
        "status": "failed",
        "version": 9,
        "event_seq": 3,
        "end_reason": reason,
        "token": 2,
        "attempts_spent": 1,
        "max_attempts": 3,
        "lease_owner": "worker-1",
        "lease_token": 2,
        "lease_expires_at": moment(1),
        "events_offset": 2**40,
        "phase": "training",
        "phase_done": 2**40,
        "phase_total": 2**41,
        "phase_unit": "samples",
        "step": 5,
        "total_steps": 20,
        "stage": 0,
        "stages": 2,
        "percent": 25.0,
        "tokens_seen": 2**40,
        "tokens_per_second": 0.1,
        "eta_seconds": 1.5,
        "eta_low_seconds": 1.25,
        "eta_high_seconds": 2.5,
        "progress_at": moment(2),
        "created_at": moment(3),
        "updated_at": moment(4),
        "started_at": moment(5),
        "finished_at": moment(6),
        "cancel_requested_at": moment(7),
        "pause_at": "stage_end",
        "retry_of": "job_0",
        "branch_of": "job_00",
        "starts_from": "ckpt_0",
        "max_runtime_seconds": 100,
        "runtime_left_seconds": 50.5,
        "runs_until": moment(8),
        "max_wait_seconds": 60,
        "waits_until": moment(9),
        "memory_bytes": 2**40,
    }
    stored = {"store_key": "jobs/job_1/x", "size_bytes": 2**40, "created_at": moment(10)}
    status = {"from": "running", "to": "failed", "attempt": 2, "reason": reason}
    changed = {"name": "my artefact"}
    events = [("artefact", {"kind": "report", "size_bytes": 9}), ("changed", changed), ("status", status)]
    scores = {"rows": 8, "rouge_l": 20.5, "exact_match": 0.5, "cross_entropy": 2.5, "divergence": 0.5}
    return {
        "datasets": [
            {"id": "ds_1", "project": "default", "name": "artefact", "rows": 8, "sha256": "0" * 64}
            | stored
            | {"store_key": "datasets/ds_1.jsonl"}
        ],
        "jobs": [job],
        "checkpoints": [
            {
                "id": "ckpt_1",
                "project": "default",
                "job_id": "job_1",
                "attempt": 2,
                "kind": "stage",
                "stage": 0,
                "step": 5,
            }
            | stored
            | {"manifest_sha256": "1" * 64}
        ],
        "job_events": [
            {"job_id": "job_1", "seq": seq, "at": moment(seq), "type": kind, "data": data}
            for seq, (kind, data) in enumerate(events, start=1)
        ],
        "job_attempts": [
            {"job_id": "job_1", "number": 2, "worker": "worker-1", "started_at": moment(11), "ended_at": moment(12)}
            | {"end": "failed", "end_reason": reason, "resumed_from_step": 4, "log_tail": "an artefact"}
        ],
        "job_stages": [
            {
                "job_id": "job_1",
                "index": 0,
                "samples": 40,
                "temperature": 1.5,
                "kd_weight": 0.7,
                "epochs": 1,
                "steps": 10,
            }
            | {"first_step": 0, "status": "failed", "started_at": moment(13), "finished_at": moment(14)}
            | {"evaluation": {"rouge_l": 20.5}}
        ],
        "job_metrics": [{"job_id": "job_1", "name": "loss", "step": 5, "value": 2.5}],
        "job_evaluations": [
            {"job_id": "job_1", "subject": "stage", "step": 5, "stage": 0, "at": moment(15), "sampled": {"top_p": 0.9}}
            | scores
        ],
        "job_artefacts": [{"job_id": "job_1", "kind": "report", "attempt": 2, "sha256": "2" * 64} | stored],
        "workers": [
            {"name": "w", "devices": [{"kind": "cpu"}], "drain": "finish"}
            | {"started_at": moment(16), "seen_at": moment(17)}
        ],
        "idempotency_keys": [
            {"project": "default", "key": "k", "token": "t", "fingerprint": "3" * 64, "status": 201, "location": "/v1"}
            | {"media_type": "application/json", "body": b"{}", "created_at": moment(18), "expires_at": moment(19)}
        ],
    }


def rows_of_0005(dialect: str) -> TableContents:
    """The same rows under the names of revision 0005."""
    rows = rows_of_0004(dialect)
    (job,), (attempt,), events = rows["jobs"], rows["job_attempts"], rows["job_events"]
    job["posted_spec"] = job.pop("spec")
    job["spec"] = job.pop("resolved")
    reason = {**job["end_reason"], "message": "The artifact is gone."}
    job["end_reason"] = attempt["end_reason"] = events[2]["data"]["reason"] = reason
    events[0]["type"] = "artifact"
    rows["job_artifacts"] = rows.pop("job_artefacts")
    return rows


def reflected(engine: sa.Engine) -> sa.MetaData:
    metadata = sa.MetaData()
    metadata.reflect(engine)
    metadata.remove(metadata.tables["alembic_version"])
    return metadata


def insert_rows(engine: sa.Engine, rows: TableContents) -> None:
    metadata = reflected(engine)
    assert set(rows) == set(metadata.tables)
    with engine.begin() as connection:
        for table in metadata.sorted_tables:
            for row in rows[table.name]:
                assert set(row) == set(table.columns.keys())
                assert None not in row.values()
                connection.execute(sa.insert(table).values(row))


def read_rows(engine: sa.Engine) -> TableContents:
    with engine.connect() as connection:
        return {
            table.name: [
                dict(row) for row in connection.execute(sa.select(table).order_by(*table.primary_key)).mappings()
            ]
            for table in reflected(engine).sorted_tables
        }


def constraints_of(engine: sa.Engine) -> set[str | None]:
    """The names of all keys, foreign keys, checks and indexes."""
    inspector = sa.inspect(engine)
    names: set[str | None] = set()
    for table in inspector.get_table_names():
        names.add(inspector.get_pk_constraint(table)["name"])
        for kind in ("foreign_keys", "unique_constraints", "check_constraints", "indexes"):
            names |= {each["name"] for each in getattr(inspector, f"get_{kind}")(table)}
    return names


def test_rows_of_the_old_schema_stand_under_their_new_names(engine: sa.Engine) -> None:
    migrate(engine, "0004")
    insert_rows(engine, rows_of_0004(engine.dialect.name))
    migrate(engine, "0005")
    assert read_rows(engine) == rows_of_0005(engine.dialect.name)
    with engine.begin() as connection:
        connection.execute(sa.text("DELETE FROM jobs"))
    assert {name for name, rows in read_rows(engine).items() if rows} == {"datasets", "workers", "idempotency_keys"}


def test_job_of_an_older_version_has_no_encodings(engine: sa.Engine, settings: Settings) -> None:
    migrate(engine, "0004")
    insert_rows(engine, rows_of_0004(engine.dialect.name))
    upgrade(settings)
    assert [row["encodings"] for row in read_rows(engine)["jobs"]] == [[]] * len(
        rows_of_0004(engine.dialect.name)["jobs"]
    )


def test_downgrade_gives_rows_their_old_names_back(engine: sa.Engine) -> None:
    migrate(engine, "0004")
    before = constraints_of(engine)
    insert_rows(engine, rows_of_0004(engine.dialect.name))
    migrate(engine, "0005")
    assert not any("artefact" in str(name) for name in constraints_of(engine))
    migrate(engine, "0004", down=True)
    assert read_rows(engine) == rows_of_0004(engine.dialect.name)
    assert constraints_of(engine) == before


def test_evaluations_of_an_older_version_are_on_the_validation_samples(engine: sa.Engine, settings: Settings) -> None:
    migrate(engine, "0004")
    insert_rows(engine, rows_of_0004(engine.dialect.name))
    migrate(engine, "0005")
    before, names = read_rows(engine)["job_evaluations"], constraints_of(engine)
    upgrade(settings)
    (row,) = read_rows(engine)["job_evaluations"]
    assert row == before[0] | {"split": "validation", "unfinished_thoughts": 0}
    table = reflected(engine).tables["job_evaluations"]
    with engine.begin() as connection:
        connection.execute(sa.insert(table).values(row | {"split": "test"}))
    migrate(engine, "0005", down=True)
    assert read_rows(engine)["job_evaluations"] == before
    assert constraints_of(engine) == names


def test_data_sets_from_before_their_reading_was_noted_have_answers(engine: sa.Engine, settings: Settings) -> None:
    migrate(engine, "0004")
    insert_rows(engine, rows_of_0004(engine.dialect.name))
    upgrade(settings)
    (dataset,) = read_rows(engine)["datasets"]
    assert (dataset["prompts"], dataset["ingestion"]) == (0, None)
    migrate(engine, "0006", down=True)
    (before,) = read_rows(engine)["datasets"]
    assert dataset.items() >= (before | {"prompts": 0, "ingestion": None, "status": "ready"}).items()


def test_attempts_that_had_ended_are_in_the_usage(engine: sa.Engine, settings: Settings) -> None:
    migrate(engine, "0004")
    insert_rows(engine, rows_of_0004(engine.dialect.name))
    upgrade(settings)
    (record,) = read_rows(engine)["usage_records"]
    assert record == {
        "job_id": "job_1",
        "attempt": 2,
        "day": date(2026, 1, 1),
        "project": "default",
        "worker": "worker-1",
        "device": "cpu",
        "seconds": 1.0,
    }


def test_retries_of_branches_of_an_older_version_know_where_they_branched_off(
    engine: sa.Engine, settings: Settings
) -> None:
    migrate(engine, "0004")
    insert_rows(engine, rows_of_0004(engine.dialect.name))
    migrate(engine, "0010")
    row = read_rows(engine)["jobs"][0] | {"retry_of": None, "branch_of": None, "starts_from": None}
    lineage = {
        "job_plain": {"retry_of": "job_gone", "starts_from": "ckpt_a"},
        "job_branch": {"branch_of": "job_plain", "starts_from": "ckpt_b"},
        "job_again": {"retry_of": "job_branch", "starts_from": "ckpt_c"},
        "job_thrice": {"retry_of": "job_again"},
        "job_second": {"branch_of": "job_thrice", "starts_from": "ckpt_d"},
    }
    table = reflected(engine).tables["jobs"]
    with engine.begin() as connection:
        for job_id, columns in lineage.items():
            connection.execute(sa.insert(table).values(row | columns | {"id": job_id}))
    upgrade(settings)
    points = {row["id"]: row["branch_point"] for row in read_rows(engine)["jobs"]}
    assert {job_id: points[job_id] for job_id in lineage} == {
        "job_plain": None,
        "job_branch": "ckpt_b",
        "job_again": "ckpt_b",
        "job_thrice": "ckpt_b",
        "job_second": "ckpt_d",
    }


def test_each_migration_follows_the_one_before_it() -> None:
    """Two that were written at the same time would else be two heads, which no command upgrades to."""
    directory = Path(migrations.__file__).parent / "versions"
    numbers = sorted(file.name[:4] for file in directory.glob("[0-9]*.py"))
    assert numbers == [f"{number:04}" for number in range(1, len(numbers) + 1)]
    for file in directory.glob("[0-9]*.py"):
        source = file.read_text(encoding="utf-8")
        before = f'"{int(file.name[:4]) - 1:04}"' if file.name[:4] != "0001" else "None"
        assert f'\nrevision = "{file.name[:4]}"\n' in source, file.name
        assert f"\ndown_revision = {before}\n" in source, file.name
