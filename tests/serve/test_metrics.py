"""What /metrics shows after jobs whose numbers are known."""

import asyncio
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from tenfold.engine.core import QueueFull
from tenfold.engine.request import FinishReason, Output, SamplingParams
from tenfold.serve import metrics as module
from tenfold.serve.aliases import ALIASES
from tenfold.serve.app import create_app
from tenfold.serve.metrics import Metrics
from tenfold.serve.observe import Seen, error_code
from tenfold.serve.service import Counts, Job, Served
from tenfold.serve.settings import ServeConfig
from tenfold.serve.window import MOST, Levels, Series, Window
from tests.web.fake import PagedLLM

DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana" / "tenfold.json"
CHAT = {"endpoint": "/v1/chat/completions", "model": "tiny"}


def samples(source):
    """{(name, labels): value} of a text, or of what a Metrics collects."""
    families = parse_text(source) if isinstance(source, str) else source.collect()
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def value(found, name, **labels):
    return found[name, frozenset(labels.items())]


class Script:
    """A Metrics whose clock stands still until told, and jobs to feed it with."""

    def __init__(self, monkeypatch, **settings):
        self.now = 1000.0
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: self.now))
        settings = ServeConfig(**settings)
        self.served = Served("tiny", PagedLLM(), settings)
        self.metrics = Metrics({"tiny": self.served}, settings)

    def watch(self, prompts=((1, 2, 3),), n=1, late=0.0, key="team"):
        seen = Seen()
        seen.arrival = self.now - late
        params = SamplingParams(n=n)
        job = Job(
            "a", self.served, self.metrics, prompts, params, 0, key, "", "", None, "/v1/chat/completions", seen=seen
        )
        return self.metrics.watch(job)

    def samples(self):
        return samples(self.metrics)


@pytest.fixture
def script(monkeypatch):
    return Script(monkeypatch)


def test_one_job_from_arrival_to_end(script):
    watch = script.watch(late=0.5)
    assert value(script.samples(), "tenfold_requests_open", model="tiny") == 1
    script.now += 2
    watch.output(Output("a", 0, (7,), queue_seconds=1.5, cached_tokens=2))
    for _ in range(3):
        script.now += 0.25
        watch.output(Output("a", 0, (7, 8)))
    script.now += 0.25
    watch.output(Output("a", 0, finish=FinishReason.STOP))
    watch.end("ok", Counts(3))
    found = script.samples()
    for name, sum_, count in (
        ("time_to_first_token", 2.5, 1),
        ("inter_token_latency", 0.75, 3),
        ("time_per_output_token", 0.125, 1),  # 6 tokens after the first in 0.75 s
        ("request", 3.5, 1),
        ("queue", 1.5, 1),
        ("prefill", 0.5, 1),
        ("decode", 0.75, 1),
    ):
        assert value(found, f"tenfold_{name}_seconds_sum", **CHAT) == pytest.approx(sum_), name
        assert value(found, f"tenfold_{name}_seconds_count", **CHAT) == count, name
    assert value(found, "tenfold_inter_token_latency_seconds_bucket", le="0.25", **CHAT) == 3
    assert value(found, "tenfold_inter_token_latency_seconds_bucket", le="0.15", **CHAT) == 0
    for name, count in (("prompt", 3), ("cached", 2), ("generated", 7)):
        assert value(found, f"tenfold_{name}_tokens_total", key="team", **CHAT) == count
    assert value(found, "tenfold_requests_total", key="team", outcome="ok", **CHAT) == 1
    assert value(found, "tenfold_answers_total", model="tiny", finish_reason="stop") == 1
    assert value(found, "tenfold_requests_open", model="tiny") == 0


def test_answers_of_one_job_are_told_apart(script):
    """Two prompts with two answers each: index alone does not say whose token it is."""
    watch = script.watch(prompts=((1,), (2, 3)), n=2)
    for _ in range(2):
        for prompt in range(2):
            for index in range(2):
                watch.output(Output(f"a-{prompt}", index, (7,), cached_tokens=0))
        script.now += 1
    watch.end("ok", Counts(3))
    found = script.samples()
    assert value(found, "tenfold_time_to_first_token_seconds_count", **CHAT) == 1
    assert value(found, "tenfold_inter_token_latency_seconds_count", **CHAT) == 4
    assert value(found, "tenfold_inter_token_latency_seconds_sum", **CHAT) == 4
    assert value(found, "tenfold_prompt_tokens_total", key="team", **CHAT) == 3


