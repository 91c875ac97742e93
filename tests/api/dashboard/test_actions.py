"""What people do on the pages: submit, upload, act on jobs, make keys and webhooks."""

import json
import re
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st
from starlette.datastructures import ImmutableMultiDict

from api.dashboard.comparison import specification_differences
from api.dashboard.schema_fields import ESSENTIALS, form_fields, form_sections, read_document, write_values
from api.jobs.requests import JobCreate
from domain.checkpoints.models import Checkpoint
from domain.ids import new_id
from domain.jobs.models import Job, JobStage
from domain.jobs.states import JobStatus, StageStatus
from domain.keys.models import ApiKey
from domain.webhooks.models import WebhookDelivery, WebhookEndpoint
from pocl.spec import describe_preset
from tests.api.dashboard.browsers import Browser, Page
from tests.api.dashboard.conftest import OWNER, Dashboard
from tests.support.requests import jsonl, specification

TINY = {
    "/spec/preset": "quick",
    "/spec/teacher/random/layers": "2",
    "/spec/teacher/random/hidden_size": "16",
    "/spec/teacher/random/heads": "2",
    "/spec/student/random/layers": "1",
    "/spec/student/random/hidden_size": "16",
    "/spec/student/random/heads": "2",
}


def upload(browser: Browser, rows: int = 8, **fields: str) -> Any:
    headers = {**{"x-form-token": browser.form_token}, "hx-request": "true"}
    cookie = "; ".join(f"{name}={value}" for name, value in browser.cookies.items())
    return browser._client.post(
        "/ui/datasets",
        files={"file": ("rows.jsonl", jsonl(rows))},
        data=fields,
        headers={**headers, "cookie": cookie, "accept": "text/html", "sec-fetch-site": "same-origin"},
    )


def the_id(response: Any) -> str:
    return str((response.headers.get("hx-redirect") or response.headers["location"]).rpartition("/")[2])


def row(dashboard: Dashboard, job_id: str) -> Job:
    with dashboard.database.transaction(write=False) as session:
        return session.scalars(sa.select(Job).where(Job.id == job_id)).one()


def set_status(dashboard: Dashboard, job_id: str, status: JobStatus) -> None:
    with dashboard.database.transaction(write=True) as session:
        session.execute(sa.update(Job).where(Job.id == job_id).values(status=status))


def test_a_file_is_uploaded_and_a_job_submitted_with_it(dashboard: Dashboard) -> None:
    browser = dashboard.browser()
    uploaded = upload(browser, name="hello")
    assert uploaded.status_code == 204, uploaded.text
    dataset = the_id(uploaded)
    assert "hello" in browser.get(f"/ui/datasets/{dataset}").text
    assert f'value="{dataset}" selected' in browser.get(f"/ui/jobs/new?dataset={dataset}").text
    fields = {**TINY, "/name": "first", "/spec/data/train/dataset": dataset, "/spec/method/name": "js"}
    plan = browser.submit("/ui/jobs/validate", fields)
    assert "Plan" in plan.text
    assert "wrong" not in plan.text
    submitted = browser.submit("/ui/jobs/new", fields)
    assert submitted.status_code == 303, submitted.text
    job = row(dashboard, the_id(submitted))
    assert (job.project, job.name, job.spec["method"]["name"]) == (OWNER, "first", "js")
    page = browser.get(f"/ui/jobs/new?like={job.id}")
    for pointer, value in fields.items():
        assert value in page.text, pointer


def test_what_is_wrong_stands_at_its_field(dashboard: Dashboard) -> None:
    browser = dashboard.browser()
    fields = {
        **TINY,
        "/spec/data/train/dataset": dashboard.ids["dataset_id"],
        "/spec/training/batch_size": "many",
        "/labels": "{",
        "/spec/curriculum/stages": "0",
    }
    for path, status in (("/ui/jobs/validate", 200), ("/ui/jobs/new", 422)):
        response = browser.submit(path, fields)
        assert response.status_code == status
        assert "/labels" in response.text
    del fields["/labels"]
    response = browser.submit("/ui/jobs/new", fields)
    page = Page(response.text)
    wrong = {each.attributes.get("name") for each in page.elements if each.attributes.get("aria-invalid")}
    assert wrong == {"/spec/training/batch_size", "/spec/curriculum/stages"}
    # What was filled in is kept.
    assert page.find("input", name="/spec/training/batch_size")[0].attributes["value"] == "many"


