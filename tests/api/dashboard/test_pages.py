"""Every page of the dashboard for every role, and what holds for all of them."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from fastapi.routing import APIRoute
from typer.testing import CliRunner

import pocl.report as report_package
from api.dashboard.routes import ROUTERS
from api.dashboard.static_files import MEDIA_TYPES, STATIC, static_path
from domain.browser_sessions.models import BrowserSession
from domain.datasets.models import Dataset
from domain.jobs.models import Job
from domain.jobs.states import JobStatus
from domain.publications.models import Publication
from domain.webhooks.models import WebhookEndpoint
from pocl_client.cli.app import app as command_line
from tests.api.dashboard.browsers import Browser, Page
from tests.api.dashboard.conftest import OWNER, STRANGER, Dashboard
from tests.support.requests import KEY, LOOPBACK

HOSTILE = "\"'><script>alert(1)</script><img src=x onerror=alert(2)>"
QUERIES = {
    "/ui/jobs/{job_id}/log": "?attempt=0&offset=0",
    # A model that there is would be read by a process.
    "/ui/datasets/{dataset_id}/preview": "?model=nowhere",
}
"""What pages need besides their path."""
OPEN = {"/ui/login", "/ui/logout", "/ui/static/{digest}/{name}"}
ANSWERS = {
    "/ui/jobs/{job_id}/report": {404},
    "/ui/datasets/{dataset_id}/preview": {422},
}
"""How pages are answered of which the owner has nothing."""
NOT_PAGES = {"/ui/jobs/{job_id}/curves", "/ui/compare/curves", "/ui/jobs/{job_id}/report"}
"""What scripts read, and files."""


def routes(method: str) -> list[str]:
    found = [each for router in ROUTERS for each in router.routes if isinstance(each, APIRoute)]
    return sorted({each.path for each in found if method in (each.methods or ())} - OPEN)


def pages() -> list[str]:
    return [path for path in routes("GET") if path not in NOT_PAGES]


def address(path: str, ids: dict[str, str]) -> str:
    """The address of a page about the objects of the owner."""
    return path.format(**ids) + QUERIES.get(path, "")


def test_there_are_pages_and_actions() -> None:
    assert len(pages()) >= 14
    assert len(routes("POST")) >= 15


def test_every_page_is_shown_to_its_project_alone(dashboard: Dashboard) -> None:
    owner, reader, stranger, nobody = (
        dashboard.browser(OWNER, "submit"),
        dashboard.browser(OWNER, "read"),
        dashboard.browser(STRANGER, "submit"),
        Browser(dashboard.client),
    )
    faults = []
    for path in routes("GET"):
        at = address(path, dashboard.ids)
        expected = {
            "owner": ANSWERS.get(path, {200}),
            "reader": {403} if path == "/ui/jobs/new" else ANSWERS.get(path, {200}),
            "stranger": {404} if "{" in path else {200},
            "nobody": {303},
        }
        seen = {"owner": owner, "reader": reader, "stranger": stranger, "nobody": nobody}
        for name, browser in seen.items():
            response = browser.get(at)
            if response.status_code not in expected[name]:
                faults.append((at, name, response.status_code))
            if name == "stranger" and "{" not in path:
                faults += [
                    (at, name, value)
                    for key, value in dashboard.ids.items()
                    if key != "project_id" and value in response.text
                ]
    assert faults == []


def test_a_reader_is_offered_no_action(dashboard: Dashboard) -> None:
    reader = dashboard.browser(OWNER, "read")
    for path in pages():
        forms = Page(reader.get(address(path, dashboard.ids)).text).find("form")
        actions = {each.attributes.get("action") for each in forms if each.attributes.get("method") == "post"}
        assert actions <= {"/ui/logout"}, path


def test_every_action_needs_the_scope_of_the_api(dashboard: Dashboard) -> None:
    reader = dashboard.browser(OWNER, "read")
    for path in routes("POST"):
        assert reader.submit(address(path, dashboard.ids)).status_code == 403, path
    submitter = dashboard.browser(OWNER, "submit")
    for path in routes("POST"):
        if path.startswith("/ui/settings/keys"):
            assert submitter.submit(address(path, dashboard.ids), {"name": "x", "scope": "read"}).status_code == 403


def test_every_action_on_what_another_project_has_finds_nothing(dashboard: Dashboard) -> None:
    stranger = dashboard.browser(STRANGER, "admin")
    fields = {"stage": "0", "status": "disabled"}
    for path in routes("POST"):
        if "{" not in path:
            continue
        allowed = {"branch": ["stage"], "status": ["status"]}.get(path.rpartition("/")[2], [])
        response = stranger.submit(address(path, dashboard.ids), {name: fields[name] for name in allowed})
        assert response.status_code == 404, (path, response.text)


def test_every_page_keeps_its_policy(dashboard: Dashboard) -> None:
    browser = dashboard.browser(OWNER, "admin")
    answered = [browser.get(address(path, dashboard.ids)) for path in pages()]
    answered += [Browser(dashboard.client).get("/ui/login"), browser.get("/ui/nothing"), browser.get("/ui/jobs/x")]
    for response in answered:
        if response.status_code == 204:
            continue
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert response.headers["cache-control"] == "no-store"
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["content-type"] == "text/html; charset=utf-8", response.url
        for element in Page(response.text).elements:
            assert "style" not in element.attributes, (response.url, element)
            assert not [name for name in element.attributes if name.startswith("on")], (response.url, element)
            assert element.tag != "style"
            assert element.tag != "script" or element.attributes.get("src")
        assert [each for each in Page(response.text).addresses if not each.startswith("/")] == []


def test_the_page_of_a_job_says_what_comes_of_its_push(dashboard: Dashboard) -> None:
    job_id = dashboard.ids["job_id"]
    url = "https://hub.example/acme/student"
    with dashboard.database.transaction(write=True) as session:
        job = session.get_one(Job, job_id)
        job.status = JobStatus.SUCCEEDED
        job.spec = {**job.spec, "export": {"hub": {"repo": "acme/student"}}}
        columns = {"repo": "acme/student", "branch": "main", "private": True, "expires_at": job.created_at}
        session.add(Publication(job_id=job_id, **columns))
    browser = dashboard.browser(OWNER, "submit")
    shown = browser.get(f"/ui/jobs/{job_id}/publication").text
    assert "It is pushed to acme/student on the Hub soon." in shown
    assert "poll from:body" in shown
    changes: tuple[tuple[dict[str, Any], str], ...] = (
        ({"state": "published", "url": url, "commit": "c" * 40, "published_at": job.created_at}, f'href="{url}"'),
        ({"state": "failed", "error": {"code": "hub_refused", "message": HOSTILE}}, "/publication/retry"),
    )
    for values, text in changes:
        with dashboard.database.transaction(write=True) as session:
            session.execute(sa.update(Publication).values(**values))
        for path in (f"/ui/jobs/{job_id}", f"/ui/jobs/{job_id}/publication"):
            shown = browser.get(path).text
            assert text in shown
            assert "<script>alert" not in shown
            assert "poll from:body" not in shown.partition('id="job-publication"')[2].partition("</div>")[0]

    assert Page(shown).find("form", action=f"/ui/jobs/{job_id}/publication/retry")
    reader = dashboard.browser(OWNER, "read")
    assert not Page(reader.get(f"/ui/jobs/{job_id}/publication").text).find("form")
    refused = browser.submit(f"/ui/jobs/{job_id}/publication/retry")
    assert (refused.status_code, "checkpoint" in refused.text) == (409, True)
    with dashboard.database.transaction(write=True) as session:
        session.execute(sa.update(Publication).values(checkpoint_id=dashboard.ids["checkpoint_id"]))
    assert browser.submit(f"/ui/jobs/{job_id}/publication/retry").status_code == 303
    assert "poll from:body" in browser.get(f"/ui/jobs/{job_id}/publication").text


def test_commands_that_pages_offer_are_understood(dashboard: Dashboard, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is copied as it stands, so that neither an argument nor the address may be missing."""
    monkeypatch.setattr("pocl_client.retries.RetryPolicy.wait_after", lambda *_: None)
    browser = dashboard.browser(OWNER, "submit")
    paths = (f"/ui/jobs/{dashboard.ids['job_id']}", "/ui/datasets")
    commands = [
        str(each.attributes["data-copy"])
        for path in paths
        for each in Page(browser.get(path).text).find("button")
        if "data-copy" in each.attributes
    ]
    ours = [shlex.split(command)[1:] for command in commands if command.startswith("pocl ")]
    assert len(ours) >= 3
    environment = {"POCL_API_KEY": KEY, "POCL_API_KEY_FILE": ""}
    for arguments in ours:
        assert arguments[:2] == ["--url", LOOPBACK]
        ran = CliRunner().invoke(command_line, ["--url", "http://127.0.0.1:9", *arguments[2:]], env=environment)
        assert "Usage" not in ran.stderr, arguments


