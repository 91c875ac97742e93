"""Waiting for a job and following it, by a clock that nobody waits for."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from pocl_client import ExportFailed, NotFound, ResponseInvalid, ServiceUnreachable, WaitTimedOut
from pocl_client.models import CheckpointExport, Event, Job, LogMessage
from tests.client.fakes import BrokenStream, FakeClock, FakeService, answering, connect, job, problem

AT = "2026-11-24T10:00:00Z"


def not_modified() -> httpx2.Response:
    return httpx2.Response(304)


def state(status: str, etag: str) -> httpx2.Response:
    return httpx2.Response(200, json=job(status), headers={"etag": f'"{etag}"'})


def test_a_job_is_waited_for_by_long_polls() -> None:
    service = answering(state("queued", "1"), not_modified(), state("running", "2"), state("succeeded", "3"))
    seen: list[Job] = []
    assert connect(service).jobs.wait("job_1", on_change=seen.append).status == "succeeded"
    assert [each.status for each in seen] == ["queued", "running", "succeeded"]
    assert service.headers("if-none-match") == [None, '"1"', '"1"', '"2"']
    assert [float(request.url.params.get("wait", 0)) for request in service.requests] == [0, 30, 30, 30]
    # The service holds an answer back for so long; the client has to wait for longer.
    assert all(request.extensions["timeout"]["read"] > 30 for request in service.requests)


@pytest.mark.parametrize("status", ["succeeded", "failed", "cancelled"])
def test_every_end_ends_a_wait_for_a_pause(status: str) -> None:
    assert connect(answering(state(status, "1"))).jobs.wait("job_1", until={"paused"}).status == status


def test_a_wait_may_be_for_another_status() -> None:
    service = answering(state("running", "1"), state("paused", "2"))
    assert connect(service).jobs.wait("job_1", until={"paused"}).status == "paused"


def holding(clock: FakeClock) -> FakeService:
    """A service whose job never changes, and which holds its answers back as it is asked to."""

    def answer(request: httpx2.Request) -> httpx2.Response:
        clock.now += float(request.url.params.get("wait", 0))
        return not_modified() if "if-none-match" in request.headers else state("running", "1")

    return FakeService(answer)


@pytest.mark.parametrize("timeout", [0, 0.2, 100])
def test_a_wait_ends_at_its_time(timeout: float) -> None:
    clock = FakeClock()
    began = clock.now
    with pytest.raises(WaitTimedOut, match="running"):
        connect(holding(clock), clock=clock).jobs.wait("job_1", timeout=timeout)
    assert timeout <= clock.now - began <= timeout + 1


def test_a_job_that_changes_all_the_time_is_not_polled_all_the_time() -> None:
    clock = FakeClock()
    numbers = iter(range(10_000))
    service = FakeService(lambda _: state("running", str(next(numbers))))
    with pytest.raises(WaitTimedOut):
        connect(service, clock=clock).jobs.wait("job_1", timeout=60)
    assert len(service.requests) <= 2 * 60 + 2


def test_a_wait_outlasts_a_restart_of_the_service() -> None:
    clock = FakeClock()
    away = [httpx2.ConnectError("refused") for _ in range(40)]
    service = answering(state("running", "1"), *away, state("succeeded", "2"))
    assert connect(service, clock=clock).jobs.wait("job_1").status == "succeeded"


def test_a_service_that_stays_away_ends_a_wait() -> None:
    clock = FakeClock()
    service = FakeService(lambda _: httpx2.ConnectError("refused"))
    began = clock.now
    with pytest.raises(ServiceUnreachable):
        connect(service, clock=clock).jobs.wait("job_1")
    assert 600 <= clock.now - began <= 700


def test_a_job_that_is_deleted_ends_a_wait() -> None:
    with pytest.raises(NotFound):
        connect(answering(state("running", "1"), problem(404, "job_not_found"))).jobs.wait("job_1")


# --- Streams ---------------------------------------------------------------------------------------------


def frame(number: int, type_: str = "state", **data: Any) -> bytes:
    event = {"id": number, "at": AT, "type": "status", "data": data}
    return f"id: {number}\nevent: {type_}\ndata: {json.dumps(event)}\n\n".encode()


def stream(*pieces: bytes, broken: bool = False) -> httpx2.Response:
    content: Any = BrokenStream(pieces) if broken else httpx2.ByteStream(b"".join(pieces))
    return httpx2.Response(200, headers={"content-type": "text/event-stream"}, stream=content)


def follow(service: FakeService, **options: Any) -> Iterator[int]:
    for message in connect(service).jobs.stream("job_1", **options):
        assert isinstance(message.content, Event)
        yield message.content.id


def cut_anywhere(content: bytes) -> Iterable[tuple[bytes, bytes]]:
    return ((content[:at], content[at:]) for at in range(0, len(content), 7))


def test_a_stream_goes_on_after_the_last_whole_message() -> None:
    whole = frame(1) + frame(2) + frame(3, "end")
    for before, _ in cut_anywhere(whole):
        received = before.count(b"\n\n")
        rest = b"".join([frame(1), frame(2), frame(3, "end")][received:])
        service = answering(stream(b"retry: 2000\n", before, broken=True), stream(rest))
        assert list(follow(service)) == [1, 2, 3]
        assert service.headers("last-event-id") == [None, str(received) if received else None]


def test_a_stream_that_closes_without_the_end_is_opened_again() -> None:
    service = answering(stream(frame(1)), stream(b": keep-alive\n"), stream(frame(2, "end")))
    assert list(follow(service)) == [1, 2]
    assert service.headers("last-event-id") == [None, "1", "1"]


def test_a_stream_waits_as_the_service_asks() -> None:
    clock = FakeClock()
    client = connect(answering(stream(b"retry: 7000\n", frame(1)), stream(frame(2, "end"))), clock=clock)
    assert len(list(client.jobs.stream("job_1"))) == 2
    assert 3.5 <= clock.slept[0] <= 10.5


def test_nothing_follows_a_job_that_has_ended() -> None:
    service = answering(httpx2.Response(204))
    assert list(follow(service, last_event_id="9")) == []
    assert service.headers("last-event-id") == ["9"]


def test_a_stream_says_which_messages_it_wants() -> None:
    service = answering(stream(frame(4, "end")))
    assert list(follow(service, types=["log", "state"], after=3)) == [4]
    assert service.requests[0].url.query == b"types=log&types=state&after=3"


def test_live_messages_are_typed() -> None:
    log = {"type": "log", "attempt": 1, "offset": 0, "next_offset": 3, "text": "hi\n"}
    data = f"id: 0-1-3\nevent: log\ndata: {json.dumps(log)}\n\n".encode()
    messages = list(connect(answering(stream(data, frame(1, "end")))).jobs.stream("job_1", types=["log"]))
    assert isinstance(messages[0].content, LogMessage)
    assert (messages[0].type, messages[0].id, messages[0].content.text) == ("log", "0-1-3", "hi\n")


def test_a_stream_of_a_job_that_was_deleted_ends_with_an_error() -> None:
    with pytest.raises(NotFound):
        list(follow(answering(stream(frame(1)), problem(404, "job_not_found"))))


def test_what_is_no_stream_is_named() -> None:
    headers = {"content-type": "text/html"}
    service = FakeService(lambda _: httpx2.Response(200, content=b"<html>", headers=headers))
    with pytest.raises((ResponseInvalid, ServiceUnreachable)):
        list(follow(service))


def test_a_caller_may_stop_listening() -> None:
    service = answering(stream(frame(1), frame(2), frame(3, "end")))
    messages: Iterator[int] = follow(service)
    assert next(messages) == 1
    messages.close()  # type: ignore[attr-defined] # It is a generator.


def export(state: str, **fields: object) -> httpx2.Response:
    content = {
        "id": "exp_1",
        "object": "checkpoint.export",
        "checkpoint_id": "ckpt_1",
        "job_id": "job_1",
        "format": "q8_0",
        "state": state,
        "attempts": 1,
        "not_before": None,
        "error": None,
        "size_bytes": None,
        "manifest_sha256": None,
        "notes": [],
        "created_at": AT,
        "completed_at": None,
    }
    return httpx2.Response(200, json={**content, **fields})


def test_an_export_that_fails_says_why_and_whose_fault_it_is(tmp_path: Path) -> None:
    reason = {"code": "gguf_unsupported", "message": "The tokenizer marks parts of words.", "fault": "user"}
    service = answering(export("pending"), export("running"), export("running"), export("failed", error=reason))
    seen: list[CheckpointExport] = []
    with pytest.raises(ExportFailed, match="marks parts of words") as failed:
        connect(service).checkpoints.export("ckpt_1", "q8_0", tmp_path / "gguf", on_change=seen.append)
    assert (failed.value.code, failed.value.fault) == ("gguf_unsupported", "user")
    assert [each.state for each in seen] == ["pending", "running", "failed"]
    assert not (tmp_path / "gguf").exists()


def test_an_export_is_waited_for_until_its_time_and_through_an_outage(tmp_path: Path) -> None:
    clock = FakeClock()
    states = iter([export("pending"), problem(503, "unavailable")])
    service = FakeService(lambda _: next(states, export("running")))
    began = clock.now
    with pytest.raises(WaitTimedOut, match="running"):
        connect(service, clock=clock).checkpoints.export("ckpt_1", "q8_0", tmp_path / "gguf", timeout=30)
    assert 30 <= clock.now - began < 60