def test_an_empty_form_is_told_what_is_needed_and_not_that_it_is_wrong(dashboard: Dashboard) -> None:
    browser = dashboard.browser()
    empty = browser.submit("/ui/jobs/validate", {"/spec/preset": "quick"}).text
    assert 'class="note"' in empty
    assert [each.text.strip() for each in Page(empty).find("a")] == ["student", "data, train"]
    assert 'class="alert"' in browser.submit("/ui/jobs/validate", {"/spec/preset": "quickest"}).text


def test_a_field_that_the_form_lacks_is_refused(dashboard: Dashboard) -> None:
    response = dashboard.browser().submit("/ui/jobs/new", {**TINY, "/spec/nothing": "1"})
    assert response.status_code == 422
    assert "/spec/nothing" in response.text


def test_the_form_has_a_field_for_all_that_a_job_can_say() -> None:
    """Every value of every preset stands in a field, so that nothing can be asked for by the API alone."""
    fields = form_fields()
    for preset in ("paper", "pocl_official", "quick"):
        document = {"spec": describe_preset(preset).spec}
        values = write_values(document)
        assert set(values) <= set(fields)
        read, errors = read_document(ImmutableMultiDict(list(values.items())))
        assert errors == []

        def without_nulls(value: Any) -> Any:
            if isinstance(value, dict):
                kept = {name: without_nulls(each) for name, each in value.items() if each is not None}
                # A list without items is what a field that is left empty says.
                return {name: each for name, each in kept.items() if each not in ({}, [])}
            return list(value) if isinstance(value, tuple) else value

        assert without_nulls(read) == without_nulls(document)
    in_sections = [each.pointer for section in form_sections() for each in section.fields]
    assert sorted([*in_sections, *ESSENTIALS]) == sorted(fields)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "name": st.text("aé", min_size=1, max_size=20),
            "priority": st.integers(0, 100),
            "labels": st.dictionaries(st.text("abc", min_size=1, max_size=5), st.text("abc ", max_size=5), max_size=3),
            "limits": st.fixed_dictionaries({"max_attempts": st.integers(1, 3)}),
        },
    ),
    st.fixed_dictionaries(
        {},
        optional={
            "batch_size": st.integers(1, 64),
            "learning_rate": st.floats(1e-6, 1, allow_nan=False),
            "adam_betas": st.tuples(st.floats(0, 0.9), st.floats(0, 0.9)).map(list),
        },
    ),
)
def test_a_request_survives_the_form(options: dict[str, Any], training: dict[str, Any]) -> None:
    document = {**options, "spec": {**specification("ds_" + "0" * 10), "training": training}}
    read, errors = read_document(ImmutableMultiDict(list(write_values(document).items())))
    assert errors == []
    assert JobCreate.model_validate(read).options == JobCreate.model_validate(document).options
    read_spec = read["spec"]
    assert isinstance(read_spec, dict)
    assert read_spec == {name: value for name, value in document["spec"].items() if value != {}}


def test_actions_do_what_the_state_allows(dashboard: Dashboard) -> None:
    browser, job = dashboard.browser(), dashboard.ids["job_id"]
    for status, action, fields, after in (
        (JobStatus.RUNNING, "pause", {"at": "stage_end"}, JobStatus.PAUSING),
        (JobStatus.PAUSED, "resume", {}, JobStatus.QUEUED),
        (JobStatus.QUEUED, "cancel", {}, JobStatus.CANCELLED),
    ):
        set_status(dashboard, job, status)
        assert f"/ui/jobs/{job}/{action}" in browser.get(f"/ui/jobs/{job}").text
        response = browser.submit(f"/ui/jobs/{job}/{action}", fields)
        assert (response.status_code, response.headers["location"]) == (303, f"/ui/jobs/{job}")
        assert row(dashboard, job).status is after
    set_status(dashboard, job, JobStatus.SUCCEEDED)
    refused = browser.submit(f"/ui/jobs/{job}/pause")
    assert refused.status_code == 409
    assert "<h1>Not possible now</h1>" in refused.text
    wrong = browser.submit(f"/ui/jobs/{job}/pause", {"at": "tea time"})
    assert wrong.status_code == 422


def test_a_retry_is_a_new_job(dashboard: Dashboard) -> None:
    browser = dashboard.browser()
    dataset = the_id(upload(browser))
    submitted = browser.submit("/ui/jobs/new", {**TINY, "/spec/data/train/dataset": dataset, "/name": "parent"})
    job = the_id(submitted)
    set_status(dashboard, job, JobStatus.CANCELLED)
    retried = browser.submit(f"/ui/jobs/{job}/retry", {"start": "start"})
    assert retried.status_code == 303, retried.text
    retry = row(dashboard, the_id(retried))
    assert (retry.retry_of, retry.name) == (job, "parent")


