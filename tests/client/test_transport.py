"""Requests and their retries, against a service that fails as the test wants."""

import sys
from collections.abc import Callable
from typing import Any

import httpx2
import pytest

from pocl_client import (
    ApiError,
    AuthenticationFailed,
    Client,
    ClientError,
    Conflict,
    FieldProblem,
    Forbidden,
    Gone,
    NotFound,
    RateLimited,
    RequestInvalid,
    ResponseInvalid,
    RetryPolicy,
    ServerFault,
    ServiceUnreachable,
    TooLarge,
)
from pocl_client._sync import transport
from pocl_client.models import Job, KeyWithSecret
from tests.client.fakes import KEY, URL, FakeClock, FakeService, answering, connect, job, problem

LOST = (httpx2.ReadError("reset"), httpx2.ReadTimeout("too long"), httpx2.RemoteProtocolError("half a response"))
NOT_SENT = (httpx2.ConnectError("refused"), httpx2.ConnectTimeout("too long"))


@pytest.mark.parametrize(
    "failure", [*LOST, *NOT_SENT, *(problem(status, "later") for status in (408, 429, 502, 503, 504))], ids=str
)
def test_tries_of_a_submission_share_a_key(failure: httpx2.Response | Exception) -> None:
    service = answering(failure, created(), created())
    client = connect(service)
    assert client.jobs.create({}).id == "job_1"
    client.jobs.create({})
    first, again, other = service.headers("idempotency-key")
    assert first
    assert first == again
    assert first != other
    assert service.requests[0].content == service.requests[1].content


def created() -> httpx2.Response:
    return httpx2.Response(201, json=job("queued"))


@pytest.mark.parametrize("proxy", ["socks5h://user:secret@127.0.0.1:1080", "ftp://user:secret@proxy"])
def test_proxies_that_cannot_be_used_are_told_without_their_passwords(
    monkeypatch: pytest.MonkeyPatch, proxy: str
) -> None:
    # Whether it is installed or not.
    monkeypatch.setitem(sys.modules, "socksio", None)
    monkeypatch.setenv("ALL_PROXY", proxy)
    with pytest.raises(ClientError, match="proxies of the environment cannot be used") as raised:
        Client(URL, KEY)
    assert "secret" not in str(raised.value)


def test_an_own_key_is_sent() -> None:
    service = answering(created())
    connect(service).jobs.create({}, idempotency_key="nightly-1")
    assert service.headers("idempotency-key") == ["nightly-1"]


def test_a_first_try_that_is_still_at_work_is_waited_for() -> None:
    clock = FakeClock()
    busy = problem(409, "idempotency_in_progress", headers={"retry-after": "5"})
    assert connect(answering(busy, created()), clock=clock).jobs.create({}).id == "job_1"
    assert clock.slept[0] >= 5


def test_every_action_has_a_key() -> None:
    service = FakeService(lambda _: httpx2.Response(202, json=job()))
    jobs = connect(service).jobs
    for act in (jobs.cancel, jobs.pause, jobs.resume, jobs.retry):
        act("job_1")
    jobs.branch("job_1", stage=1)
    keys = service.headers("idempotency-key")
    assert None not in keys
    assert len(set(keys)) == 5


@pytest.mark.parametrize("failure", LOST, ids=str)
def test_a_new_api_key_is_not_asked_for_twice(failure: Exception) -> None:
    # The service keeps no secret, so that it cannot answer twice with the same one.
    service = answering(failure)
    with pytest.raises(ServiceUnreachable):
        connect(service).request("POST", "/v1/keys", KeyWithSecret, json={})
    assert service.headers("idempotency-key") == [None]


@pytest.mark.parametrize("failure", [*NOT_SENT, problem(429, "rate_limited")], ids=str)
def test_a_request_that_was_not_looked_at_is_always_sent_again(failure: httpx2.Response | Exception) -> None:
    service = answering(failure, problem(403, "forbidden"))
    with pytest.raises(Forbidden):
        connect(service).request("POST", "/v1/keys", KeyWithSecret, json={})
    assert len(service.requests) == 2


