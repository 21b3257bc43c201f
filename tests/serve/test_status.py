"""GET /status, and the files of the page."""

import re

import pytest

import tenfold
from tenfold.serve.app import create_app
from tenfold.serve.routes.status import KINDS, WEB
from tenfold.serve.settings import ServeConfig
from tenfold.serve.window import SPAN
from tests.serve.conftest import Client
from tests.web.fake import CHOICES, MEMORY, PagedLLM


@pytest.fixture
def paged():
    return PagedLLM()


@pytest.fixture
def page(paged):
    return Client(create_app({"tiny": paged, "other": PagedLLM()}, ServeConfig()))


def test_what_it_says_of_the_server(page):
    told = page.get("/status")
    assert told.headers["cache-control"] == "no-store"
    body = told.json()
    assert body["version"] == tenfold.__version__
    assert body["uptime_seconds"] >= 0
    assert body["draining"] is False
    assert body["rejections"] == {}
    assert [model["name"] for model in body["models"]] == ["tiny", "other"]
    page.app.state.service.draining = True
    assert page.get("/status").json()["draining"] is True


def test_what_it_says_of_a_model(page, paged):
    paged.restarts, paged.state = 1, "restarting"
    page.chat()
    model = page.get("/status").json()["models"][0]
    assert (model["state"], model["restarts"]) == ("restarting", 1)
    assert model["stats"]["running"] == 0
    assert model["requests"] == {"ok": 1}
    assert model["prefix_hit_rate"] == paged.hits / paged.prompts
    assert model["latency"]["ttft"]["count"] == model["latency"]["tpot"]["count"] == 1
    assert 0 < model["latency"]["ttft"]["p50"] == model["latency"]["ttft"]["p99"]
    assert model["facts"]["kernels_reason"] == "compiled for AVX-512 VNNI"
    assert model["facts"]["kv_dtype"] == "float16"
    assert model["memory"] == MEMORY
    assert model["timeline"][0] == {"phase": "open", "seconds": 0.02}
    assert model["choices"] == list(CHOICES)


def test_charts_and_bars(page, paged):
    paged.running = 3
    model = page.get("/status").json()["models"][0]
    lines = {line["name"]: line["values"] for chart in model["charts"] for line in chart["lines"]}
    assert {len(values) for values in lines.values()} == {SPAN - 1}
    assert lines["running"][-1] == 3
    (bar,) = model["bars"]
    assert {part["name"]: part["value"] for part in bar["parts"]} == {"used": 120, "cached": 700, "free": 2820}


def test_the_border_between_phases_is_charted_and_explained(page, paged):
    assert "Multiprocessors" not in [chart["title"] for chart in page.get("/status").json()["models"][0]["charts"]]
    paged.border = {"prefill_sms": 96, "decode_sms": 36, "border_changes": 2, "border_why": "tokens came too slowly"}
    chart, chunk = page.get("/status").json()["models"][0]["charts"][-2:]
    assert chart["title"] == "Multiprocessors"
    assert chart["note"] == "tokens came too slowly; the border moved 2 times"
    assert {line["name"]: line["values"][-1] for line in chart["lines"]} == {"prompts": 96, "answers": 36}
    assert (chunk["title"], chunk["note"]) == ("Prompts in a step of answers", "prompts have a lane of their own")
    paged.border = {"prefill_sms": 132, "decode_sms": 132, "prompt_chunk": 768}
    chunk = page.get("/status").json()["models"][0]["charts"][-1]
    assert chunk["note"] == "up to 768 tokens now"
    assert [line["values"][-1] for line in chunk["lines"]] == [768]


def test_levels_fall_when_nothing_runs_any_more(page, paged):
    """Though nobody looks, and no more tokens come."""
    page.chat()
    levels = page.app.state.service.metrics.recent["tiny"].levels["running"]
    assert levels.values[levels.second % SPAN] == paged.running == 0


def test_tokens_show_once_their_second_is_over(page, monkeypatch):
    page.chat()
    recent = page.app.state.service.metrics.recent["tiny"]
    assert sum(recent.generated.last(recent.generated.second + 1)) > 0


def test_brief_leaves_out_what_stays_the_same(page):
    whole, brief = (page.get(f"/status{query}").json()["models"][0] for query in ("", "?brief=1"))
    assert set(whole) - set(brief) == {"facts", "memory", "timeline", "choices"}
    assert "facts" in page.get("/status?brief=0").json()["models"][0]


def test_a_model_that_says_little_of_itself(client):
    model = client.get("/status").json()["models"][0]
    assert (model["state"], model["stats"], model["prefix_hit_rate"], model["choices"]) == ("ready", None, None, [])


def test_refusals_are_told(make_client):
    client = make_client(api_key="secret")
    client.chat()
    body = client.get("/status", headers={"authorization": "Bearer secret"}).json()
    assert body["rejections"] == {"invalid_api_key": 1}
    assert body["models"][0]["rejections"] == {}


# The page


@pytest.mark.parametrize("path", ["/", *(f"/web/{name}" for name in KINDS)])
def test_files_are_served_strictly(client, path):
    answer = client.get(path)
    assert answer.status_code == 200
    policy = answer.headers["content-security-policy"]
    for rule in ("default-src 'none'", "script-src 'self'", "connect-src 'self'", "frame-ancestors 'none'"):
        assert rule in policy
    assert "unsafe" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"] == "private, no-cache"
    again = client.get(path, headers={"if-none-match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize("path", ["/web/", "/web/x.js", "/web/../app.py", "/web/%2e%2e/app.py", "/web/index.html/x"])
def test_nothing_else_is_served(client, path):
    assert client.get(path).status_code == 404


def test_the_page_can_be_turned_off(make_client):
    client = make_client(status_page=False)
    assert client.get("/").status_code == client.get("/web/app.js").status_code == 404
    assert client.get("/status").status_code == 200


@pytest.mark.parametrize("path", ["/", "/web/app.js", "/status"])
def test_all_of_it_needs_the_key(make_client, path):
    assert make_client(api_key="secret").get(path).status_code == 401


def test_every_file_of_the_folder_is_served_and_asks_nobody_else():
    assert {path.name for path in WEB.iterdir()} == set(KINDS)
    for path in WEB.iterdir():
        text = path.read_text().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|//cdn|@import|innerHTML|outerHTML|insertAdjacentHTML|\beval\(", text), (
            path.name
        )


def test_no_script_or_style_stands_in_the_markup():
    text = (WEB / "index.html").read_text()
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script>", text)