def test_a_branch_begins_at_the_end_of_a_stage_of_which_the_job_has_the_state(dashboard: Dashboard) -> None:
    browser = dashboard.browser()
    fields = {
        **TINY,
        "/name": "parent",
        "/labels": '{"team": "nlp"}',
        "/priority": "7",
        "/spec/data/train/dataset": the_id(upload(browser)),
    }
    parent = the_id(browser.submit("/ui/jobs/new", fields))
    early = browser.submit(f"/ui/jobs/{parent}/branch", {"stage": "0"})
    assert early.status_code == 404
    assert "it has none yet" in early.text
    finish_first_stage(dashboard, parent)
    assert options_of_branch(browser, parent) == {"0": "stage 1"}

    changes = {"method": "js", "curriculum": {"temperature": {"end": 3}}}
    branched = browser.submit(f"/ui/jobs/{parent}/branch", {"stage": "0", "name": "", "changes": json.dumps(changes)})
    assert branched.status_code == 303, branched.text
    branch = row(dashboard, the_id(branched))
    assert (branch.branch_of, branch.step, branch.status) == (parent, 2, JobStatus.QUEUED)
    assert (branch.spec["method"]["name"], branch.spec["curriculum"]["temperature"]["end"]) == ("js", 3)
    assert (branch.name, branch.labels, branch.priority) == ("parent", {"team": "nlp"}, 7)
    assert f'branch of <a href="/ui/jobs/{parent}"' in browser.get(f"/ui/jobs/{branch.id}").text
    # The state of its first stage is the parent's.
    assert options_of_branch(browser, branch.id) == {}
    renamed = browser.submit(f"/ui/jobs/{parent}/branch", {"stage": "0", "name": "hotter"})
    assert row(dashboard, the_id(renamed)).name == "hotter"

    for wrong, pointer in (("{", "/changes"), ("[1]", "/changes"), ('{"seed": 9}', "/changes/seed")):
        refused = browser.submit(f"/ui/jobs/{parent}/branch", {"stage": "0", "changes": wrong})
        assert refused.status_code == 422
        assert f"<code>{pointer}</code>" in refused.text


def finish_first_stage(dashboard: Dashboard, job_id: str) -> None:
    """Leave of a job what a worker leaves of one that failed in its second stage."""
    with dashboard.database.transaction(write=True) as session:
        session.add(
            Checkpoint(
                id=new_id("ckpt"),
                project=OWNER,
                job_id=job_id,
                attempt=1,
                kind="stage",
                stage=0,
                step=2,
                store_key=f"jobs/{job_id}/attempt-1/stage-00000002",
                size_bytes=1,
                manifest_sha256="0" * 64,
            )
        )
        first = sa.update(JobStage).where(JobStage.job_id == job_id, JobStage.index == 0)
        session.execute(first.values(status=StageStatus.SUCCEEDED))
    set_status(dashboard, job_id, JobStatus.FAILED)


def options_of_branch(browser: Browser, job_id: str) -> dict[str, str]:
    """The stages, by the values of the form, from whose end the page of a job offers to branch off."""
    form = browser.get(f"/ui/jobs/{job_id}").text.partition('id="branch-stage"')[2].partition("</select>")[0]
    return {str(each.attributes["value"]): each.text.strip() for each in Page(form).find("option")}


def test_a_key_is_made_and_shown_once(dashboard: Dashboard) -> None:
    browser = dashboard.browser(scope="admin")
    made = browser.submit("/ui/settings/keys", {"name": "nightly", "scope": "submit", "expires_on": "2100-01-01"})
    (key,) = set(re.findall(r"pocl_[0-9a-z]+_[0-9a-f]{64}", made.text))
    assert Browser(dashboard.client).log_in(key).status_code == 303
    settings = browser.get("/ui/settings").text
    assert "nightly" in settings
    assert key not in settings
    with dashboard.database.transaction(write=False) as session:
        row = session.scalars(sa.select(ApiKey).where(ApiKey.name == "nightly")).one()
    assert (row.project, row.scopes, f"{row.expires_at:%F}") == (OWNER, ["submit"], "2100-01-01")
    rotated = browser.submit(f"/ui/settings/keys/{row.id}/rotate")
    assert re.search(r"pocl_[0-9a-z]+_[0-9a-f]{64}", rotated.text)
    assert browser.submit(f"/ui/settings/keys/{row.id}/revoke").status_code == 303
    assert "revoked" in browser.get("/ui/settings").text
    for fields in ({"name": "", "scope": "read"}, {"name": "x"}, {"name": "x", "scope": "read", "expires_on": "soon"}):
        assert browser.submit("/ui/settings/keys", fields).status_code == 422