def test_a_deletion_whose_response_was_lost_is_done() -> None:
    connect(answering(httpx2.ReadError("reset"), problem(404, "job_not_found"))).jobs.delete("job_1")


def test_a_deletion_of_what_is_not_there_is_an_error() -> None:
    with pytest.raises(NotFound):
        connect(answering(problem(404, "job_not_found"))).jobs.delete("job_1")


def test_retries_end() -> None:
    service = FakeService(lambda _: httpx2.ConnectError("refused"))
    clock = FakeClock()
    with pytest.raises(ServiceUnreachable, match=URL):
        connect(service, clock=clock, retries=RetryPolicy(attempts=4, random=lambda: 1.0)).jobs.get("job_1")
    assert len(service.requests) == 4
    assert clock.slept == [0.5, 1, 2]


def test_what_the_service_asks_to_wait_is_waited() -> None:
    clock = FakeClock()
    service = answering(problem(503, "unavailable", headers={"retry-after": "20"}), httpx2.Response(200, json=job()))
    connect(service, clock=clock).jobs.get("job_1")
    assert 20 <= clock.slept[0] <= 21


def test_too_long_a_wait_is_left_to_the_caller() -> None:
    clock = FakeClock()
    with pytest.raises(RateLimited) as caught:
        connect(answering(problem(429, "rate_limited", headers={"retry-after": "3600"})), clock=clock).jobs.get("job_1")
    assert caught.value.retry_after == 3600
    assert clock.slept == []


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, RequestInvalid), (401, AuthenticationFailed), (403, Forbidden), (404, NotFound), (409, Conflict),
        (410, Gone), (413, TooLarge), (415, RequestInvalid), (418, ApiError), (422, RequestInvalid), (500, ServerFault),
    ],
)  # fmt: skip
def test_a_problem_is_a_typed_exception_and_is_not_retried(status: int, kind: type[ApiError]) -> None:
    errors = [{"pointer": "/spec/seed", "code": "int_type", "detail": "It is no integer."}]
    service = answering(
        problem(status, "wrong", errors=errors, request_id="req_1", hint="Do it otherwise.", allowed=["cancel"])
    )
    with pytest.raises(ApiError) as caught:
        connect(service).jobs.create({})
    error = caught.value
    assert type(error) is kind
    assert (error.status, error.code, error.hint, error.request_id) == (status, "wrong", "Do it otherwise.", "req_1")
    assert error.errors == (FieldProblem("/spec/seed", "int_type", "It is no integer."),)
    assert error.allowed == ("cancel",)
    assert str(error) == "wrong: This is wrong. Do it otherwise.\n  /spec/seed: It is no integer."


@pytest.mark.parametrize("body", [b"<html>Bad Gateway</html>", b"", b"[1]", b"\xff", b'{"errors": [7, {}]}'])
def test_a_proxy_may_answer_with_anything(body: bytes) -> None:
    client = connect(FakeService(lambda _: httpx2.Response(500, content=body, headers={"x-request-id": "r1"})))
    with pytest.raises(ServerFault) as caught:
        client.jobs.get("job_1")
    assert (caught.value.code, caught.value.request_id) == ("http_500", "r1")


@pytest.mark.parametrize("body", [b"<html>Welcome</html>", b"{}", b"[]", b""])
def test_a_response_of_another_program_is_named(body: bytes) -> None:
    with pytest.raises(ResponseInvalid, match="address"):
        connect(answering(httpx2.Response(200, content=body))).jobs.get("job_1")


def test_a_response_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "_MAX_BODY_BYTES", 1000)
    with pytest.raises(ResponseInvalid, match="1000 bytes"):
        connect(answering(httpx2.Response(200, content=b" " * 1001))).jobs.get("job_1")


def test_what_a_newer_service_says_is_kept() -> None:
    answer = httpx2.Response(200, json=job("hibernating", mood="good"))
    got = connect(answering(answer)).jobs.get("job_1")
    assert got.status == "hibernating"
    assert got.model_extra == {"mood": "good"}


@pytest.mark.parametrize("url", [f"{URL}/below", f"{URL}/below/", f"{URL}/below/v1"])
def test_a_service_may_be_below_a_path(url: str) -> None:
    service = answering(httpx2.Response(200, json=job()))
    Client(url, KEY, transport=httpx2.MockTransport(service)).jobs.get("job_1")
    assert str(service.requests[0].url) == f"{URL}/below/v1/jobs/job_1"


