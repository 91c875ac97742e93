"""Engine events applied to the rows."""

from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from api.jobs.schemas import EncodingView, EvaluationView
from domain.checkpoints.models import Checkpoint
from domain.db import Database
from domain.jobs import event_recorder
from domain.jobs.event_recorder import add_artifact, add_checkpoint, apply_events
from domain.jobs.leases import Claim, claim_next, settle
from domain.jobs.models import METRICS, JobArtifact, JobAttempt, JobEvaluation, JobEvent, JobMetric, JobStage
from domain.jobs.states import AttemptOutcome, JobStatus, StageStatus
from pocl import events as engine
from pocl.encoding_counts import EncodingCounts
from tests.support.rows import (
    EPOCH,
    add_job,
    claim_job,
    dump_tables,
    envelopes,
    evaluated,
    reload_job,
    save_checkpoint,
    set_status,
    stage_started,
    step_logged,
)


def apply(database: Database, claim: Claim, *events: engine.Event, offset: int = 1) -> None:
    with database.transaction(write=True) as session:
        apply_events(session, claim, envelopes(*events), offset=offset)


def history(database: Database, claim: Claim) -> list[JobEvent]:
    with database.transaction(write=False) as session:
        statement = sa.select(JobEvent).where(JobEvent.job_id == claim.job_id)
        return list(session.scalars(statement.order_by(JobEvent.seq)))


def stages_of(database: Database, claim: Claim) -> list[JobStage]:
    with database.transaction(write=False) as session:
        statement = sa.select(JobStage).where(JobStage.job_id == claim.job_id)
        return list(session.scalars(statement.order_by(JobStage.index)))


def metrics_of(database: Database, claim: Claim) -> dict[tuple[str, int], float]:
    with database.transaction(write=False) as session:
        rows = session.scalars(sa.select(JobMetric).where(JobMetric.job_id == claim.job_id))
        return {(row.name, row.step): row.value for row in rows}


def test_a_job_is_preparing_until_the_first_training_event(database: Database) -> None:
    claim = claim_job(database)
    started = engine.RunStarted(resumed_from_step=None, total_steps=30, stages=2)
    apply(database, claim, started, engine.PhaseChanged(phase="ranking"), offset=1)
    job = reload_job(database, claim)
    assert (job.status, job.phase, job.total_steps) == (JobStatus.PREPARING, "ranking", 30)
    apply(database, claim, stage_started(0), offset=2)
    assert reload_job(database, claim).status is JobStatus.RUNNING


def test_the_history_has_events_and_transitions_in_order(database: Database) -> None:
    claim = claim_job(database)
    apply(database, claim, engine.PhaseChanged(phase="training"), stage_started(0), step_logged(1), evaluated())
    types = [event.type for event in history(database, claim)]
    assert types == ["status", "phase", "status", "stage_started", "evaluated"]


def test_steps_and_progress_are_not_in_the_history(database: Database) -> None:
    claim = claim_job(database)
    ranked = [engine.Progressed(phase="ranking", done=done, total=9, unit="samples") for done in range(9)]
    apply(database, claim, *ranked, *(step_logged(step) for step in range(1, 21)))
    assert [event.type for event in history(database, claim)] == ["status", "status"]


def test_progress_within_a_phase_is_cleared_with_the_phase(database: Database) -> None:
    claim = claim_job(database)
    apply(database, claim, engine.Progressed(phase="ranking", done=3, total=9, unit="samples"), offset=1)
    job = reload_job(database, claim)
    assert (job.phase, job.phase_done, job.phase_total, job.phase_unit) == ("ranking", 3, 9, "samples")
    apply(database, claim, engine.PhaseChanged(phase="caching_teacher"), offset=2)
    job = reload_job(database, claim)
    assert (job.phase, job.phase_done, job.phase_total) == ("caching_teacher", None, None)


def test_a_step_updates_the_progress(database: Database) -> None:
    claim = claim_job(database)
    apply(database, claim, step_logged(15, eta_seconds=12.5))
    job = reload_job(database, claim)
    assert (job.step, job.total_steps, job.percent, job.stage) == (15, 20, 75.0, 1)
    assert (job.tokens_per_second, job.eta_seconds, job.progress_at) == (1000.0, 12.5, EPOCH)


