"""The page on which a job's student is tried beside its teacher."""

import re
from pathlib import Path

import pytest
import sqlalchemy as sa

from domain.chat.models import ChatRequest, ChatStatus
from domain.chat.repository import ChatLimits, add_request
from domain.checkpoints.models import Checkpoint
from domain.db import db_now
from domain.jobs.models import Job
from pocl.chat.protocol import ChatQuestion
from tests.api.dashboard.browsers import Page
from tests.api.dashboard.conftest import STRANGER, Dashboard


def ask(dashboard: Dashboard, prompt: str = "Name a fruit.") -> tuple[str, list[str]]:
    """The address of the answers, and the ids of the requests."""
    response = dashboard.browser().submit(f"/ui/jobs/{dashboard.ids['job_id']}/try", {"prompt": prompt})
    assert response.status_code == 303, response.text
    at = response.headers["location"]
    return at, re.findall(r"chat=(chat_\w+)", at)


def change(dashboard: Dashboard, **values: object) -> None:
    with dashboard.database.transaction(write=True) as session:
        session.execute(sa.update(ChatRequest).values(**values))


def test_an_answer_is_shown_as_it_comes(dashboard: Dashboard) -> None:
    at, chats = ask(dashboard, "Name a <b>fruit</b>.")
    assert len(chats) == 1
    browser = dashboard.browser()
    page = browser.get(at)
    assert "waits for a worker" in page.text
    assert "Name a &lt;b&gt;fruit&lt;/b&gt;." in page.text
    (poller,) = Page(page.text).find("div", id="poller")
    poll = str(poller.attributes["hx-get"])
    assert browser.poll(poll).status_code == 204
    change(dashboard, status=ChatStatus.SUCCEEDED, text="<script>banana</script>", tokens=3, ended_at=db_now())
    over = browser.poll(poll)
    assert "&lt;script&gt;banana" in over.text
    assert Page(over.text).find("script") == []
    assert "hx-get" not in Page(over.text).find("div", id="poller")[0].attributes
    assert "The teacher cannot be asked" in over.text


def test_a_teacher_below_the_model_roots_answers_beside_the_student(dashboard: Dashboard) -> None:
    model: Path = dashboard.settings.home / "models" / "tiny"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    with dashboard.database.transaction(write=True) as session:
        spec = session.scalars(sa.select(Job.spec)).one()
        session.execute(sa.update(Job).values(spec={**spec, "teacher": {"path": "tiny"}}))
    at, chats = ask(dashboard)
    assert len(chats) == 2
    page = Page(dashboard.browser().get(at).text)
    assert [each.text.strip() for each in page.find("h2")] == ["distilled student", "teacher"]


def test_nobody_who_answers_is_said(dashboard: Dashboard) -> None:
    at, _ = ask(dashboard)
    change(dashboard, waits_until=db_now(-1))
    page = dashboard.browser().get(at)
    assert "No worker was free in time" in page.text


def test_what_another_project_has_asked_is_not_there(dashboard: Dashboard) -> None:
    _, chats = ask(dashboard)
    with dashboard.database.transaction(write=True) as session:
        question = ChatQuestion.model_validate(session.scalars(sa.select(ChatRequest.question)).one())
        other = add_request(session, STRANGER, question, ChatLimits(9, 9, 60)).id
    at = f"/ui/jobs/{dashboard.ids['job_id']}/try?chat="
    assert dashboard.browser().get(f"{at}{chats[0]}").status_code == 200
    for chat in (other, "chat_00000000"):
        assert dashboard.browser().get(f"{at}{chat}").status_code == 404


def test_without_a_checkpoint_there_is_nothing_to_try(dashboard: Dashboard) -> None:
    with dashboard.database.transaction(write=True) as session:
        session.execute(sa.delete(Checkpoint))
    browser, at = dashboard.browser(), f"/ui/jobs/{dashboard.ids['job_id']}/try"
    assert "no student yet" in browser.get(at).text
    assert browser.submit(at, {"prompt": "x"}).status_code == 404


@pytest.mark.parametrize("prompt", ["", "  ", "x" * 16_385], ids=["empty", "blank", "long"])
def test_a_prompt_has_a_length(dashboard: Dashboard, prompt: str) -> None:
    response = dashboard.browser().submit(f"/ui/jobs/{dashboard.ids['job_id']}/try", {"prompt": prompt})
    assert response.status_code == 422
