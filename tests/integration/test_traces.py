"""Traces and log lines from a request to the stages of its job, over the API and a worker with a fake engine."""

import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import structlog
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from pydantic import SecretStr
from starlette.testclient import TestClient
from structlog.testing import capture_logs

from api.app import create_app
from domain.jobs.states import JobStatus
from domain.tracing import create_tracer_provider
from tests.support.harness import SPEC, ServiceHarness
from tests.support.requests import AUTHORIZED, KEY, LOOPBACK, upload

CLIENT_TRACE, CLIENT_SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def harness(sqlite_template: Path, tmp_path: Path) -> Iterator[ServiceHarness]:
    shutil.copyfile(sqlite_template, tmp_path / "test.db")
    harness = ServiceHarness(tmp_path / "home", f"sqlite:///{tmp_path / 'test.db'}")
    yield harness
    harness.close()


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def provider(exporter: InMemorySpanExporter) -> Iterator[TracerProvider]:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    yield provider
    provider.shutdown()


def submit(harness: ServiceHarness, provider: TracerProvider | None, **headers: str) -> str:
    """Submit a job over HTTP, and poll it once; its id."""
    harness.settings.home.mkdir(mode=0o700, parents=True, exist_ok=True)
    settings = harness.settings.model_copy(update={"api_key": SecretStr(KEY), "encoding_check_seconds": 0.0})
    app = create_app(settings, tracer_provider=provider)
    with TestClient(app, base_url=LOOPBACK, headers=AUTHORIZED) as client:
        spec = {**SPEC, "data": {"train": {"dataset": upload(client)}}}
        response = client.post("/v1/jobs", json={"spec": spec}, headers=headers)
        assert response.status_code == 201, response.text
        job: str = response.json()["id"]
        client.get(f"/v1/jobs/{job}")
        client.get("/healthz")
    app.state.database.close()
    return job


def parent_of(span: ReadableSpan) -> int | None:
    return None if span.parent is None else span.parent.span_id


@pytest.mark.system
def test_one_trace_goes_from_the_request_to_the_stages(
    harness: ServiceHarness, provider: TracerProvider, exporter: InMemorySpanExporter
) -> None:
    job = submit(harness, provider, traceparent=f"00-{CLIENT_TRACE}-{CLIENT_SPAN}-01")
    supervisor = replace(harness.supervisor(), tracer=provider.get_tracer("pocl"))
    assert supervisor.work_one() is JobStatus.SUCCEEDED
    spans = {span.name: span for span in exporter.get_finished_spans()}
    # Polls and probes, which come by the thousand, have none.
    assert "GET /v1/jobs/{job_id}" not in spans
    assert not any("healthz" in name or name == "GET" for name in spans)
    request, attempt = spans["POST /v1/jobs"], spans["attempt"]
    assert f"{request.context.trace_id:032x}" == CLIENT_TRACE
    assert f"{parent_of(request):016x}" == CLIENT_SPAN
    assert parent_of(attempt) == request.context.span_id
    assert attempt.attributes is not None
    assert attempt.attributes["pocl.job_id"] == job
    assert attempt.attributes["pocl.end"] == "succeeded"
    stages = [spans["stage 0"], spans["stage 1"]]
    phases = [span for name, span in spans.items() if name.startswith("phase ")]
    assert phases
    for span in (*stages, *phases):
        assert parent_of(span) == attempt.context.span_id
        assert span.context.trace_id == request.context.trace_id
        assert attempt.start_time is not None
        assert span.start_time is not None
        assert span.end_time is not None
        assert attempt.end_time is not None
        assert attempt.start_time <= span.start_time <= span.end_time <= attempt.end_time


@pytest.mark.system
def test_lines_of_the_worker_have_the_id_of_the_request(harness: ServiceHarness) -> None:
    submit(harness, None, **{"x-request-id": "from-the-client"})
    with capture_logs(processors=[structlog.contextvars.merge_contextvars]) as lines:
        assert harness.supervisor().work_one() is JobStatus.SUCCEEDED
    about = [line for line in lines if line["event"] in ("attempt_started", "attempt_ended")]
    assert len(about) == 2
    assert {(line["request_id"], line["attempt"]) for line in about} == {("from-the-client", 1)}
    # Nothing was traced, so nothing is remembered of a trace.
    (job,) = {line["job_id"] for line in about}
    assert harness.job(job).traceparent is None


def test_without_a_provider_no_span_is_made(harness: ServiceHarness) -> None:
    job = submit(harness, None, traceparent=f"00-{CLIENT_TRACE}-{CLIENT_SPAN}-01")
    assert harness.job(job).traceparent is None


@pytest.mark.system
def test_spans_reach_a_collector_by_otlp() -> None:
    received: list[tuple[str, ExportTraceServiceRequest]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            received.append((self.path, ExportTraceServiceRequest.FromString(body)))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            provider = create_tracer_provider(f"http://127.0.0.1:{server.server_port}", service="pocl-test", ratio=1)
            with provider.get_tracer("pocl").start_as_current_span("attempt"):
                pass
            provider.shutdown()
        finally:
            server.shutdown()
            thread.join()
    ((path, request),) = received
    assert path == "/v1/traces"
    (resource,) = request.resource_spans
    assert {each.key: each.value.string_value for each in resource.resource.attributes}["service.name"] == "pocl-test"
    assert [span.name for scope in resource.scope_spans for span in scope.spans] == ["attempt"]