def test_every_phase_moves_one_progress_that_never_falls(database: Database) -> None:
    work = [
        {"phase": "ranking", "until": 0.2},
        {"phase": "evaluating", "until": 0.3, "subject": "teacher", "samples": "validation"},
        {"phase": "caching_teacher", "until": 0.4},
        {"phase": "evaluating", "until": 0.5, "subject": "initial", "samples": "validation"},
        {"phase": "training", "until": 1.0},
    ]
    with database.transaction(write=True) as session:
        add_job(session, forecast={"work": work})
        claim = claim_next(session, worker="w", lease_seconds=60)
    assert claim is not None
    scores = {"stage": None, "step": 0}
    steps: list[tuple[engine.Event, float]] = [
        (engine.RunStarted(resumed_from_step=None, total_steps=20, stages=2), 0),
        (engine.Progressed(phase="ranking", done=1, total=4), 5),
        (engine.Progressed(phase="ranking", done=4, total=4), 20),
        (engine.Progressed(phase="evaluating", done=1, total=2), 25),
        (evaluated(subject="teacher", **scores), 30),
        (engine.Progressed(phase="caching_teacher", done=1, total=2), 35),
        (engine.Progressed(phase="caching_teacher", done=2, total=2), 40),
        (engine.Progressed(phase="evaluating", done=1, total=2), 45),
        # After it ran out of memory it begins again.
        (engine.Progressed(phase="evaluating", done=0, total=2), 45),
        (evaluated(subject="initial", **scores), 50),
        (step_logged(5), 62.5),
        (engine.Progressed(phase="evaluating", done=1, total=2), 62.5),
        (evaluated(), 62.5),
        # Another attempt starts over.
        (engine.RunStarted(resumed_from_step=None, total_steps=20, stages=2), 62.5),
        (engine.Progressed(phase="ranking", done=1, total=4), 62.5),
        (step_logged(4), 62.5),
        (step_logged(10), 75),
        (step_logged(20), 100),
    ]
    for offset, (event, percent) in enumerate(steps, start=1):
        apply(database, claim, event, offset=offset)
        assert reload_job(database, claim).percent == pytest.approx(percent), event


def test_the_time_that_is_left_is_the_forecast_until_steps_are_timed(database: Database) -> None:
    duration = {"low_seconds": 100.0, "expected_seconds": 200.0, "high_seconds": 400.0}
    work = [{"phase": "ranking", "until": 0.2}, {"phase": "training", "until": 1.0}]
    with database.transaction(write=True) as session:
        add_job(session, forecast={"duration": duration, "work": work})
        claim = claim_next(session, worker="w", lease_seconds=60)
    assert claim is not None
    started = engine.RunStarted(resumed_from_step=None, total_steps=20, stages=2)
    timed = step_logged(1, eta_seconds=60.0, eta_low_seconds=50.0, eta_high_seconds=None)
    steps: list[tuple[int, engine.Event, tuple[float | None, ...]]] = [
        (0, engine.PhaseChanged(phase="loading"), (None, None, None)),
        (1, started, (200, 100, 400)),
        (20, engine.Progressed(phase="ranking", done=1, total=2), (180, 90, 360)),
        # Between reports of work it is the clock that moves.
        (50, engine.PhaseChanged(phase="caching_teacher"), (150, 60, 330)),
        (60, timed, (60, 50, None)),
        (75, engine.Progressed(phase="evaluating", done=1, total=2), (45, 35, None)),
        # A clock that was set back takes nothing away.
        (70, evaluated(), (45, 35, None)),
        (190, engine.PhaseChanged(phase="exporting"), (0, 0, None)),
    ]
    for offset, (second, event, left) in enumerate(steps, start=1):
        with database.transaction(write=True) as session:
            apply_events(session, claim, envelopes(event, first_second=second), offset=offset)
        job = reload_job(database, claim)
        assert (job.eta_seconds, job.eta_low_seconds, job.eta_high_seconds) == pytest.approx(left), event
    with database.transaction(write=True) as session:
        settle(session, claim, AttemptOutcome.released())
        again = claim_next(session, worker="w", lease_seconds=60)
    assert again is not None
    # 20 % for the ranking, and a twentieth of the rest for the step.
    apply(database, again, started, offset=1)
    assert reload_job(database, again).eta_seconds == pytest.approx(0.76 * 200)


def test_every_change_that_a_client_can_see_raises_the_version(database: Database) -> None:
    claim = claim_job(database)
    before = reload_job(database, claim).version
    apply(database, claim, step_logged(1))
    assert reload_job(database, claim).version > before


def test_a_step_records_each_metric(database: Database) -> None:
    claim = claim_job(database)
    apply(database, claim, step_logged(3, divergence=None))
    assert {name for name, step in metrics_of(database, claim) if step == 3} == {*METRICS} - {"divergence"}


