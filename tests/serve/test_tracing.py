"""Spans of requests: what they say, what they never say, and that nothing about them disturbs an answer."""

import builtins
import http.server
import logging
import threading

import pytest

pytest.importorskip("opentelemetry.sdk.trace", reason="OpenTelemetry is not installed: pip install 'tenfold[traces]'")
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from tenfold.engine.request import FinishReason
from tenfold.serve import settings, tracing
from tenfold.serve.app import create_app
from tenfold.serve.settings import ServeConfig
from tenfold.serve.tracing import Tracer, address
from tests.serve.conftest import Client

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Traced(Client):
    """A client of a server whose spans stay in memory."""

    def __init__(self, llm, exporter=None, processor=None):
        super().__init__(create_app({"tiny": llm}, ServeConfig()))
        self.memory = exporter or InMemorySpanExporter()
        self.metrics = self.app.state.service.metrics
        self.metrics.tracer = Tracer(processor or SimpleSpanProcessor(self.memory))

    def spans(self):
        return self.memory.get_finished_spans()


@pytest.fixture
def traced(llm):
    client = Traced(llm)
    yield client
    client.metrics.close()


def test_a_span_says_what_was_asked_and_what_it_took(traced, llm):
    answer = traced.chat(max_tokens=5, temperature=0.5, seed=3).json()
    (span,) = traced.spans()
    assert span.name == "chat tiny"
    assert span.kind.name == "SERVER"
    assert span.attributes == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "tenfold",
        "gen_ai.request.model": "tiny",
        "gen_ai.response.model": "tiny",
        "gen_ai.response.id": answer["id"],
        "gen_ai.request.max_tokens": 5,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.top_k": 50,
        "gen_ai.request.frequency_penalty": 0.0,
        "gen_ai.request.presence_penalty": 0.0,
        "gen_ai.request.seed": 3,
        "gen_ai.request.choice.count": 1,
        "gen_ai.usage.input_tokens": answer["usage"]["prompt_tokens"],
        "gen_ai.usage.output_tokens": 5,
        "gen_ai.usage.cache_read.input_tokens": 0,
        "gen_ai.response.finish_reasons": ("stop",),
        "url.path": "/v1/chat/completions",
    }
    assert span.status.is_unset
    assert span.resource.attributes["service.name"] == "tenfold"


def test_events_are_in_order(traced):
    traced.chat(stream=True)
    (span,) = traced.spans()
    assert [event.name for event in span.events] == ["queued", "started", "first token"]
    times = [span.start_time, *(event.timestamp for event in span.events), span.end_time]
    assert times == sorted(times)


@pytest.mark.parametrize(
    ("path", "body", "name"), [("/v1/completions", {"prompt": "Hi", "n": 2}, "text_completion tiny")]
)
def test_other_endpoints(traced, path, body, name):
    traced.post(path, body)
    (span,) = traced.spans()
    assert span.name == name
    assert span.attributes["gen_ai.response.finish_reasons"] == ("stop", "stop")


def test_a_span_is_part_of_its_clients_trace(traced):
    traced.headers = {"traceparent": PARENT, "tracestate": "vendor=1"}
    traced.chat()
    (span,) = traced.spans()
    assert f"{span.context.trace_id:032x}" == "0af7651916cd43dd8448eb211c80319c"
    assert f"{span.parent.span_id:016x}" == "b7ad6b7169203331"
    assert span.context.trace_state.get("vendor") == "1"


@pytest.mark.parametrize("parent", ["", "00-zz-zz-01", "x" * 4000, "00-" + "0" * 32 + "-" + "0" * 16 + "-01"])
def test_a_broken_parent_is_none(traced, parent):
    traced.headers = {"traceparent": parent}
    assert traced.chat().status_code == 200
    assert traced.spans()[0].parent is None


def test_a_failure_is_an_error_without_text(traced, llm):
    llm.fail = RuntimeError("the prompt was secret words")
    traced.chat()
    (span,) = traced.spans()
    assert span.attributes["error.type"] == "internal_error"
    assert not span.status.is_ok
    assert not span.status.is_unset
    assert "secret" not in span.to_json()


