"""/health, /ready and /version in every state of engines and server."""

import asyncio

import httpx
import pytest

import tenfold
from tenfold.serve.app import create_app
from tenfold.serve.routes.health import WhileLoading
from tenfold.serve.settings import ServeConfig


@pytest.fixture
def two(llm, make_client):
    """A client of a server of two models, and the two."""
    other = type(llm)()
    client = make_client()
    client.app = create_app({"tiny": llm, "other": other}, ServeConfig())
    return client, llm, other


def test_ready_says_what_it_waits_for(two):
    client, _, other = two
    assert client.get("/ready").json() == {"status": "ready", "models": {"tiny": "ready", "other": "ready"}}
    other.state = "restarting"
    answer = client.get("/ready")
    assert answer.status_code == 503
    assert answer.headers["retry-after"]
    assert answer.json()["models"] == {"tiny": "ready", "other": "restarting"}
    assert "other is restarting" in answer.json()["error"]["message"]
    assert client.get("/health").json() == {"status": "ok"}
    other.state = "ready"
    assert client.get("/ready").status_code == 200


def test_an_engine_that_failed_for_good_is_not_healthy(two):
    client, llm, _ = two
    llm.state, llm.alive = "failed", False
    assert client.get("/health").status_code == 503
    assert client.get("/ready").json()["models"]["tiny"] == "failed"


def test_draining_is_not_ready_but_healthy(two):
    client, *_ = two
    client.app.state.service.draining = True
    assert client.get("/ready").status_code == 503
    assert client.get("/ready").json()["error"]["code"] == "not_ready"
    assert client.get("/health").status_code == 200


def test_keys_guard_the_version_and_nothing_else(make_client):
    client = make_client(api_key="k")
    assert client.get("/health").status_code == 200
    assert client.get("/ready").status_code == 200
    assert client.get("/version").status_code == 401
    assert make_client().get("/version").json() == {"version": tenfold.__version__}


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [("/health", 200, None), ("/ready", 503, "not_ready"), ("/v1/models", 503, "overloaded")],
)
def test_while_models_load(path, status, code):
    async def ask():
        transport = httpx.ASGITransport(WhileLoading(["a", "b"]))
        async with httpx.AsyncClient(transport=transport, base_url="http://t") as client:
            return await client.get(path)

    answer = asyncio.run(ask())
    assert answer.status_code == status
    assert answer.json().get("error", {}).get("code") == code
    if path == "/ready":
        assert answer.json()["models"] == {"a": "loading", "b": "loading"}
    if status == 503:
        assert int(answer.headers["retry-after"]) > 0
