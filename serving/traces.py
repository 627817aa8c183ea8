"""OpenTelemetry spans of requests, when asked for: one a request, sent as OTLP over HTTP.

A span says which route, stream and version answered, how long, how much, and with which status. It holds no prompt, no
answer, and nothing else a client wrote but its trace context: names that exist and numbers alone.
(https://opentelemetry.io/docs/specs/semconv, http and gen-ai.)
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from serving.errors import ServingError
from serving.reply import Reply

if TYPE_CHECKING:
    from opentelemetry.trace import Span

# A server that ends waits so long for its collector, not longer.
FLUSH_MS_MAX = 5000
_DEFECT = 500


class Traces:
    """Spans on their way to a collector, in batches, on a thread of their own. A collector that is down loses them.

    Args:
        endpoint: the collector's full address, as `http://127.0.0.1:4318/v1/traces`.

    Raises:
        ServingError: the extra is not installed.
    """

    def __init__(self, endpoint: str) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            raise ServingError(
                f"service.api.traces={endpoint}: {error.name} is missing; install `tidegate[traces]`, or set it empty"
            ) from error
        self._provider = TracerProvider(resource=Resource.create({"service.name": "tidegate"}))
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
        self._tracer = self._provider.get_tracer("tidegate.serving")
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, method: str, headers: Mapping[str, str]) -> Span:
        """A span for a request, under the one its `traceparent` names."""
        from opentelemetry.trace import SpanKind

        carrier = {name: headers[name] for name in ("traceparent", "tracestate") if name in headers}
        return self._tracer.start_span(method, self._propagator.extract(carrier), SpanKind.SERVER)

    def close(self) -> None:
        """Send what is left."""
        self._provider.force_flush(FLUSH_MS_MAX)
        self._provider.shutdown()


def end(span: Span, *, method: str, route: str, status: int, began_s: float, reply: Reply | None) -> None:
    """Finish the span of a request.

    Args:
        span: what `begin` gave.
        method: one that a route has.
        route: its template, never the path a client sent.
        status: of the answer; 0 when there was none.
        began_s: monotonic time of its beginning.
        reply: what answered; None when nothing did.
    """
    from opentelemetry.trace import StatusCode

    span.update_name(f"{method} {route}")
    span.set_attributes({"http.request.method": method, "http.route": route, "http.response.status_code": status})
    if status >= _DEFECT or (reply is not None and reply.failed):
        span.set_status(StatusCode.ERROR)
    if reply is not None:
        span.set_attributes(_facts(reply))
        if reply.first_s is not None:
            # Spans are on the wall's clock, replies on one that only grows.
            at_s = time.time() - (time.monotonic() - began_s) + reply.first_s
            span.add_event("first text", timestamp=int(at_s * 1e9))
    span.end()


def _facts(reply: Reply) -> dict[str, Any]:
    used = reply.usage()
    return {
        "gen_ai.operation.name": "chat" if reply.chat else "text_completion",
        "gen_ai.request.model": reply.served.stream,
        "gen_ai.response.model": reply.served.name,
        "gen_ai.response.id": reply.answer_id,
        "gen_ai.response.finish_reasons": [reply.finishes[index].reason for index in sorted(reply.finishes)],
        "gen_ai.usage.input_tokens": used["prompt_tokens"],
        "gen_ai.usage.output_tokens": used["completion_tokens"],
        "tidegate.choices": len(reply.answers),
    }