def test_a_step_that_is_run_again_replaces_its_metrics(database: Database) -> None:
    claim = claim_job(database)
    apply(database, claim, step_logged(1), step_logged(2), step_logged(2, loss=1.5), offset=1)
    apply(database, claim, step_logged(2, loss=1.25), offset=2)
    metrics = metrics_of(database, claim)
    assert (metrics["loss", 1], metrics["loss", 2]) == (2.0, 1.25)
    assert len(metrics) == 2 * len(METRICS)


def test_a_metric_that_is_not_finite_is_left_out(database: Database) -> None:
    claim = claim_job(database)
    apply(database, claim, step_logged(1, grad_norm=float("inf"), loss=float("nan"), eta_seconds=float("inf")))
    assert not {("grad_norm", 1), ("loss", 1)} & set(metrics_of(database, claim))
    assert reload_job(database, claim).eta_seconds is None


def test_stages_go_from_pending_over_running_to_succeeded(database: Database) -> None:
    claim = claim_job(database)
    apply(database, claim, stage_started(0, samples=33, temperature=1.5), offset=1)
    first, second = stages_of(database, claim)
    assert (first.status, first.samples, first.temperature) == (StageStatus.RUNNING, 33, 1.5)
    assert second.status is StageStatus.PENDING
    apply(database, claim, engine.StageFinished(stage=0, step=9, epochs=3), offset=2)
    first, _ = stages_of(database, claim)
    assert (first.status, first.epochs, first.steps, first.finished_at) == (StageStatus.SUCCEEDED, 3, 9, EPOCH)


def test_a_stage_that_was_not_planned_is_added(database: Database) -> None:
    claim = claim_job(database)
    apply(database, claim, stage_started(2), step_logged(21, stage=2))
    assert [stage.status for stage in stages_of(database, claim)][2] is StageStatus.RUNNING


def test_an_attempt_that_resumes_an_earlier_stage_resets_later_ones(database: Database) -> None:
    claim = claim_job(database)
    done = [engine.StageFinished(stage=stage, step=10 * stage, epochs=1) for stage in (0, 1)]
    apply(database, claim, stage_started(0), done[0], stage_started(1), done[1], evaluated(stage=1), offset=1)
    apply(database, claim, stage_started(0), offset=2)
    first, second = stages_of(database, claim)
    assert (first.status, first.finished_at) == (StageStatus.RUNNING, None)
    assert (second.status, second.finished_at, second.evaluation) == (StageStatus.PENDING, None, None)


@pytest.mark.parametrize(
    ("outcome", "status"),
    [(AttemptOutcome.released(), StageStatus.PENDING), (AttemptOutcome.succeeded(), StageStatus.SUCCEEDED)],
)
def test_no_stage_stays_running_after_its_attempt(
    database: Database, outcome: AttemptOutcome, status: StageStatus
) -> None:
    claim = claim_job(database)
    apply(database, claim, stage_started(0))
    with database.transaction(write=True) as session:
        settle(session, claim, outcome)
    assert stages_of(database, claim)[0].status is status


def test_a_stage_carries_the_scores_of_its_end(database: Database) -> None:
    claim = claim_job(database)
    others = evaluated(subject="epoch", rouge_l=9.0), evaluated(split="test", rouge_l=8.0)
    apply(database, claim, evaluated(rouge_l=21.5), *others)
    evaluation = stages_of(database, claim)[0].evaluation
    assert evaluation is not None
    assert evaluation["rouge_l"] == 21.5


def test_an_evaluation_that_is_made_again_replaces_the_first(database: Database) -> None:
    claim = claim_job(database)
    initial: dict[str, Any] = {"subject": "initial", "stage": None, "step": 0}
    apply(database, claim, evaluated(**initial), evaluated(**initial, rouge_l=5.0), evaluated())
    with database.transaction(write=False) as session:
        rows = session.scalars(sa.select(JobEvaluation).order_by(JobEvaluation.step)).all()
    assert [(row.subject, row.rouge_l) for row in rows] == [("initial", 5.0), ("stage", 20.0)]


def test_scores_of_sampled_responses_are_stored_beside_the_greedy_ones(database: Database) -> None:
    spread = engine.SeedStats(values=(1.0, 3.0), mean=2.0, sd=2**0.5)
    sampled = engine.SampledScores(temperature=1.0, top_p=0.9, seeds=(10, 20), rouge_l=spread, exact_match=spread)
    claim = claim_job(database)
    apply(database, claim, evaluated(subject="final", sampled=sampled), evaluated())
    with database.transaction(write=False) as session:
        rows = session.scalars(sa.select(JobEvaluation).order_by(JobEvaluation.subject)).all()
    assert [EvaluationView.model_validate(row).sampled for row in rows] == [sampled, None]


