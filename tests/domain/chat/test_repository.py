"""Rows of chat requests: bounds, leases and deadlines, on both databases."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import sqlalchemy as sa

from domain.chat.models import ChatRequest, ChatStatus
from domain.chat.repository import (
    ChatClaim,
    ChatFailure,
    ChatLimits,
    ChatQueueFull,
    ChatSnapshot,
    TooManyChats,
    add_request,
    cancel,
    claim_next,
    count_waiting,
    delete_ended,
    expire,
    renew,
    settle,
    snapshots,
)
from domain.db import Database, db_now
from domain.errors import LostLease
from domain.jobs.project_deletion import delete_project
from domain.jobs.usage import list_usage
from domain.projects.repository import create_project
from domain.workers.models import Device
from domain.workers.repository import drain, record_scheduler, register_worker
from pocl.chat.protocol import AnswerFinished, ChatMessage, ChatQuestion
from pocl.spec import ModelRef

QUESTION = ChatQuestion(
    id="",
    model=ModelRef(path="tiny"),
    messages=(ChatMessage(role="user", content="Why?"),),
    max_new_tokens=8,
    temperature=0,
    top_p=1,
    seed=0,
)
LIMITS = ChatLimits(in_all=10, per_project=3, wait_seconds=60)
ANSWER = AnswerFinished(
    id="", text="Because.", finish_reason="stop", prompt_tokens=9, completion_tokens=3, warnings=("Careful.",)
)


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    database = Database(database_url)
    yield database
    database.close()


def ask(database: Database, project: str = "default", **limits: Any) -> str:
    with database.transaction(write=True) as session:
        return add_request(session, project, QUESTION, replace(LIMITS, **limits)).id


def claim(database: Database, *, seconds: float = 60) -> ChatClaim | None:
    with database.transaction(write=True) as session:
        return claim_next(session, worker="worker-1", lease_seconds=seconds)


def claimed(database: Database, **options: Any) -> ChatClaim:
    found = claim(database, **options)
    assert found is not None
    return found


def seen(database: Database, chat_id: str) -> ChatSnapshot:
    with database.transaction(write=False) as session:
        return snapshots(session, [chat_id])[chat_id]


def set_past(database: Database, chat_id: str, column: str) -> None:
    with database.transaction(write=True) as session:
        session.execute(sa.update(ChatRequest).where(ChatRequest.id == chat_id).values({column: db_now(-1)}))


def expired(database: Database) -> list[str]:
    with database.transaction(write=True) as session:
        return expire(session, worker_seconds=60)


def test_request_is_claimed_once_and_answered(database: Database) -> None:
    first, second = ask(database), ask(database)
    held = claimed(database)
    assert (held.id, held.question) == (first, QUESTION.model_copy(update={"id": first}))
    with database.transaction(write=True) as session:
        assert renew(session, held, text="Be", tokens=1, lease_seconds=60) is False
    assert (seen(database, first).text, seen(database, first).ended) == ("Be", False)
    with database.transaction(write=True) as session:
        settle(session, held, ANSWER)
    answered = seen(database, first)
    assert (answered.status, answered.text, answered.tokens, answered.prompt_tokens, answered.finish_reason) == (
        *(ChatStatus.SUCCEEDED, "Because.", 3, 9, "stop"),
    )
    assert answered.warnings == ("Careful.",)
    assert claimed(database).id == second
    assert claim(database) is None


def test_end_is_final(database: Database) -> None:
    ask(database)
    held = claimed(database)
    with database.transaction(write=True) as session:
        settle(session, held, ChatFailure("engine_failure", "It failed.", "system"))
    for write in (
        lambda session: settle(session, held, ANSWER),
        lambda session: renew(session, held, text="late", tokens=1, lease_seconds=60),
    ):
        with pytest.raises(LostLease), database.transaction(write=True) as session:
            write(session)
    assert seen(database, held.id).failure == ChatFailure("engine_failure", "It failed.", "system")
    assert seen(database, held.id).text == ""


def test_project_and_service_have_bounds(database: Database) -> None:
    with database.transaction(write=True) as session:
        create_project(session, "other")
    for _ in range(LIMITS.per_project):
        ask(database)
    with pytest.raises(TooManyChats):
        ask(database)
    with pytest.raises(ChatQueueFull):
        ask(database, "other", in_all=LIMITS.per_project)
    held = claimed(database)
    with database.transaction(write=True) as session:
        settle(session, held, None)
    ask(database)


def test_waiting_request_is_cancelled_at_once_and_a_running_one_by_its_worker(database: Database) -> None:
    running, waiting = ask(database), ask(database)
    held = claimed(database)
    for chat_id in (running, waiting):
        with database.transaction(write=True) as session:
            cancel(session, chat_id)
    assert seen(database, waiting).status is ChatStatus.CANCELLED
    assert seen(database, running).status is ChatStatus.RUNNING
    assert claim(database) is None
    with database.transaction(write=True) as session:
        assert renew(session, held, text="", tokens=0, lease_seconds=60) is True
        settle(session, held, None)
    assert seen(database, running).status is ChatStatus.CANCELLED


def test_request_that_no_worker_takes_fails_with_the_reason(database: Database) -> None:
    first, second = ask(database), ask(database)
    set_past(database, first, "waits_until")
    assert seen(database, first).overdue
    assert not seen(database, second).overdue
    with database.transaction(write=False) as session:
        assert count_waiting(session, limit=10) == 1
    assert claimed(database).id == second
    assert expired(database) == [first]
    failure = seen(database, first).failure
    assert failure is not None
    assert (failure.code, failure.fault) == ("no_worker_free", "capacity")
    assert "none is running" in failure.message


def test_reason_tells_busy_workers_from_drained_ones(database: Database) -> None:
    with database.transaction(write=True) as session:
        register_worker(session, "worker-1", [Device("cpu", "cpu", None)])
        record_scheduler(session, "scheduler-1", reaches_broker=True)

    def reason() -> str:
        chat_id = ask(database)
        set_past(database, chat_id, "waits_until")
        expired(database)
        failure = seen(database, chat_id).failure
        assert failure is not None
        return failure.message

    assert "work on jobs" in reason()
    with database.transaction(write=True) as session:
        drain(session, "worker-1", "finish")
    assert "drained" in reason()


def test_request_whose_worker_is_lost_fails(database: Database) -> None:
    chat_id = ask(database)
    held = claimed(database, seconds=-1)
    assert seen(database, chat_id).overdue
    assert expired(database) == [chat_id]
    failure = seen(database, chat_id).failure
    assert failure is not None
    assert (failure.code, failure.fault) == ("worker_lost", "system")
    with pytest.raises(LostLease), database.transaction(write=True) as session:
        settle(session, held, ANSWER)


def test_conversations_are_deleted_some_time_after_their_end_and_live_ones_never(database: Database) -> None:
    ended, live = ask(database), ask(database)
    held = claimed(database)
    with database.transaction(write=True) as session:
        settle(session, held, ANSWER)
    with database.transaction(write=True) as session:
        assert delete_ended(session, older_than_seconds=60) == 0
        assert delete_ended(session, older_than_seconds=-1) == 1
    with database.transaction(write=False) as session:
        assert set(snapshots(session, [ended, live])) == {live}


def test_conversations_go_with_their_project(database: Database) -> None:
    with database.transaction(write=True) as session:
        create_project(session, "other")
    chat_id = ask(database, "other")
    with database.transaction(write=True) as session:
        delete_project(session, "other")
    with database.transaction(write=False) as session:
        assert snapshots(session, [chat_id]) == {}


def test_tokens_count_as_used_also_where_the_answer_was_cancelled(database: Database) -> None:
    outcomes: tuple[AnswerFinished | None, ...] = (ANSWER, None)
    for outcome in outcomes:
        ask(database)
        held = claimed(database)
        with database.transaction(write=True) as session:
            renew(session, held, text="Be", tokens=2, lease_seconds=60)
            settle(session, held, outcome)
    with database.transaction(write=False) as session:
        today = session.scalars(sa.select(db_now())).one().date()
        (day,) = list_usage(session, "default", since=today, until=today)
    assert (day.chat_requests, day.chat_prompt_tokens, day.chat_completion_tokens) == (2, 9, 5)