def test_an_id_never_leads_elsewhere() -> None:
    service = FakeService(lambda _: httpx2.Response(200, json=job()))
    client = connect(service)
    client.jobs.get("../keys?x=1#y")
    assert service.requests[0].url.raw_path == b"/v1/jobs/..%2Fkeys%3Fx%3D1%23y"
    for id_ in ("", ".", ".."):
        with pytest.raises(ValueError, match="no id"):
            client.jobs.get(id_)


@pytest.mark.parametrize(
    ("location", "is_sent"),
    [
        ("https://bucket.test/weights?signature=1", False),
        (f"{URL}:8080/elsewhere", False),
        ("http://service.test.evil.test/", False),
        (f"{URL}/elsewhere", True),
        ("https://service.test/elsewhere", True),
    ],
)
def test_no_key_is_sent_to_another_host(location: str, is_sent: bool) -> None:
    service = answering(httpx2.Response(307, headers={"location": location}), httpx2.Response(200, json=job()))
    connect(service).jobs.get("job_1")
    assert [str(request.url) for request in service.requests][1] == location
    assert service.headers("authorization") == [f"Bearer {KEY}", f"Bearer {KEY}" if is_sent else None]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_submission_is_never_led_elsewhere(status: int) -> None:
    service = answering(httpx2.Response(status, headers={"location": "https://elsewhere.test/v1/jobs"}))
    with pytest.raises(ResponseInvalid, match="POCL_URL"):
        connect(service).jobs.create({})
    assert len(service.requests) == 1


def pages(request: httpx2.Request) -> httpx2.Response:
    after, limit = int(request.url.params.get("after", 0)), int(request.url.params["limit"])
    numbers = range(after + 1, min(after + limit, 250) + 1)
    data = [job(id=str(number)) for number in numbers]
    return httpx2.Response(200, json={"data": data, "has_more": numbers[-1] < 250, "last_id": str(numbers[-1])})


@pytest.mark.parametrize(("limit", "requests"), [(None, 3), (250, 3), (101, 2), (100, 1), (1, 1), (0, 0)])
def test_lists_are_read_page_by_page(limit: int | None, requests: int) -> None:
    service = FakeService(pages)
    items = connect(service).items("/v1/jobs", Job, limit=limit)
    assert [each.id for each in items] == [str(n) for n in range(1, 1 + (250 if limit is None else limit))]
    assert len(service.requests) == requests


def test_a_page_is_read_when_it_is_needed() -> None:
    service = FakeService(pages)
    items = connect(service).items("/v1/jobs", Job)
    next(items)
    assert len(service.requests) == 1


def test_fields_that_are_not_given_are_not_sent() -> None:
    service = FakeService(lambda _: httpx2.Response(200, json=job()))
    client = connect(service)
    client.jobs.create({"seed": 1}, name=None, priority=0)
    client.jobs.update("job_1", name=None)
    assert [request.read() for request in service.requests] == [b'{"priority":0,"spec":{"seed":1}}', b'{"name":null}']


def test_a_closed_client_says_so() -> None:
    with connect(answering()) as client:
        pass
    with pytest.raises(RuntimeError, match="closed"):
        client.jobs.get("job_1")


def test_timeouts_are_everywhere() -> None:
    service = FakeService(lambda _: httpx2.Response(200, json={**job(), "data": []}))
    client = Client(URL, KEY, transport=httpx2.MockTransport(service), timeout=7)
    reads: list[Callable[[], Any]] = [
        lambda: client.jobs.get("job_1"), lambda: list(client.jobs.list()), lambda: client.jobs.create({}),
        lambda: client.jobs.metrics("job_1"),
    ]  # fmt: skip
    for read in reads:
        with_suppressed(read)
    for request in service.requests:
        assert all(0 < seconds <= 7 for seconds in request.extensions["timeout"].values())


def with_suppressed(read: Callable[[], Any]) -> None:
    try:
        read()
    except ResponseInvalid:
        return