def test_unfinished_thoughts_are_counted_beside_the_scores(database: Database) -> None:
    claim = claim_job(database)
    apply(database, claim, evaluated(subject="final", unfinished_thoughts=3), evaluated())
    with database.transaction(write=False) as session:
        rows = session.scalars(sa.select(JobEvaluation).order_by(JobEvaluation.subject)).all()
    assert [EvaluationView.model_validate(row).unfinished_thoughts for row in rows] == [3, 0]


def test_counts_of_a_data_set_are_stored_and_those_of_a_later_attempt_replace_them(database: Database) -> None:
    claim = claim_job(database)
    apply(database, claim, data_encoded("train", 8), data_encoded("validation", 2))
    apply(database, claim, data_encoded("train", 9), offset=2)
    views = [EncodingView.model_validate(each) for each in reload_job(database, claim).encodings]
    assert {view.part: view.counts for view in views} == {"train": counts(9), "validation": counts(2)}


def counts(rows: int) -> EncodingCounts:
    return EncodingCounts(rows=rows, tokens=40 * rows, left_out={"tools": 1}, lengths={32: rows - 1, 64: 1})


def data_encoded(part: str, rows: int) -> engine.DataEncoded:
    return engine.DataEncoded(part=part, template="chat", counts=counts(rows))


def test_events_that_were_applied_already_change_nothing(database: Database) -> None:
    claim = claim_job(database)
    apply(database, claim, engine.Warned(code="not_exact", message="another torch"), offset=50)
    before = dump_tables(database)
    apply(database, claim, engine.Warned(code="not_exact", message="another torch"), offset=50)
    assert dump_tables(database) == before


def test_the_events_offset_of_a_new_attempt_is_zero(database: Database) -> None:
    claim = claim_job(database)
    apply(database, claim, step_logged(5), offset=5000)
    with database.transaction(write=True) as session:
        settle(session, claim, AttemptOutcome.released())
        again = claim_next(session, worker="worker-2", lease_seconds=60)
    assert again is not None
    apply(database, again, engine.RunStarted(resumed_from_step=4, total_steps=20, stages=2), offset=10)
    job = reload_job(database, again)
    # What is repeated was done before: progress does not fall.
    assert (job.step, job.percent, job.events_offset) == (4, 25.0, 10)
    with database.transaction(write=False) as session:
        assert session.get_one(JobAttempt, (claim.job_id, 2)).resumed_from_step == 4


def test_events_of_a_cancelling_job_are_applied_without_a_transition(database: Database) -> None:
    claim = claim_job(database)
    with database.transaction(write=True) as session:
        set_status(session, claim.job_id, JobStatus.CANCELLING)
    apply(database, claim, stage_started(0), step_logged(1))
    job = reload_job(database, claim)
    assert (job.status, job.step) == (JobStatus.CANCELLING, 1)


def test_nul_is_removed_from_messages_and_long_ones_are_cut(database: Database) -> None:
    claim = claim_job(database)
    apply(database, claim, engine.Warned(code="odd", message="a\0b" + "x" * 10_000))
    message = history(database, claim)[-1].data["message"]
    assert message.startswith("abx")
    assert len(message) == 2000


def test_the_end_of_a_run_is_in_the_history(database: Database) -> None:
    claim = claim_job(database)
    ended = engine.RunEnded(code="x", message="y", fault="user", retryable=False, hint="z", step=7)
    apply(database, claim, ended)
    assert history(database, claim)[-1].data["code"] == "x"
    assert reload_job(database, claim).step == 7


any_event = st.one_of(
    st.integers(1, 20).map(step_logged),
    st.integers(0, 1).map(stage_started),
    st.integers(0, 1).map(lambda stage: engine.StageFinished(stage=stage, step=10, epochs=1)),
    st.sampled_from(["loading", "training"]).map(lambda phase: engine.PhaseChanged(phase=phase)),
    st.integers(0, 1).map(lambda stage: evaluated(stage=stage, step=10 * stage)),
    st.builds(data_encoded, st.sampled_from(["train", "validation"]), st.integers(1, 3)),
)


