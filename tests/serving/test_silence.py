"""Nothing of what people ask, or are answered, gets into logs, metrics or traces; a transcript only where asked for."""

import json
import logging
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
import structlog
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from serving.inprocess import InProcessEngine
from serving.traces import Traces
from serving.transcript import WAITING_MAX, Transcript
from tests.serving.desk import served
from tests.serving.registry import MODEL

CANARY = "marzipan-7319"
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


class Collector(ThreadingHTTPServer):
    """Receives OTLP over HTTP, as a collector does."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Receiver)
        self.raw = []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1/traces"

    @property
    def spans(self):
        found = []
        for raw in self.raw:
            for resource in ExportTraceServiceRequest.FromString(raw).resource_spans:
                found += [span for scope in resource.scope_spans for span in scope.spans]
        return found


class Receiver(BaseHTTPRequestHandler):
    def do_POST(self):
        assert self.path == "/v1/traces"
        self.server.raw.append(self.rfile.read(int(self.headers["content-length"])))
        self.send_response(200)
        self.send_header("content-type", "application/x-protobuf")
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def collector():
    with Collector() as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield made
        made.shutdown()


@pytest.fixture
def logged(capsys, caplog):
    """Everything any logger says, from now on."""
    lines = []
    caplog.set_level(logging.DEBUG)

    def hear(_logger, _name, event):
        lines.append(repr(event))
        raise structlog.DropEvent

    before = structlog.get_config()
    structlog.configure(processors=[structlog.processors.format_exc_info, hear], cache_logger_on_first_use=False)
    # Not what the test's own client logs of what it sends.
    yield lambda: "\n".join(
        [
            *lines,
            *(
                record.getMessage() + str(record.exc_info)
                for record in caplog.records
                if record.name.partition(".")[0] not in {"httpx", "httpcore"}
            ),
        ]
    )
    structlog.configure(**before)


def attributes(span):
    return {a.key: a.value.string_value or a.value.int_value or a.value.array_value for a in span.attributes}


def ask_in_every_way(url):
    """Right and wrong requests that carry the canary wherever a client can write."""
    chat = f"{url}/v1/chat/completions"
    said = [{"role": "user", "content": f"my word is {CANARY}"}]
    right = {"model": MODEL, "messages": said, "max_tokens": 3, "user": CANARY}
    bodies = (
        right,
        {**right, "stream": True, "stream_options": {"include_usage": True}},
        {**right, "model": CANARY},
        {**right, "temperature": CANARY},
        {**right, CANARY: 1},
        {**right, "messages": [{"role": CANARY, "content": CANARY}]},
        {**right, "messages": [{"role": "user", "content": CANARY * 2000}]},
        {**right, "stop": [CANARY], "metadata": {CANARY: CANARY}, "logprobs": True},
    )
    statuses = [httpx.post(chat, json=body, timeout=60).status_code for body in bodies]
    statuses.append(httpx.post(chat, content=f'{{"{CANARY}": '.encode(), timeout=60).status_code)
    statuses.append(
        httpx.post(f"{url}/v1/completions", json={"model": MODEL, "prompt": CANARY, "max_tokens": 3}).status_code
    )
    statuses.append(httpx.request("POST", f"{url}/v1/{CANARY}?{CANARY}", headers={"x-request-id": CANARY}).status_code)
    statuses.append(httpx.request(CANARY, f"{url}/v1/models/{CANARY}").status_code)
    statuses.append(httpx.get(f"{url}/v1/models/{CANARY}").status_code)
    return statuses


def test_a_canary_is_in_no_log_no_metric_and_no_span(tiny, adapters, tmp_path, collector, logged, monkeypatch):
    traces = Traces(collector.url)
    with (
        InProcessEngine(tiny, context_max=512) as engine,
        served(engine, adapters["upper"], tmp_path, traces=traces) as url,
    ):
        assert ask_in_every_way(url) == [200, 200, 404, 400, 400, 400, 400, 200, 400, 200, 404, 405, 404]

        def defect(text):
            raise RuntimeError(f"cannot make sense of {text}")

        with monkeypatch.context() as broken:
            broken.setattr(engine, "text_ids", defect)
            asked = {"model": MODEL, "prompt": CANARY}
            assert httpx.post(f"{url}/v1/completions", json=asked).status_code == 500
        for part in ("add", "step"):
            with monkeypatch.context() as broken:
                broken.setattr(engine._slots, part, lambda *_: defect(CANARY))
                assert httpx.post(f"{url}/v1/completions", json=asked).status_code == 500
        page = httpx.get(f"{url}/metrics").text
        state = httpx.get(f"{url}/tidegate/state").text
    traces.close()
    heard = logged()
    assert "request failed" in heard and "RuntimeError" in heard and "defect" in heard
    assert "prompts failed" in heard and "step failed" in heard
    assert len(collector.spans) >= 16
    for place in (heard, page, state, *collector.raw):
        assert CANARY not in (place if isinstance(place, str) else place.decode("latin-1"))
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or CANARY.encode() not in file.read_bytes(), file


def test_a_span_says_what_answered_how_long_and_how_much(tiny, adapters, tmp_path, collector):
    traces = Traces(collector.url)
    asked = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "stream": True}
    with InProcessEngine(tiny) as engine, served(engine, adapters["upper"], tmp_path, traces=traces) as url:
        reply = httpx.post(
            f"{url}/v1/chat/completions", json=asked, headers={"traceparent": f"00-{TRACE}-00f067aa0ba902b7-01"}
        )
        answer_id = json.loads(reply.text.partition("\n")[0].removeprefix("data: "))["id"]
        httpx.get(f"{url}/v1/nothing")
    traces.close()
    answered, lost = sorted(
        (s for s in collector.spans if "readyz" not in s.name), key=lambda s: s.name == "HTTP unknown"
    )
    facts = attributes(answered)
    assert answered.name == "POST /v1/chat/completions"
    assert answered.trace_id.hex() == TRACE
    assert answered.parent_span_id.hex() == "00f067aa0ba902b7"
    assert facts["http.response.status_code"] == 200
    assert facts["gen_ai.request.model"] == MODEL
    assert facts["gen_ai.response.model"] == f"{MODEL}@7"
    assert facts["gen_ai.response.id"] == answer_id
    assert facts["gen_ai.usage.output_tokens"] == 3
    assert facts["gen_ai.response.finish_reasons"].values[0].string_value == "length"
    (first,) = answered.events
    assert answered.start_time_unix_nano < first.time_unix_nano < answered.end_time_unix_nano
    assert lost.name == "HTTP unknown"
    assert attributes(lost)["http.response.status_code"] == 404


def test_a_collector_that_is_down_makes_no_answer_wait(tiny, adapters, tmp_path):
    traces = Traces("http://127.0.0.1:9/v1/traces")
    with InProcessEngine(tiny) as engine, served(engine, adapters["upper"], tmp_path, traces=traces) as url:
        began = time.monotonic()
        asked = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
        assert httpx.post(f"{url}/v1/chat/completions", json=asked, timeout=60).status_code == 200
        assert time.monotonic() - began < 10


def test_serving_exports_nothing_unless_asked():
    code = "import serving.api, sys; print(any(m.startswith('opentelemetry.sdk') for m in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


LISTENER = """
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
heard = InMemorySpanExporter()
provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(heard))
trace.set_tracer_provider(provider)
import httpx
from serving.server import running
with running([], answer_key=b"k" * 32) as url:
    httpx.get(url + "/v1/models").raise_for_status()