def test_a_job_that_never_ran(script):
    script.watch().end("overloaded", Counts(3))
    found = script.samples()
    assert value(found, "tenfold_requests_total", key="team", outcome="overloaded", **CHAT) == 1
    assert value(found, "tenfold_prompt_tokens_total", key="team", **CHAT) == 0
    assert value(found, "tenfold_time_to_first_token_seconds_count", **CHAT) == 0
    assert value(found, "tenfold_request_seconds_count", **CHAT) == 0
    assert value(found, "tenfold_requests_open", model="tiny") == 0


def test_cancelling_is_timed_from_the_disconnect(script):
    watch = script.watch()
    watch.output(Output("a", 0, (7,)))
    watch.seen.disconnected = script.now
    script.now += 0.02
    watch.end("cancelled", Counts(3))
    found = script.samples()
    assert value(found, "tenfold_cancel_seconds_sum", model="tiny") == pytest.approx(0.02)
    assert value(found, "tenfold_requests_total", key="team", outcome="cancelled", **CHAT) == 1


def test_servers_count_apart(monkeypatch):
    one, two = Script(monkeypatch), Script(monkeypatch)
    one.watch().end("ok", Counts(3))
    assert value(one.samples(), "tenfold_requests_total", key="team", outcome="ok", **CHAT) == 1
    assert ("tenfold_requests_total", frozenset({"key": "team", "outcome": "ok", **CHAT}.items())) not in two.samples()


def test_engine_numbers(script):
    llm = script.served.llm
    llm.running, llm.generated, llm.prompts, llm.hits, llm.restarts, llm.state = 6, 50, 40, 10, 2, "restarting"
    found = script.samples()
    for name, number in (
        ("requests_running", 6),
        ("requests_waiting", 2),
        ("kv_pages_capacity", 3640),
        ("prefix_hit_tokens_total", 10),
        ("engine_prompt_tokens_total", 40),
        ("engine_generated_tokens_total", 50),
        ("engine_step_seconds_count", 50),
        ("engine_step_seconds_sum", 0.5),
        ("engine_restarts_total", 2),
    ):
        assert value(found, f"tenfold_{name}", model="tiny") == number, name
    pages = {state: value(found, "tenfold_kv_pages", model="tiny", state=state) for state in ("used", "cached", "free")}
    assert pages == {"used": 240, "cached": 700, "free": 2700}
    assert value(found, "tenfold_engine_state", model="tiny", state="restarting") == 1
    assert value(found, "tenfold_engine_state", model="tiny", state="ready") == 0
    assert not [name for name, _ in found if name.startswith("tenfold_phase")]
    llm.border = {"prefill_sms": 96, "decode_sms": 36, "border_changes": 2, "prompt_chunk": 640}
    found = script.samples()
    assert value(found, "tenfold_phase_sms", model="tiny", phase="prefill") == 96
    assert value(found, "tenfold_phase_sms", model="tiny", phase="decode") == 36
    assert value(found, "tenfold_border_changes_total", model="tiny") == 2
    assert value(found, "tenfold_phase_chunk_tokens", model="tiny") == 640


def test_an_engine_without_numbers_has_a_state(script):
    script.served.llm.stats = lambda: None
    script.served.llm.state = "loading"
    found = script.samples()
    assert value(found, "tenfold_engine_state", model="tiny", state="loading") == 1
    assert ("tenfold_requests_running", frozenset({("model", "tiny")})) not in found