def test_what_a_client_wrote_is_shown_as_text(dashboard: Dashboard) -> None:
    with dashboard.database.transaction(write=True) as session:
        hostile_reason = {"code": HOSTILE, "message": HOSTILE, "hint": HOSTILE, "fault": "user", "retryable": False}
        session.execute(
            sa.update(Job).values(
                name=HOSTILE,
                labels={"team": HOSTILE},
                status=JobStatus.FAILED,
                end_reason=hostile_reason,
                plan_warnings=[{"code": HOSTILE, "message": HOSTILE, "pointer": None}],
            )
        )
        session.execute(sa.update(Dataset).values(name=HOSTILE))
        session.execute(sa.update(WebhookEndpoint).values(description=HOSTILE, url=f"https://x/{HOSTILE}"))
    browser = dashboard.browser(OWNER, "admin")
    shown = 0
    for path in pages():
        content = browser.get(address(path, dashboard.ids)).text
        page = Page(content)
        assert [each for each in page.elements if each.tag == "img" or "onerror" in each.attributes] == [], path
        assert [each for each in page.find("script") if not each.attributes.get("src")] == [], path
        shown += "&lt;script&gt;alert(1)" in content
    assert shown >= 5


def test_the_answer_to_a_hostile_query_repeats_nothing(dashboard: Dashboard) -> None:
    browser = dashboard.browser()
    for query in (f"?state={HOSTILE}", f"?label={HOSTILE}", f"?{HOSTILE}=1", f"?after={HOSTILE}"):
        response = browser.get(f"/{query}")
        assert "<script>alert" not in response.text
        assert response.status_code in (200, 422), query


