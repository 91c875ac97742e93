"""Sessions of browsers: they begin with a key, end with it, and no other site can use them."""

from collections.abc import Callable

import pytest
import sqlalchemy as sa

from api.browser_sessions import COOKIE
from api.verified_keys import LIFE_SECONDS
from domain.browser_sessions.models import BrowserSession
from domain.browser_sessions.repository import MAX_SESSIONS, SESSION_SECONDS
from domain.db import db_now
from domain.jobs.models import Job
from domain.jobs.states import JobStatus
from domain.keys.models import ApiKey
from domain.keys.repository import delete_key, revoke_key, rotate_key
from tests.api.dashboard.browsers import HEADERS, Browser
from tests.api.dashboard.conftest import Dashboard
from tests.api.dashboard.test_pages import address, routes
from tests.support.requests import KEY


def test_a_wrong_key_is_not_accepted_and_slows_its_sender_down(dashboard: Dashboard) -> None:
    browser = Browser(dashboard.client)
    for _ in range(10):
        response = browser.log_in("pocl_00000000_" + "0" * 64)
        assert response.status_code == 401
        assert "not accepted" in response.text
    assert dashboard.slowed == []
    browser.log_in("wrong")
    assert dashboard.slowed == [1.0]
    assert browser.cookies == {}


def test_a_cookie_that_is_made_up_slows_its_sender_down(dashboard: Dashboard) -> None:
    browser = dashboard.browser()
    assert browser.get("/").status_code == 200
    for number in range(10):
        headers = {**HEADERS, "cookie": f"{COOKIE}={number:040}"}
        assert dashboard.client.get("/", headers=headers, follow_redirects=False).status_code == 303
    assert dashboard.slowed == []
    dashboard.client.get("/", headers={**HEADERS, "cookie": f"{COOKIE}=x"}, follow_redirects=False)
    assert dashboard.slowed == [1.0]
    # Whoever is known already is not.
    assert browser.get("/").status_code == 200
    assert dashboard.slowed == [1.0]


def test_the_cookie_is_kept_from_scripts_and_other_sites(dashboard: Dashboard) -> None:
    browser = Browser(dashboard.client)
    set_cookie = browser.log_in(f"  {KEY} ").headers["set-cookie"]
    attributes = {each.strip().lower() for each in set_cookie.split(";")[1:]}
    assert {"httponly", "samesite=strict", "path=/", f"max-age={SESSION_SECONDS}"} <= attributes
    assert "secure" not in attributes
    assert KEY not in set_cookie
    assert browser.get("/").status_code == 200


def test_the_cookie_is_secure_behind_tls(dashboard: Dashboard) -> None:
    response = dashboard.client.post(
        "https://127.0.0.1:8000/ui/login", data={"key": KEY}, headers=HEADERS, follow_redirects=False
    )
    assert "secure" in response.headers["set-cookie"].lower()


def test_neither_token_nor_key_can_be_read_from_the_row(dashboard: Dashboard) -> None:
    _, key = dashboard.make_key()
    browser = Browser(dashboard.client)
    browser.log_in(key)
    with dashboard.database.transaction(write=False) as session:
        (row,) = session.scalars(sa.select(BrowserSession)).all()
        digests = set(session.scalars(sa.select(ApiKey.token_sha256)))
    assert browser.cookies[COOKIE] not in (row.token_sha256, row.sealed_key)
    assert row.sealed_key not in digests


@pytest.mark.parametrize("end", ["revoke", "delete", "rotate", "expire"])
def test_a_session_ends_with_its_key(dashboard: Dashboard, end: str) -> None:
    key_id, key = dashboard.make_key()
    browser = Browser(dashboard.client)
    browser.log_in(key)
    assert browser.get("/").status_code == 200
    with dashboard.database.transaction(write=True) as session:
        if end == "revoke":
            revoke_key(session, key_id, project=None)
        elif end == "delete":
            delete_key(session, key_id, project=None)
        elif end == "rotate":
            rotate_key(session, key_id, grace_seconds=0, project=None)
        else:
            session.execute(sa.update(BrowserSession).values(expires_at=db_now(-1)))
    dashboard.now[0] += LIFE_SECONDS + 1
    response = browser.get("/")
    assert (response.status_code, response.headers["location"]) == (303, "/ui/login")


def test_logging_out_ends_the_session_for_whoever_has_its_cookie(dashboard: Dashboard) -> None:
    browser = dashboard.browser()
    stolen = Browser(dashboard.client)
    stolen.cookies = dict(browser.cookies)
    response = browser.submit("/ui/logout")
    assert (response.status_code, browser.cookies) == (303, {})
    assert stolen.get("/").status_code == 303


def test_another_process_knows_the_session(start: Callable[..., Dashboard]) -> None:
    first, second = start(), start()
    browser = first.browser()
    elsewhere = Browser(second.client)
    elsewhere.cookies = browser.cookies
    assert elsewhere.get("/").status_code == 200
    first_token = browser.form_token
    assert elsewhere.form_token == first_token


