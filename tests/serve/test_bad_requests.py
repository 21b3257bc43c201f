"""Claim S6: whatever is wrong with a request, every endpoint that takes one says so with a 4xx in its API's shape."""

import json

import pytest

from tenfold.bench.malformed import BODIES, wrong_answer

KEY, ADMIN = "sk-tenfold-0123456789", "sk-admin-0123456789ab"
VALID = dict(reversed(BODIES))
READING = sorted(VALID)
BODILESS = ["/v1/responses/resp_1/cancel", "/v1/responses/compact"]
OF_ADMIN = [f"/admin/{what}" for what in ("drain", "resume", "restart", "dump", "log_level")]


def text_of(path, **fields):
    return json.dumps({"model": "tiny"} | VALID[path] | fields)


def check(response, path, *statuses):
    assert response.status_code in statuses, response.text
    assert wrong_answer(path, response.status_code, response.content) == ""
    assert response.headers["x-request-id"].startswith("req-")
    assert len(response.content) < 2000


@pytest.mark.parametrize("header", [{}, {"authorization": "Bearer wrong"}, {"x-api-key": "wrong"}], ids=str)
@pytest.mark.parametrize("path", READING + BODILESS + OF_ADMIN)
def test_missing_or_wrong_key(make_client, llm, path, header):
    client = make_client(header, api_key=KEY, admin_key=ADMIN)
    for body in (b"", b"{", b"x" * 100):
        check(client.request("POST", path, content=body), path, 401)
    assert llm.calls == []


BAD = {
    "oversized": lambda path: text_of(path, user="x" * 3000),
    "deep": lambda path: text_of(path)[:-1] + ', "metadata": ' + '{"a":' * 80 + "1" + "}" * 80 + "}",
    "deep and unfinished": lambda path: text_of(path)[:-1] + ', "metadata": ' + "[" * 2500,
    "invalid UTF-8": lambda path: text_of(path, user="?").encode().replace(b"?", b"\xff\xfe"),
    "encoded surrogate": lambda path: text_of(path, user="?").encode().replace(b"?", b"\xed\xa0\x80"),
    "lone surrogate": lambda path: text_of(path, user="\ud800"),
    "surrogates the wrong way round": lambda path: text_of(path, user="\ude00\ud83d"),
    "raw NUL": lambda path: text_of(path, user="?").replace("?", "\x00"),
    "raw newline in a string": lambda path: text_of(path, user="?").replace("?", "\n"),
    "negative n": lambda path: text_of(path, n=-1),
    "huge n": lambda path: text_of(path, n=10**9),
    "n beyond 64 bits": lambda path: text_of(path, n=10**30),
    "n of 1,500 digits": lambda path: text_of(path)[:-1] + ', "n": ' + "9" * 1500 + "}",
    "negative length": lambda path: text_of(path, max_tokens=-5, max_output_tokens=-5),
    "NaN": lambda path: text_of(path, temperature=float("nan")),
    "infinity": lambda path: text_of(path, temperature=float("inf")),
    "minus infinity": lambda path: text_of(path, top_p=float("-inf")),
    "beyond a double": lambda path: text_of(path)[:-1] + ', "temperature": 1e999}',
    "infinity to aim at": lambda path: text_of(path, ttft=float("inf")),
    "a time to aim at beyond a double": lambda path: text_of(path)[:-1] + ', "tpot": 1e999}',
    "a number as text": lambda path: text_of(path, max_tokens="5", max_output_tokens="5"),
    "a model that is none": lambda path: text_of(path, model=["tiny"]),
    "another model": lambda path: text_of(path, model="gpt-4\u202e\x00" * 30),
    "unknown field": lambda path: text_of(path, **{"x" * 300: 1}),
    "no object": lambda path: f"[{text_of(path)}]",
    "nothing": lambda path: "",
    "half of it": lambda path: text_of(path)[: len(text_of(path)) // 2],
    "more than it": lambda path: text_of(path) + "}",
    "UTF-16": lambda path: text_of(path).encode("utf-16"),
    "form": lambda path: "model=tiny&prompt=Hi",
}


@pytest.mark.parametrize("path", READING)
@pytest.mark.parametrize("name", BAD)
def test_bad_bodies(make_client, llm, path, name):
    client = make_client({"x-api-key": KEY}, api_key=KEY, max_body=2048)
    body = BAD[name](path)
    body = body if isinstance(body, bytes) else body.encode("utf-8", "surrogatepass")
    check(client.request("POST", path, content=body), path, 400, 404, 413)
    assert llm.calls == []


def test_the_bodies_are_bad_and_not_their_frame(make_client):
    """Those of the other endpoints need a real tokenizer; test_malformed sends them all."""
    client = make_client({"x-api-key": KEY}, api_key=KEY, max_body=2048)
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"):
        assert client.request("POST", path, content=text_of(path)).status_code == 200