@given(st.lists(any_event, max_size=12), st.integers(0, 12))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_rows_do_not_depend_on_how_events_are_batched(database: Database, events: list[engine.Event], cut: int) -> None:
    whole, parts = claim_job(database), claim_job(database)
    line = envelopes(*events)
    with database.transaction(write=True) as session:
        apply_events(session, whole, line, offset=99)
    for part, offset in ((line[:cut], 50), (line[cut:], 99)):
        with database.transaction(write=True) as session:
            apply_events(session, parts, part, offset=offset)
    assert outcome_of(database, whole) == outcome_of(database, parts)


def outcome_of(database: Database, claim: Claim) -> object:
    job = reload_job(database, claim)
    return (
        (job.status, job.step, job.phase, job.stage, job.progress_at, job.event_seq),
        [(stage.status, stage.started_at, stage.finished_at) for stage in stages_of(database, claim)],
        metrics_of(database, claim),
        [(event.seq, event.type) for event in history(database, claim)],
        job.encodings,
    )


def publish(database: Database, claim: Claim, **fields: Any) -> Checkpoint:
    known = {"kind": "training", "step": 10, "stage": 0, "size_bytes": 5, "manifest_sha256": "0" * 64}
    with database.transaction(write=True) as session:
        return add_checkpoint(session, claim, **{**known, **fields})


def test_a_checkpoint_added_twice_has_one_row_and_one_event(database: Database) -> None:
    claim = claim_job(database)
    first, again = (publish(database, claim, store_key="jobs/a") for _ in range(2))
    assert first.id == again.id
    (event,) = [event for event in history(database, claim) if event.type == "checkpoint"]
    assert event.data == {"id": first.id, "kind": "training", "step": 10, "stage": 0, "size_bytes": 5}


def test_a_claim_lists_training_states_newest_first(database: Database) -> None:
    claim = claim_job(database)
    for kind, step in (("training", 10), ("best", 19), ("stage", 20), ("training", 15), ("final", 30)):
        publish(database, claim, kind=kind, step=step, store_key=f"jobs/{kind}-{step}")
    with database.transaction(write=True) as session:
        settle(session, claim, AttemptOutcome.released())
        again = claim_next(session, worker="worker-2", lease_seconds=60)
    assert again is not None
    assert [(state.kind, state.step) for state in again.checkpoints] == [
        ("stage", 20),
        ("training", 15),
        ("training", 10),
    ]
    assert again.checkpoint == again.checkpoints[0]


def test_an_artifact_takes_the_place_of_an_earlier_one_of_its_kind(database: Database) -> None:
    claim = claim_job(database)
    for key in ("jobs/1", "jobs/1", "jobs/2"):
        with database.transaction(write=True) as session:
            add_artifact(session, claim, kind="report", store_key=key, size_bytes=9, sha256="0" * 64)
    with database.transaction(write=False) as session:
        assert session.get_one(JobArtifact, (claim.job_id, "report")).store_key == "jobs/2"
    assert [event.type for event in history(database, claim)].count("artifact") == 2


def test_a_warning_that_comes_again_and_again_is_one_event_and_a_count(database: Database) -> None:
    claim = claim_job(database)
    repeated = [engine.Warned(code="slow", message="The disk is slow.")] * 2000
    others = [engine.Warned(code="odd", message=f"Row {number} is odd.") for number in range(500)]
    for offset, batch in enumerate((repeated, others, repeated), start=1):
        apply(database, claim, *batch, offset=offset)
    texts = [event.data["message"] for event in history(database, claim) if event.type == "warning"]
    assert texts == ["The disk is slow.", *(f"Row {number} is odd." for number in range(99))]
    warnings = reload_job(database, claim).warnings
    assert (warnings[0]["count"], warnings[1]["count"], len(warnings)) == (4000, 1, 101)
    assert (warnings[-1]["code"], warnings[-1]["count"]) == ("further_warnings", 401)


def test_an_engines_events_are_bounded_and_the_job_says_how_many_it_lacks(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_recorder, "MAX_EVENTS", 10)
    claim = claim_job(database)
    apply(database, claim, *(engine.PhaseChanged(phase="loading") for _ in range(20)), offset=1)
    save_checkpoint(database, claim, "training", 1)
    with database.transaction(write=True) as session:
        settle(session, claim, AttemptOutcome.succeeded())
    events = history(database, claim)
    job = reload_job(database, claim)
    # Transitions are recorded whatever the engine has done.
    assert (len(events), events[-1].type, events[-1].data["to"]) == (11, "status", "succeeded")
    assert [event.seq for event in events] == list(range(job.event_seq - 10, job.event_seq + 1))
    assert job.events_dropped == 20 + 1 - (10 - 1)
    assert job.furthest_step == 1