def test_a_key_has_a_bounded_number_of_sessions(dashboard: Dashboard) -> None:
    _, key = dashboard.make_key()
    oldest = Browser(dashboard.client)
    oldest.log_in(key)
    for _ in range(MAX_SESSIONS):
        Browser(dashboard.client).log_in(key)
    with dashboard.database.transaction(write=False) as session:
        assert session.scalar(sa.select(sa.func.count()).select_from(BrowserSession)) == MAX_SESSIONS
    assert oldest.get("/").status_code == 303


def test_expired_sessions_are_deleted_when_another_begins(dashboard: Dashboard) -> None:
    dashboard.browser()
    with dashboard.database.transaction(write=True) as session:
        session.execute(sa.update(BrowserSession).values(expires_at=db_now(-1)))
    dashboard.browser()
    with dashboard.database.transaction(write=False) as session:
        assert session.scalar(sa.select(sa.func.count()).select_from(BrowserSession)) == 1


def test_the_cookie_opens_no_route_of_the_api(dashboard: Dashboard) -> None:
    browser = dashboard.browser()
    for path in ("/v1/jobs", "/metrics", "/v1/jobs/job_00000000"):
        assert browser.get(path).status_code == 401, path
    assert browser.post("/v1/jobs").status_code == 401


@pytest.mark.parametrize(
    "headers",
    [
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"sec-fetch-site": "none"},
        {"sec-fetch-site": "cross-site", "origin": "http://127.0.0.1:8000"},
    ],
    ids=["cross-site", "same-site", "none", "own-origin"],
)
def test_no_other_site_can_act_with_the_cookie(dashboard: Dashboard, headers: dict[str, str]) -> None:
    browser = dashboard.browser()
    token = browser.form_token
    job = dashboard.ids["job_id"]
    for path in [*(address(each, dashboard.ids) for each in routes("POST")), "/ui/logout", "/ui/login"]:
        response = browser.post(path, {"form_token": token, "key": KEY}, **headers)
        assert response.status_code == 403, path
    with dashboard.database.transaction(write=False) as session:
        assert session.scalar(sa.select(Job.status).where(Job.id == job)) is JobStatus.SUCCEEDED
    assert browser.get("/").status_code == 200


def test_a_browser_without_fetch_metadata_shows_its_origin(dashboard: Dashboard) -> None:
    browser = dashboard.browser()
    fields = {"form_token": browser.form_token}
    cookie = {"cookie": f"{COOKIE}={browser.cookies[COOKIE]}", "accept": "text/html"}
    for origin, status in (
        ("http://127.0.0.1:8000", 303),
        ("http://evil.example", 403),
        ("null", 403),
        (None, 403),
    ):
        headers = {**cookie, **({"origin": origin} if origin else {})}
        response = dashboard.client.post("/ui/logout", data=fields, headers=headers, follow_redirects=False)
        assert response.status_code == status, origin
        if status == 303:
            browser = dashboard.browser()
            fields = {"form_token": browser.form_token}
            cookie["cookie"] = f"{COOKIE}={browser.cookies[COOKIE]}"


def test_an_action_needs_the_token_of_its_own_session(dashboard: Dashboard) -> None:
    browser, other = dashboard.browser(), dashboard.browser()
    for token in ("", "0" * 64, other.form_token, "é"):
        for path in (address(each, dashboard.ids) for each in routes("POST")):
            assert browser.post(path, {"form_token": token}).status_code == 403, (path, token)
    for path in (address(each, dashboard.ids) for each in routes("POST")):
        assert browser.post(path).status_code in (403, 415), path


@pytest.mark.parametrize(
    "address",
    [
        "https://evil.example/",
        "//evil.example/",
        "/\\evil.example",
        "/v1/jobs",
        "javascript:alert(1)",
        "/ui//x",
        "/ui/login",
    ],
)
def test_logging_in_leads_to_a_page_of_the_service_alone(dashboard: Dashboard, address: str) -> None:
    response = Browser(dashboard.client).log_in(KEY, next=address)
    assert response.headers["location"] == "/"


def test_logging_in_leads_back_to_the_page_that_was_asked_for(dashboard: Dashboard) -> None:
    response = Browser(dashboard.client).log_in(KEY, next="/ui/compare?job=job_00000000")
    assert response.headers["location"] == "/ui/compare?job=job_00000000"


def test_what_is_no_cookie_of_a_session_is_no_error(dashboard: Dashboard) -> None:
    for value in ("x", "a" * 5000, '"', f"{COOKIE}=; {COOKIE}=", f"{COOKIE}=\x7f", f"{COOKIE}={'0' * 64}"):
        response = dashboard.client.get("/", headers={**HEADERS, "cookie": value}, follow_redirects=False)
        assert response.status_code == 303, value