trace.get_tracer("test").start_span("works").end()
print([span.name for span in heard.get_finished_spans()])
"""


def test_what_the_web_framework_would_trace_by_itself_is_off():
    done = subprocess.run(
        [sys.executable, "-c", LISTENER], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "['works']"


def test_a_stream_that_opts_in_keeps_what_was_asked_and_answered(tiny, adapters, tmp_path):
    file = tmp_path / "transcripts" / "bare.jsonl"
    transcript = Transcript(file)
    with (
        InProcessEngine(tiny, context_max=512) as engine,
        served(engine, adapters["upper"], tmp_path, transcripts={"bare": transcript}) as url,
    ):
        chat = f"{url}/v1/chat/completions"
        asked = {"messages": [{"role": "user", "content": CANARY}], "max_tokens": 4, "temperature": 0}
        whole = httpx.post(chat, json={**asked, "model": "bare"}, timeout=60).json()
        streamed = httpx.post(chat, json={**asked, "model": "bare", "stream": True, "n": 2}, timeout=60)
        httpx.post(chat, json={**asked, "model": MODEL}, timeout=60)
        httpx.post(chat, json={**asked, "model": "bare", "n": 99}, timeout=60)
    transcript.close()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["version"] for line in lines] == ["bare@base", "bare@base"]
    assert lines[0]["id"] == whole["id"]
    assert lines[0]["asked"]["messages"][0]["content"] == CANARY
    text = whole["choices"][0]["message"]["content"]
    assert lines[0]["answers"] == [text]
    assert lines[1]["answers"] == [text, text]
    assert lines[0]["finish_reasons"] == ["length"]
    assert lines[1]["id"] in streamed.text
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_transcript_that_cannot_be_written_is_told_and_makes_nobody_wait(tmp_path, logged):
    (tmp_path / "file").write_text("in the way")
    transcript = Transcript(tmp_path / "file" / "desk.jsonl")
    began = time.monotonic()
    for number in range(WAITING_MAX * 3):
        transcript.write(id=str(number), answers=[CANARY])
    transcript.close()
    assert time.monotonic() - began < 30
    assert "transcript lines lost" in logged()
    assert CANARY not in logged()


def test_an_answer_that_takes_too_long_is_504(tiny, adapters, tmp_path):
    with (
        InProcessEngine(tiny, context_max=512) as engine,
        served(engine, adapters["upper"], tmp_path, timeouts_s={MODEL: 0.001}) as url,
    ):
        asked = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 200}
        late = httpx.post(f"{url}/v1/chat/completions", json=asked, timeout=60)
        assert late.status_code == 504
        assert late.json()["error"]["code"] == "timeout"
        streamed = httpx.post(f"{url}/v1/chat/completions", json={**asked, "stream": True}, timeout=60)
        assert "must be whole by then" in streamed.text
        assert "[DONE]" not in streamed.text
        assert (
            httpx.post(f"{url}/v1/chat/completions", json={**asked, "model": "bare", "max_tokens": 2}).status_code
            == 200
        )