def test_aliases_have_vllms_names_and_our_numbers(monkeypatch):
    script = Script(monkeypatch, metrics_aliases=True)
    script.served.llm.running = 6
    watch = script.watch()
    watch.output(Output("a", 0, (7,)))
    script.now += 0.25
    watch.output(Output("a", 0, (7,), finish=FinishReason.LENGTH))
    watch.end("ok", Counts(3))
    script.metrics.responded("/v1/completions", 429, "rate_limit_exceeded", "tiny")
    found = script.samples()
    for name, labels, number in (
        ("num_requests_running", {}, 6),
        ("num_requests_waiting", {}, 2),
        ("kv_cache_usage_perc", {}, 240 / 3640),
        ("cache_config_info", {"block_size": "16", "num_gpu_blocks": "3640"}, 1),
        ("prefix_cache_queries_total", {}, 0),
        ("prefix_cache_hits_total", {}, 0),
        ("prompt_tokens_total", {}, 3),
        ("generation_tokens_total", {}, 2),
        ("request_success_total", {"finished_reason": "length"}, 1),
        ("num_preemptions_total", {}, 0),
        ("time_to_first_token_seconds_count", {}, 1),
        ("inter_token_latency_seconds_sum", {}, 0.25),
        ("request_time_per_output_token_seconds_count", {}, 1),
        ("e2e_request_latency_seconds_sum", {}, 0.25),
        ("request_queue_time_seconds_count", {}, 1),
        ("request_prefill_time_seconds_count", {}, 1),
        ("request_decode_time_seconds_bucket", {"le": "+Inf"}, 1),
        ("admission_rejections_total", {"reason": "rate_limit_exceeded"}, 1),
        ("lora_requests_info", {"max_lora": "0", "waiting_lora_adapters": "", "running_lora_adapters": ""}, 0),
    ):
        assert value(found, f"vllm:{name}", model_name="tiny", **labels) == pytest.approx(number), name


def test_an_alias_adds_up_what_it_does_not_tell_apart(monkeypatch):
    script = Script(monkeypatch, metrics_aliases=True)
    for key in ("one", "two"):
        watch = script.watch(key=key)
        watch.output(Output("a", 0, (7,)))
        watch.end("ok", Counts(3))
    assert value(script.samples(), "vllm:prompt_tokens_total", model_name="tiny") == 6


def test_no_aliases_unless_asked_for(script):
    assert not any(name.startswith("vllm:") for name, _ in script.samples())
    assert len({alias.name for alias in ALIASES}) == len(ALIASES)


# Over HTTP


def test_requests_over_http(client, llm):
    client.chat(stream=True)
    client.complete(prompt=["a", "b"], n=2)
    client.get("/nothing")
    client.get("/v1/models/tiny")
    llm.fail = QueueFull("full", 3)
    client.chat()
    found = samples(client.get("/metrics").text)
    assert value(found, "tenfold_requests_total", key="", outcome="ok", **CHAT) == 1
    assert value(found, "tenfold_requests_total", key="", outcome="overloaded", **CHAT) == 1
    assert value(found, "tenfold_generated_tokens_total", key="", **CHAT) == len(llm.answer.encode())
    assert value(found, "tenfold_rejections_total", model="tiny", reason="overloaded") == 1
    assert value(found, "tenfold_streams_open") == 0
    for endpoint, status in (
        ("/v1/chat/completions", "200"),
        ("/v1/chat/completions", "503"),
        ("/v1/models/{model:path}", "200"),
        ("other", "404"),
    ):
        assert value(found, "tenfold_http_responses_total", endpoint=endpoint, status=status) == 1


def test_who_is_turned_away_is_counted(make_client):
    client = make_client(api_key="secret")
    client.chat()
    text = client.get("/metrics", headers={"authorization": "Bearer secret"}).text
    assert value(samples(text), "tenfold_rejections_total", model="", reason="invalid_api_key") == 1
    assert client.get("/metrics").status_code == 401


def test_made_up_paths_make_no_series(client):
    for i in range(20):
        client.get(f"/made/up/{i}")
    found = samples(client.get("/metrics").text)
    assert value(found, "tenfold_http_responses_total", endpoint="other", status="404") == 20


@pytest.mark.parametrize("aliases", [False, True])
def test_both_formats_parse(make_client, aliases):
    client = make_client(metrics_aliases=aliases)
    client.chat()
    plain = client.get("/metrics")
    assert plain.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    opened = client.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
    assert opened.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    assert opened.text.endswith("# EOF\n")
    names = {family.name for family in parse_openmetrics(opened.text)}
    assert {"tenfold_requests", "tenfold_time_to_first_token_seconds", "process_cpu_seconds"} <= names
    assert ("vllm:prompt_tokens" in names) == aliases
    assert "_created" not in plain.text


