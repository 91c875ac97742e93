"""The state machine of a job."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain.jobs.states import (
    ALLOWED_ACTIONS,
    CANCELLED,
    HELD,
    RELEASED,
    SUCCEEDED,
    TERMINAL,
    TRANSITIONS,
    WORKER_LOST,
    AttemptEnd,
    AttemptOutcome,
    EndReason,
    JobStatus,
    StopRequest,
    explain_illegal_transition,
    terminal_status_of,
    transitions_after_attempt,
)

statuses = st.sampled_from(list(JobStatus))


def test_table_is_total() -> None:
    assert set(TRANSITIONS) == set(JobStatus)


def test_terminal_states_are_the_three_ends_and_have_no_way_out() -> None:
    assert {JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED} == TERMINAL
    assert not any(TRANSITIONS[status] for status in TERMINAL)


def test_every_state_is_reachable_from_the_queue() -> None:
    reached, frontier = {JobStatus.QUEUED}, {JobStatus.QUEUED}
    while frontier:
        frontier = {target for status in frontier for target in TRANSITIONS[status]} - reached
        reached |= frontier
    assert reached == set(JobStatus)


@given(statuses.filter(lambda status: status not in TERMINAL))
def test_from_every_live_state_a_job_can_still_end(status: JobStatus) -> None:
    reached, frontier = {status}, {status}
    while frontier:
        frontier = {target for each in frontier for target in TRANSITIONS[each]} - reached
        reached |= frontier
    assert JobStatus.CANCELLED in reached


@given(statuses)
def test_the_actions_of_a_state_are_those_that_its_transitions_have(status: JobStatus) -> None:
    targets, actions = TRANSITIONS[status] | {status}, ALLOWED_ACTIONS[status]
    assert ("cancel" in actions) == (status not in TERMINAL)
    assert ("pause" in actions) == (JobStatus.PAUSING in targets)
    assert ("resume" in actions) == (status is JobStatus.PAUSED)
    assert ("delete" in actions) == ("retry" in actions) == (status in TERMINAL)


def test_no_transition_leads_into_the_same_state() -> None:
    assert not any(status in targets for status, targets in TRANSITIONS.items())


def test_cancelling_ends_as_cancelled_and_never_as_succeeded() -> None:
    assert TRANSITIONS[JobStatus.CANCELLING] == {JobStatus.CANCELLED}


@given(statuses, statuses)
def test_the_explanation_of_an_illegal_transition_names_the_legal_ones(current: JobStatus, target: JobStatus) -> None:
    explanation = explain_illegal_transition(current, target)
    assert (explanation is None) == (target in TRANSITIONS[current])
    if explanation is not None:
        assert current in explanation
        assert all(allowed in explanation for allowed in TRANSITIONS[current])


OUTCOMES = st.builds(
    AttemptOutcome,
    st.sampled_from(list(AttemptEnd)),
    st.builds(EndReason, st.just("code"), st.just("m"), st.sampled_from(["user", "capacity", "system"]), st.booleans()),
    st.booleans(),
)


@given(st.sampled_from(sorted(HELD)), OUTCOMES, st.integers(0, 5))
def test_transitions_after_an_attempt_are_a_legal_path_out_of_the_held_states(
    current: JobStatus, outcome: AttemptOutcome, attempts_left: int
) -> None:
    path = transitions_after_attempt(current, outcome, attempts_left=attempts_left)
    for before, after in zip((current, *path), path, strict=False):
        assert after in TRANSITIONS[before]
    assert path[-1] not in HELD
    assert path[-1] is not JobStatus.RECOVERING


@given(st.sampled_from(sorted(HELD)), OUTCOMES.filter(lambda outcome: outcome.may_pass))
def test_without_attempts_left_a_failure_ends_the_job(current: JobStatus, outcome: AttemptOutcome) -> None:
    assert transitions_after_attempt(current, outcome, attempts_left=0)[-1] in TERMINAL


@given(OUTCOMES, st.integers(1, 5))
def test_a_running_job_is_tried_again_where_its_failure_may_pass_and_is_not_the_users(
    outcome: AttemptOutcome, left: int
) -> None:
    path = transitions_after_attempt(JobStatus.RUNNING, outcome, attempts_left=left)
    died = outcome.end in (AttemptEnd.CRASHED, AttemptEnd.LOST)
    typed = outcome.end is AttemptEnd.FAILED and outcome.reason.retryable and outcome.reason.fault != "user"
    assert (path == (JobStatus.RECOVERING, JobStatus.QUEUED)) == (died or typed)


@given(OUTCOMES, st.integers(0, 5))
def test_a_job_that_is_being_cancelled_ends_as_cancelled_whatever_happens(outcome: AttemptOutcome, left: int) -> None:
    assert transitions_after_attempt(JobStatus.CANCELLING, outcome, attempts_left=left) == (JobStatus.CANCELLED,)


@given(st.sampled_from(list(StopRequest)))
def test_every_stop_request_leads_a_running_job_out_of_the_held_states(request: StopRequest) -> None:
    path = transitions_after_attempt(JobStatus.RUNNING, request.outcome, attempts_left=1)
    assert path[-1] not in HELD


def test_a_lost_worker_sends_the_job_through_recovering_back_to_the_queue() -> None:
    lost = AttemptOutcome(AttemptEnd.LOST, WORKER_LOST)
    path = transitions_after_attempt(JobStatus.RUNNING, lost, attempts_left=1)
    assert path == (JobStatus.RECOVERING, JobStatus.QUEUED)


@pytest.mark.parametrize(
    ("reason", "status"),
    [
        (SUCCEEDED, JobStatus.SUCCEEDED),
        (CANCELLED, JobStatus.CANCELLED),
        (WORKER_LOST, JobStatus.FAILED),
        (EndReason("out_of_memory", "It does not fit.", "capacity"), JobStatus.FAILED),
    ],
)
def test_the_status_follows_from_the_reason(reason: EndReason, status: JobStatus) -> None:
    assert terminal_status_of(reason) is status


@pytest.mark.parametrize("reason", [SUCCEEDED, CANCELLED, RELEASED, WORKER_LOST])
def test_a_reason_survives_its_json(reason: EndReason) -> None:
    assert EndReason.from_json(reason.as_json()) == reason


def test_nul_is_removed_from_a_reason() -> None:
    assert EndReason("crashed", "killed\0 by signal 9").as_json()["message"] == "killed by signal 9"
