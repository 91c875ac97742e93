"""A worker answers conversations with a real child process, which has no model."""

import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from domain.chat.models import ChatRequest, ChatStatus
from domain.chat.repository import ChatSnapshot, cancel, snapshots
from domain.chat.submission import ask_model
from domain.ids import new_id
from domain.jobs.states import JobStatus
from domain.projects.repository import create_project
from domain.workers.models import Device
from domain.workers.repository import drain, register_worker
from pocl.chat.protocol import ChatMessage, ChatQuestion
from pocl.spec import ModelRef
from tests.support.harness import ServiceHarness, processes_mentioning
from tests.support.waiting import eventually

pytestmark = pytest.mark.system

FAKE = Path(__file__).parents[1] / "fake_chat_engine.py"


def ask(harness: ServiceHarness, text: str, project: str = "default") -> str:
    model = harness.settings.model_roots[0] / "tiny"
    model.mkdir(parents=True, exist_ok=True)
    question = ChatQuestion(
        id="",
        model=ModelRef(path="."),
        messages=(ChatMessage(role="user", content=text),),
        max_new_tokens=8,
        temperature=0,
        top_p=1,
        seed=0,
    )
    with harness.database.transaction(write=True) as session:
        return ask_model(session, harness.settings, project, "tiny", question).id


def seen(harness: ServiceHarness, chat_id: str) -> ChatSnapshot:
    with harness.database.transaction(write=False) as session:
        return snapshots(session, [chat_id])[chat_id]


def work(harness: ServiceHarness, *, idle: float = 0, **options: Any) -> JobStatus | None:
    command = [sys.executable, str(FAKE), str(harness.home)]
    devices = [Device("cpu", "cpu", None)]
    return harness.supervisor(chat_engine=command, chat_idle_seconds=idle, devices=devices, **options).work_one()


