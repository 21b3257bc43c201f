"""The line for each request, and the request of every other line."""

import asyncio
import logging

import pytest

from tenfold.serve.logs import RequestLog, request_fields

KEY = "sk-of-these-tests"


@pytest.fixture
def lines(caplog):
    """The fields of the lines for requests so far."""
    caplog.set_level(logging.INFO, "tenfold.access")
    return lambda: [(r.getMessage(), r.fields) for r in caplog.records if r.name == "tenfold.access"]


def test_a_line_for_each_request(make_client, lines):
    client = make_client({"authorization": f"Bearer {KEY}", "x-request-id": "mine"}, access_log=True, api_key=KEY)
    answer = client.complete(prompt="private words")
    client.get("/no/such?api_key=private")
    (said, fields), (_, other) = lines()
    assert said.startswith("POST /v1/completions 200 ")
    assert fields["request_id"] == answer.headers["x-request-id"]
    assert fields["client_request_id"] == "mine"
    assert fields["model"] == "tiny"
    assert (fields["prompt_tokens"], fields["completion_tokens"]) == (13, 8)
    assert fields["key"]
    assert fields["ms"] >= 0
    assert other["path"] == "/no/such"
    assert other["status"] == 404
    assert "private" not in repr(lines())
    assert KEY not in repr(lines())


def test_refusals_have_lines_too(make_client, lines):
    make_client(access_log=True, api_key=KEY).complete()
    ((_, fields),) = lines()
    assert fields["status"] == 401


def test_no_lines_unless_asked_for(client, lines):
    client.complete()
    assert lines() == []


def test_other_lines_name_the_request(client, llm, monkeypatch):
    found = []
    encode = llm.encode

    def seen(text):
        found.append(request_fields())
        return encode(text)

    monkeypatch.setattr(llm, "encode", seen)
    answer = client.complete()
    assert found[0]["request_id"] == answer.headers["x-request-id"]
    assert request_fields() == {}


def test_requests_of_one_time_are_not_confused(client, llm):
    seen = []

    async def one(number):
        sent = {"state": {"request_id": str(number)}, "type": "http", "method": "GET"}

        async def app(scope, receive, send):
            await asyncio.sleep(0)
            seen.append((scope["state"]["request_id"], request_fields()["request_id"]))

        await RequestLog(app, False)(sent, None, None)

    async def all_of_them():
        await asyncio.gather(*(one(number) for number in range(5)))

    asyncio.run(all_of_them())
    assert all(given == found for given, found in seen)
    assert len(seen) == 5