def test_errors_are_pages_for_people_and_problems_for_programs(dashboard: Dashboard) -> None:
    browser = dashboard.browser()
    page = browser.get("/ui/jobs/job_00000000")
    assert (page.status_code, page.headers["content-type"]) == (404, "text/html; charset=utf-8")
    assert "The project has no job of this id." in page.text
    assert page.headers["x-request-id"] in page.text
    program = browser.get("/ui/jobs/job_00000000", accept="application/json")
    assert program.json()["code"] == "job_not_found"
    notice = browser.poll("/ui/jobs/job_00000000")
    assert (notice.status_code, "<html" in notice.text) == (404, False)


def test_a_page_without_its_database_says_so(dashboard: Dashboard) -> None:
    browser = dashboard.browser()
    browser.get("/")
    file = dashboard.settings.home / "pocl.sqlite3"
    dashboard.app.state.database.close()
    file.write_bytes(b"damaged" * 1000)
    response = browser.get("/")
    assert response.status_code == 503
    assert response.headers["content-type"].startswith("text/html")


def test_scripts_weigh_less_than_150_kilobytes() -> None:
    scripts = [name for name, media_type in MEDIA_TYPES.items() if media_type == "text/javascript"]
    assert sum((STATIC / name).stat().st_size for name in scripts) < 150_000


def test_vendored_files_come_with_their_licences() -> None:
    served = set(MEDIA_TYPES)
    assert {each.name for each in STATIC.iterdir()} == served | {"LICENSE.htmx", "LICENSE.uplot"}
    assert "MIT License" in (STATIC / "LICENSE.uplot").read_text()
    assert "Permission to use, copy, modify" in (STATIC / "LICENSE.htmx").read_text()


def test_the_pages_have_the_colours_of_the_report() -> None:
    """Text, muted text and lines are the same, so that the report of a job looks like its page."""
    report = (Path(report_package.__file__).parent / "templates" / "report.html").read_text()
    in_report = set(re.findall(r"color: (#[0-9a-f]{6})|solid (#[0-9a-f]{6})", report))
    light = (STATIC / "dashboard.css").read_text().partition("@media")[0]
    assert {color for pair in in_report for color in pair if color} <= set(re.findall(r"#[0-9a-f]{6}", light))