@contextmanager
def beside(action: Any) -> Iterator[None]:
    """Run `action` in a thread beside the block, and fail where it fails."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            action()
        except BaseException as error:  # noqa: BLE001 - it is re-raised below
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        thread.join()
    if failures:
        raise failures[0]


def test_conversations_that_wait_are_answered_by_one_process_in_their_order(harness: ServiceHarness) -> None:
    first, second, third = ask(harness, "pid"), ask(harness, "What is it ?"), ask(harness, "pid")
    assert work(harness) is None
    assert seen(harness, second).text == "What is it ? "
    assert (seen(harness, second).tokens, seen(harness, second).prompt_tokens) == (4, 5)
    told = [json.loads(seen(harness, each).text) for each in (first, third)]
    assert told[0]["pid"] == told[1]["pid"]
    # It is gone, and has left nothing.
    assert not processes_mentioning(str(FAKE))
    assert list(harness.settings.work_root.iterdir()) == []
    # It knows neither the database nor a key.
    assert not [name for name in told[0]["environment"] if name.startswith("POCL_")]


def test_model_is_named_by_its_path_on_the_worker(harness: ServiceHarness) -> None:
    chat_id = ask(harness, "model")
    work(harness)
    expected = (harness.settings.model_roots[0] / "tiny").resolve()
    assert json.loads(seen(harness, chat_id).text)["path"] == str(expected)


def test_conversation_comes_before_the_next_job_and_the_job_is_run(harness: ServiceHarness) -> None:
    job, chat_id = harness.submit(), ask(harness, "Hello there")
    assert work(harness, idle=60) is JobStatus.SUCCEEDED
    assert seen(harness, chat_id).text == "Hello there "
    assert harness.job(job).status is JobStatus.SUCCEEDED
    assert not processes_mentioning(str(FAKE))


@pytest.mark.parametrize(("text", "said"), [("die", ""), ("crash", "Well")])
def test_process_that_dies_is_a_typed_error_and_the_next_conversation_gets_another(
    harness: ServiceHarness, text: str, said: str
) -> None:
    lost, answered = ask(harness, text), ask(harness, "Hello")
    work(harness)
    failure = seen(harness, lost).failure
    assert failure is not None
    assert (failure.code, failure.fault) == ("engine_failure", "system")
    assert said.startswith(seen(harness, lost).text)
    assert seen(harness, answered).text == "Hello "


def test_refusal_of_the_engine_keeps_its_code(harness: ServiceHarness) -> None:
    chat_id = ask(harness, "fail")
    work(harness)
    failure = seen(harness, chat_id).failure
    assert failure is not None
    assert (failure.code, failure.fault) == ("model_unsupported", "user")


def test_cancelled_conversation_ends_while_it_is_answered(harness: ServiceHarness) -> None:
    chat_id, after = ask(harness, "hold"), ask(harness, "Hello")

    def hang_up() -> None:
        eventually(lambda: seen(harness, chat_id).text == "Well", what="the first word")
        with harness.database.transaction(write=True) as session:
            cancel(session, chat_id)

    with beside(hang_up):
        work(harness)
    assert (seen(harness, chat_id).status, seen(harness, chat_id).text) == (ChatStatus.CANCELLED, "Well")
    assert seen(harness, after).text == "Hello "


def test_answer_that_takes_too_long_is_ended(harness: ServiceHarness) -> None:
    chat_id = ask(harness, "hold")
    ticks = iter(range(10_000))
    # Each look at this clock takes a minute.
    command = [sys.executable, str(FAKE), str(harness.home)]
    supervisor = harness.supervisor(chat_engine=command, chat_idle_seconds=0, devices=[Device("cpu", "cpu", None)])
    replace(supervisor, clock=lambda: 60.0 * next(ticks)).work_one()
    failure = seen(harness, chat_id).failure
    assert failure is not None
    assert (failure.code, failure.fault) == ("answer_timed_out", "capacity")


def test_worker_that_shuts_down_says_so(harness: ServiceHarness) -> None:
    chat_id = ask(harness, "hold")
    work(harness, should_stop=lambda: seen(harness, chat_id).text == "Well")
    failure = seen(harness, chat_id).failure
    assert failure is not None
    assert failure.code == "worker_lost"


def test_drained_worker_answers_nobody(harness: ServiceHarness) -> None:
    with harness.database.transaction(write=True) as session:
        register_worker(session, "tester", [Device("cpu", "cpu", None)])
        drain(session, "tester", "finish")
    chat_id = ask(harness, "Hello")
    work(harness)
    assert seen(harness, chat_id).status is ChatStatus.QUEUED


def test_answer_whose_project_is_deleted_is_dropped(harness: ServiceHarness) -> None:
    with harness.database.transaction(write=True) as session:
        create_project(session, "other")
    chat_id, after = ask(harness, "hold", "other"), ask(harness, "Hello")

    def delete() -> None:
        eventually(lambda: seen(harness, chat_id).text == "Well", what="the first word")
        with harness.database.transaction(write=True) as session:
            session.execute(sa.delete(ChatRequest).where(ChatRequest.id == chat_id))

    with beside(delete):
        work(harness)
    assert seen(harness, after).text == "Hello "


def test_checkpoint_that_was_deleted_meanwhile_is_refused(harness: ServiceHarness) -> None:
    chat_id = ask(harness, "Hello")
    with harness.database.transaction(write=True) as session:
        row = session.get_one(ChatRequest, chat_id)
        row.question = {**row.question, "model": {"checkpoint": new_id("ckpt")}}
    work(harness)
    failure = seen(harness, chat_id).failure
    assert failure is not None
    assert (failure.code, failure.fault) == ("checkpoint_not_found", "user")


def test_second_conversation_finds_the_model_loaded(harness: ServiceHarness) -> None:
    first = ask(harness, "pid")
    asked: list[str] = []

    def ask_again() -> None:
        eventually(lambda: seen(harness, first).ended, what="the first answer")
        asked.append(ask(harness, "pid"))
        eventually(lambda: seen(harness, asked[0]).ended, what="the second answer")

    with beside(ask_again):
        work(harness, idle=600, should_stop=lambda: bool(asked) and seen(harness, asked[0]).ended)
    pids = [json.loads(seen(harness, each).text)["pid"] for each in (first, *asked)]
    assert pids[0] == pids[1] != os.getpid()