def test_an_odd_accept_header_is_answered(client):
    for accept in ("application/openmetrics-text; version=x.y", "*/*", ";;,", ""):
        assert client.get("/metrics", headers={"accept": accept}).status_code == 200


def test_open_streams(llm):
    async def scenario():
        llm.gate = asyncio.Event()
        app = create_app({"tiny": llm})
        gone = asyncio.Event()
        begun = asyncio.Event()
        body = json.dumps({"model": "tiny", "prompt": "Hi", "stream": True}).encode()
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive():
            if messages:
                return messages.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            if message["type"] == "http.response.body":
                begun.set()

        scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http"}
        scope |= {"path": "/v1/completions", "raw_path": b"/v1/completions", "query_string": b"", "headers": []}
        served = asyncio.ensure_future(app(scope, receive, send))
        await asyncio.wait_for(begun.wait(), 5)
        metrics = app.state.service.metrics
        assert value(samples(metrics), "tenfold_streams_open") == 1
        gone.set()
        await asyncio.wait_for(served, 5)
        found = samples(metrics)
        assert value(found, "tenfold_streams_open") == 0
        assert value(found, "tenfold_cancel_seconds_count", model="tiny") == 1
        assert value(found, "tenfold_cancel_seconds_sum", model="tiny") >= 0

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b'{"error": {"code": "overloaded", "type": "server_error"}}', "overloaded"),
        (b'{"type": "error", "error": {"type": "rate_limit_error", "message": "x"}}', "rate_limit_error"),
        (b'{"error": "text"}', "other"),
        (b"[]", "other"),
        (b"<html>", "other"),
        (b"", "other"),
        (b'{"error": {}}', "other"),
    ],
)
def test_error_codes(body, code):
    assert error_code(body) == code


# The dashboard


def test_every_metric_of_the_dashboard_is_there(make_client, llm):
    client = make_client()
    client.chat()
    llm.stats = PagedLLM().stats
    text = client.get("/metrics").text
    there = set(re.findall(r"^([a-z_]+)[ {]", text, re.M))
    there |= {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}
    there |= {name + "_bucket" for name in there}
    board = json.loads(DASHBOARD.read_text())
    told = [t["expr"] for panel in board["panels"] for t in panel.get("targets", ())]
    told += [str(variable["query"]) for variable in board["templating"]["list"]]
    used = {name for text in told for name in re.findall(r"tenfold_[a-z_]+", text)}
    assert len(used) > 20
    assert used <= there, used - there


def test_the_dashboard_names_no_other_source():
    board = json.loads(DASHBOARD.read_text())
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    sources = {panel["datasource"]["uid"] for panel in board["panels"] if panel["type"] != "row"}
    assert sources == {"${source}"}


# What happened lately


def test_a_series_forgets():
    series = Series()
    series.add(100.2, 5)
    series.add(100.9, 2)
    series.add(102.0, 1)
    assert series.last(103.5, 5) == [0, 0, 7, 0, 1]
    assert sum(series.last(390.0)) == 8
    assert sum(series.last(400.0)) == 1  # second 100 is more than 299 s ago
    assert sum(series.last(5000.0)) == 0
    series.add(4000.0, 3)  # a clock that went back is the latest second still
    assert sum(series.last(5001.0)) == 3


def test_levels_stay_until_the_next():
    levels = Levels()
    levels.put(100.0, 3)
    levels.put(102.0, 5)
    assert levels.last(104.0, 6) == [0, 3, 3, 5, 5, 5]
    levels.put(104.5, 0)
    assert levels.last(104.9, 2) == [5, 0]
    assert set(levels.last(9000.0)) == {0}


def test_percentiles_are_of_the_window_only():
    window = Window()
    assert window.percentiles(0.0) == {"count": 0, "p50": None, "p90": None, "p99": None}
    window.add(0.0, 99.0)
    for i in range(1, 101):
        window.add(1000.0, i / 100)
    assert window.percentiles(1001.0) == {"count": 100, "p50": 0.5, "p90": 0.9, "p99": 0.99}
    for _ in range(3 * MOST):
        window.add(2000.0, 1.0)
    assert window.percentiles(2000.0)["count"] == MOST