def test_a_webhook_is_made_tested_and_deleted(dashboard: Dashboard) -> None:
    browser = dashboard.browser()
    made = browser.submit("/ui/settings/webhooks", {"url": "https://hooks.example.com/x", "event": "job.failed"})
    assert "whsec_" in made.text
    with dashboard.database.transaction(write=False) as session:
        statement = sa.select(WebhookEndpoint).where(WebhookEndpoint.url == "https://hooks.example.com/x")
        hook = session.scalars(statement).one()
    assert (hook.project, hook.events) == (OWNER, ["job.failed"])
    path = f"/ui/settings/webhooks/{hook.id}"
    assert browser.submit(f"{path}/test").status_code == 303
    assert "webhook.test" in browser.get(path).text
    assert browser.submit(f"{path}/status", {"status": "disabled"}).status_code == 303
    assert "disabled" in browser.get(path).text
    assert browser.submit(f"{path}/delete").status_code == 303
    with dashboard.database.transaction(write=False) as session:
        left = session.scalars(sa.select(WebhookDelivery).where(WebhookDelivery.endpoint_id == hook.id)).all()
    assert left == []
    assert browser.submit("/ui/settings/webhooks", {"url": "http://127.0.0.1/x"}).status_code == 422


def test_a_data_set_that_no_job_needs_is_deleted(dashboard: Dashboard) -> None:
    browser = dashboard.browser()
    dataset = the_id(upload(browser))
    assert browser.submit(f"/ui/datasets/{dataset}/delete").headers["location"] == "/ui/datasets"
    assert browser.get(f"/ui/datasets/{dataset}").status_code == 404


@pytest.mark.system
def test_a_preview_marks_what_is_trained_on(dashboard: Dashboard) -> None:
    browser = dashboard.browser(scope="read")
    dataset = the_id(upload(dashboard.browser()))
    response = browser.get(f"/ui/datasets/{dataset}/preview?model=random&offset=6")
    assert response.status_code == 200, response.text
    page = Page(response.text)
    assert len(page.find("article")) == 2
    assert len(page.find("mark")) == 2
    fragment = browser.poll(f"/ui/datasets/{dataset}/preview?model=random&offset=6").text
    assert "<html" not in fragment
    assert fragment.count("<mark>") == 2


def test_rows_that_are_no_samples_are_named(dashboard: Dashboard) -> None:
    browser = dashboard.browser()
    headers = {"x-form-token": browser.form_token, "hx-request": "true", "sec-fetch-site": "same-origin"}
    cookie = "; ".join(f"{name}={value}" for name, value in browser.cookies.items())
    response = dashboard.client.post(
        "/ui/datasets", files={"file": ("x.jsonl", b'{"a": 1}\n')}, headers={**headers, "cookie": cookie}
    )
    assert response.status_code == 422
    assert "/lines/1" in response.text
    assert "<html" not in response.text


@pytest.mark.parametrize("count", [1, 6, 7])
def test_up_to_six_jobs_are_compared(dashboard: Dashboard, count: int) -> None:
    browser = dashboard.browser()
    dataset = the_id(upload(browser))
    jobs = [
        the_id(
            browser.submit(
                "/ui/jobs/new",
                {**TINY, "/name": f"job {n}", "/spec/data/train/dataset": dataset, "/spec/seed": str(n)},
            )
        )
        for n in range(count)
    ]
    query = "&".join(f"job={job}" for job in jobs)
    response = browser.get(f"/ui/compare?{query}")
    assert response.status_code == (422 if count > 6 else 200)
    if count == 6:
        assert "/seed" in response.text
        assert "/preset" not in response.text
        curves = browser.get(f"/ui/compare/curves?{query}", accept="application/json").json()
        assert set(curves) == {"bands", "loss", "rouge_l"}


@given(st.lists(st.dictionaries(st.sampled_from("abc"), st.integers(0, 2)), min_size=1, max_size=6))
def test_only_what_differs_is_listed(specs: list[dict[str, int]]) -> None:
    listed = dict(specification_differences([{"spec": spec} if spec else {} for spec in specs]))
    for name in "abc":
        values = [spec.get(name) for spec in specs]
        assert (f"/spec/{name}" in listed) == (len(set(values)) > 1)
        assert listed.get(f"/spec/{name}", values) == values


def test_what_charts_draw_is_json(dashboard: Dashboard) -> None:
    curves = dashboard.browser().get(f"/ui/jobs/{dashboard.ids['job_id']}/curves", accept="application/json")
    assert {"bands", "loss", "rouge_l", "cross_entropy"} == set(json.loads(curves.text))