def test_static_files_are_kept_for_good_under_the_name_of_their_content(dashboard: Dashboard) -> None:
    for name, media_type in MEDIA_TYPES.items():
        response = dashboard.client.get(static_path(name))
        assert response.headers["content-type"].partition(";")[0] == media_type
        assert "immutable" in response.headers["cache-control"]
        assert response.content == (STATIC / name).read_bytes()
    assert dashboard.client.get("/ui/static/000000000000/htmx.min.js").status_code == 404
    assert dashboard.client.get(static_path("htmx.min.js").replace("htmx.min.js", "LICENSE.htmx")).status_code == 404


def test_every_address_has_the_prefix_of_the_proxy(start: Callable[..., Dashboard]) -> None:
    dashboard = start(root_path="/pocl")
    browser = Browser(dashboard.client, "/pocl")
    response = browser.log_in(dashboard.make_key(OWNER, "admin")[1])
    assert response.headers["location"] == "/pocl/"
    assert "Path=/pocl/" in response.headers["set-cookie"]
    for path in pages():
        page = Page(browser.get(address(path, dashboard.ids)).text)
        assert [each for each in page.addresses if not each.startswith("/pocl/")] == [], path
    assert Browser(dashboard.client, "/pocl").get("/").headers["location"] == "/pocl/ui/login"


def test_a_page_is_sent_again_only_where_it_has_changed(dashboard: Dashboard) -> None:
    browser = dashboard.browser()
    job = dashboard.ids["job_id"]
    with dashboard.database.transaction(write=True) as session:
        session.execute(sa.update(Job).where(Job.id == job).values(status=JobStatus.RUNNING))

    def poll_address(content: str) -> str:
        (poller,) = Page(content).find("div", id="poller")
        return str(poller.attributes["hx-get"])

    at = poll_address(browser.get(f"/ui/jobs/{job}").text)
    assert browser.poll(at).status_code == 204
    with dashboard.database.transaction(write=True) as session:
        session.execute(sa.update(Job).where(Job.id == job).values(step=3, percent=30, version=Job.version + 1))
    changed = browser.poll(at)
    parts = [each.attributes["id"] for each in Page(changed.text).elements if "hx-swap-oob" in each.attributes]
    assert parts == ["job-status"]
    assert browser.poll(poll_address(changed.text)).status_code == 204
    with dashboard.database.transaction(write=True) as session:
        session.execute(sa.update(Job).where(Job.id == job).values(status=JobStatus.CANCELLED))
    over = Page(browser.poll(at).text)
    assert "hx-get" not in over.find("div", id="poller")[0].attributes


def test_headings_labels_and_names_are_there_for_everybody(dashboard: Dashboard) -> None:
    browser = dashboard.browser(OWNER, "admin")
    for path in pages():
        response = browser.get(address(path, dashboard.ids))
        page = Page(response.text)
        if response.status_code == 204 or not page.find("html"):
            continue
        assert len(page.find("h1")) == 1 or path.endswith("/events"), path
        named = {each.attributes.get("for") for each in page.find("label")}
        ids = [each.attributes["id"] for each in page.elements if each.attributes.get("id")]
        assert len(ids) == len(set(ids)), path
        for each in page.elements:
            kind = each.attributes.get("type")
            if each.tag in ("input", "select", "textarea") and kind not in ("hidden", "radio", "checkbox"):
                assert each.attributes.get("id") in named or each.attributes.get("aria-label"), (path, each)


def test_the_first_page_asks_a_browser_to_log_in(dashboard: Dashboard) -> None:
    response = Browser(dashboard.client).get("/")
    assert (response.status_code, response.headers["location"]) == (303, "/ui/login")
    deep = Browser(dashboard.client).get("/ui/compare?job=job_00000000")
    assert re.fullmatch(r"/ui/login\?next=/ui/compare%3Fjob%3Djob_00000000", deep.headers["location"])
    assert Browser(dashboard.client).poll("/ui/queue").headers["hx-redirect"] == "/ui/login"
    stored: Any = BrowserSession.__table__
    assert "key" not in stored.columns
