"""Traces by OpenTelemetry: the context that a job carries from its request to its attempts, and where spans are sent.

Only the API of OpenTelemetry is imported; its SDK, of the extra `traces`, where spans are really made.
"""

import re
from importlib.util import find_spec
from typing import TYPE_CHECKING, Final

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

_PATH: Final = "/v1/traces"
_HEADER: Final = "traceparent"
_FORM: Final = re.compile(r"00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
_EXPORT_SECONDS: Final = 5.0
"""How long sending may take, which is also how long a collector that is away delays the end of a process."""
_MODULES: Final = ("opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http.trace_exporter")
_propagator: Final = TraceContextTextMapPropagator()


def current_traceparent() -> str | None:
    """The span that is current, as the header `traceparent` has it; null where nothing is traced."""
    if not trace.get_current_span().get_span_context().is_valid:
        return None
    carrier: dict[str, str] = {}
    _propagator.inject(carrier)
    traceparent = carrier.get(_HEADER, "")
    return traceparent if _FORM.fullmatch(traceparent) else None


def context_of(traceparent: str | None) -> Context:
    """The context whose current span is that of a `traceparent`; an empty one for null."""
    return _propagator.extract({} if traceparent is None else {_HEADER: traceparent}, Context())


def can_trace() -> bool:
    """Whether the SDK and the exporter are installed."""
    try:
        return all(find_spec(module) is not None for module in _MODULES)
    except ModuleNotFoundError:
        return False


def create_tracer_provider(endpoint: str, *, service: str, ratio: float) -> "TracerProvider":
    """Makes spans, and sends them by OTLP over HTTP from a thread of its own. Shut it down to send the last of them.

    Spans that a collector does not take in time are dropped.

    Args:
        endpoint: the address of the collector, with or without `/v1/traces`.
        service: the name of the process among the services.
        ratio: the share of the traces that begin here which is recorded; one that goes on from elsewhere is, where it
            was there.
    """
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio

    address = endpoint.rstrip("/")
    address = address if address.endswith(_PATH) else f"{address}{_PATH}"
    provider = TracerProvider(
        sampler=ParentBasedTraceIdRatio(ratio), resource=Resource.create({"service.name": service})
    )
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(address, timeout=_EXPORT_SECONDS)))
    return provider