def test_no_text_in_a_span(traced, llm):
    traced.chat(messages=[{"role": "user", "content": "tell nobody of the walrus"}], user="walrus-user")
    (span,) = traced.spans()
    assert "walrus" not in span.to_json()
    assert llm.answer not in span.to_json()


def test_an_exporter_that_fails_disturbs_nothing(llm, caplog):
    class Broken(SpanExporter):
        calls = 0

        def export(self, spans):
            Broken.calls += 1
            raise OSError("no collector")

    client = Traced(llm, exporter=Broken(), processor=BatchSpanProcessor(Broken()))
    with caplog.at_level(logging.CRITICAL):
        assert client.chat().status_code == 200
        client.metrics.close()
    assert Broken.calls
    assert client.chat().status_code == 200  # after the end, too


def test_a_full_queue_drops_spans_not_requests(llm, caplog):
    gate = threading.Event()

    class Stuck(InMemorySpanExporter):
        def export(self, spans):
            gate.wait(20)
            return super().export(spans)

    memory = Stuck()
    client = Traced(llm, exporter=memory, processor=BatchSpanProcessor(memory, 4, 1.0, 2))
    with caplog.at_level(logging.CRITICAL):
        assert {client.chat().status_code for _ in range(20)} == {200}
        gate.set()
        client.metrics.close()
    assert 0 < len(client.spans()) < 20


def test_spans_go_out_over_otlp(llm):
    got = []

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            got.append((self.path, self.headers["content-type"], self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector) as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{collector.server_address[1]}"
        client = Client(create_app({"tiny": llm}, ServeConfig(traces=url)))
        client.chat()
        client.app.state.service.metrics.close()
        collector.shutdown()
    path, kind, body = got[0]
    assert (path, kind) == ("/v1/traces", "application/x-protobuf")
    (resource,) = ExportTraceServiceRequest.FromString(body).resource_spans
    assert [span.name for scope in resource.scope_spans for span in scope.spans] == ["chat tiny"]


def test_without_opentelemetry_one_sentence_says_so(llm, monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith("opentelemetry"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.delitem(__import__("sys").modules, "tenfold.serve.tracing")
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ValueError, match=r"pip install 'tenfold\[traces\]'"):
        create_app({"tiny": llm}, ServeConfig(traces="http://127.0.0.1:4318"))
    assert Client(create_app({"tiny": llm}, ServeConfig())).chat().status_code == 200


def test_settings_say_it_before_a_model_is_loaded(monkeypatch):
    monkeypatch.setattr(settings, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'tenfold\[traces\]'"):
        ServeConfig(traces="http://127.0.0.1:4318").check()


def test_the_end_does_not_wait_for_a_collector_for_ever(llm, monkeypatch):
    gate = threading.Event()
    monkeypatch.setattr(tracing, "LAST", 0.05)

    class Stuck(InMemorySpanExporter):
        def export(self, spans):
            gate.wait(20)
            return super().export(spans)

    client = Traced(llm, exporter=Stuck(), processor=BatchSpanProcessor(Stuck()))
    client.chat()
    client.metrics.close()
    assert not gate.is_set()
    gate.set()


@pytest.mark.parametrize("wrong", ["localhost:4318", "grpc://x:4317", "http://", "yes"])
def test_what_is_no_collector(wrong):
    with pytest.raises(ValueError, match="allowed: the URL of a collector"):
        address(wrong)
    with pytest.raises(ValueError, match="allowed: the URL of a collector"):
        ServeConfig(traces=wrong).check()


def test_a_path_of_ones_own_stays():
    assert address("http://c:4318") == address("http://c:4318/") == "http://c:4318/v1/traces"
    assert address("https://c/otlp/v1/traces") == "https://c/otlp/v1/traces"


def test_every_finish_reason_is_told(traced, llm):
    llm.finish = FinishReason.LENGTH
    traced.chat()
    assert traced.spans()[0].attributes["gen_ai.response.finish_reasons"] == ("length",)
