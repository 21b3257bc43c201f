"""Whatever a client sends, it gets OpenAI's error shape with the field that is wrong and what is allowed."""

import json

import pytest

from tenfold.engine.core import QueueFull
from tenfold.engine.loop import EngineDead
from tenfold.engine.request import FinishReason

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
USER = {"role": "user", "content": "Hi"}


def check(response, status, param=None, code=None, *words):
    body = response.json()
    assert response.status_code == status, body
    assert list(body) == ["error"]
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["param"], error["code"]) == (param, code), error
    assert error["type"] == ("invalid_request_error" if status < 500 and status != 401 else error["type"])
    for word in words:
        assert word in error["message"]
    return error["message"]


WRONG = [
    ({"temperature": "hot"}, "temperature", "invalid_type", "number"),
    ({"temperature": -1}, "temperature", "invalid_value", "-1", "0 (greedy) to 100"),
    ({"temperature": True}, "temperature", "invalid_type", "number"),
    ({"max_tokens": -5}, "max_tokens", "invalid_value", "-5"),
    ({"max_tokens": 1.5}, "max_tokens", "invalid_type", "integer"),
    ({"max_tokens": "5"}, "max_tokens", "invalid_type", "integer"),
    ({"max_completion_tokens": 0}, "max_completion_tokens", "invalid_value", "max_completion_tokens is 0"),
    ({"min_tokens": 9, "max_tokens": 4}, "min_tokens", "invalid_value", "0 to max_tokens"),
    ({"n": 0}, "n", "invalid_value", "1 to 16"),
    ({"n": 10**9}, "n", "invalid_value", "1 to 16"),
    ({"n": 10**30}, "n", "invalid_value", "1 to 16"),
    ({"top_k": 2**31}, "top_k", "invalid_value"),
    ({"max_tokens": 10**30}, "max_tokens", "invalid_value"),
    ({"top_p": 0}, "top_p", "invalid_value", "above 0"),
    ({"top_k": -1}, "top_k", "invalid_value"),
    ({"min_p": 2}, "min_p", "invalid_value"),
    ({"seed": 2**63}, "seed", "invalid_value", "64-bit"),
    ({"stop": ["a"] * 17}, "stop", "invalid_value", "16"),
    ({"stop": ""}, "stop", "invalid_value", "non-empty"),
    ({"stop": 3}, "stop", "invalid_type", "string", "array"),
    ({"stop": ["a", 3]}, "stop[1]", "invalid_type", "string"),
    ({"presence_penalty": 3}, "presence_penalty", "invalid_value"),
    ({"frequency_penalty": -3}, "frequency_penalty", "invalid_value"),
    ({"repetition_penalty": 0}, "repetition_penalty", "invalid_value"),
    ({"logit_bias": {"5": 101}}, "logit_bias", "invalid_value", "-100 to 100"),
    ({"logit_bias": {"256": 1}}, "logit_bias", "invalid_value", "0 to 255"),
    ({"logit_bias": {"five": 1}}, "logit_bias.five", "invalid_value", "integer"),
    ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias", "invalid_value"),
    ({"stop_token_ids": [-1]}, "stop_token_ids", "invalid_value", "0 to 255"),
    ({"stream": "yes"}, "stream", "invalid_type", "boolean"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value", "stream"),
    ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage", "unknown_parameter"),
    ({"priority": 2**40}, "priority", "invalid_value"),
    ({"ttft": -1}, "ttft", "invalid_value", "ttft is -1.0; allowed: seconds from 0 (the engine's) to 3600."),
    ({"tpot": 1e300}, "tpot", "invalid_value", "tpot is 1e+300; allowed: seconds"),
    ({"user": "x" * 600}, "user", "invalid_value"),
    ({"temprature": 1}, "temprature", "unknown_parameter", "temprature"),
    ({"x" * 500: 1}, "x" * 61 + "...", "unknown_parameter"),
    ({"model": "gpt-4"}, None, None),
    ({"model": 3}, "model", "invalid_type"),
]
WRONG_CHAT = [
    ({"messages": []}, "messages", "invalid_value", "at least 1"),
    ({"messages": "Hi"}, "messages", "invalid_type", "array"),
    ({"messages": [USER] * 2049}, "messages", "invalid_value"),
    ({"messages": [USER, {"role": "robot", "content": "x"}]}, "messages[1].role", "invalid_value", "'assistant'"),
    ({"messages": [{"content": "x"}]}, "messages[0].role", "missing_required_parameter"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "invalid_value", "required"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "invalid_type", "string"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
        "messages[0].content[0]",
        "unsupported_content",
        "image_url",
    ),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0]", "invalid_type"),
    ({"messages": [{"role": "user", "content": "x" * 200}]}, "messages", "context_length_exceeded", "127 tokens"),
    ({"messages": [{"role": "user", "content": "bad"}]}, "messages", "invalid_value", "does not like"),
    ({"chat_template_kwargs": {"special": 1}}, "chat_template_kwargs", "invalid_value", "'special'", "enable_thinking"),
    ({"top_logprobs": 5}, "top_logprobs", "invalid_value", "logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value", "0 to 20"),
    ({"logprobs": 5}, "logprobs", "invalid_type"),
    ({"tools": [{"type": "function"}]}, "tools[0].function", "invalid_value", "object"),
    ({"tool_choice": "required"}, "tool_choice", "invalid_value", "no tools"),
    ({"response_format": {"type": "xml"}}, "response_format.type", "invalid_value", "json_schema"),
    ({"modalities": ["text", "audio"]}, "modalities", "unsupported_parameter"),
    ({"prompt": "x"}, "prompt", "unknown_parameter"),
]
WRONG_TEXT = [
    ({"prompt": ""}, "prompt", "invalid_value", "empty"),
    ({"prompt": []}, "prompt", "invalid_value", "empty"),
    ({"prompt": ["a", ""]}, "prompt", "invalid_value", "empty"),
    ({"prompt": [[]]}, "prompt", "invalid_value", "empty"),
    ({"prompt": ["a"] * 65}, "prompt", "invalid_value", "64"),
    ({"prompt": [[1], "a"]}, "prompt", "invalid_type"),
    ({"prompt": [1, 256]}, "prompt", "invalid_value", "0 to 255"),
    ({"prompt": [-1]}, "prompt", "invalid_value", "-1"),
    ({"prompt": {"a": 1}}, "prompt", "invalid_type"),
    ({"prompt": "x" * 128}, "prompt", "context_length_exceeded", "128 tokens"),
    ({"suffix": "}"}, "suffix", "unsupported_parameter", "suffix"),
    ({"best_of": 3}, "best_of", "unsupported_parameter"),
    ({"logprobs": True}, "logprobs", "invalid_type", "integer"),
    ({"logprobs": 21}, "logprobs", "invalid_value", "0 to 20"),
    ({"messages": [USER]}, "messages", "unknown_parameter"),
]


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize(("fields", "param", "code", "words"), [(f, p, c, w) for f, p, c, *w in WRONG])
def test_wrong_field(client, llm, path, fields, param, code, words):
    if code == "context_length_exceeded" and path == CHAT:
        return
    if "max_completion_tokens" in fields and path == TEXT:
        param, code, words = "max_completion_tokens", "unknown_parameter", []
    response = client.post(path, ({"messages": [USER]} if path == CHAT else {"prompt": "Hi"}) | fields)
    if fields.get("model") == "gpt-4":
        check(response, 404, "model", "model_not_found", "'gpt-4'", "'tiny'")
    else:
        check(response, 400, param, code, *words)
    assert llm.calls == []


@pytest.mark.parametrize(("fields", "param", "code", "words"), [(f, p, c, w) for f, p, c, *w in WRONG_CHAT])
def test_wrong_chat_field(client, llm, fields, param, code, words):
    response = client.chat(**fields)
    found = response.json()["error"]["param"]
    assert response.status_code == 400
    assert found.startswith(param)
    check(response, 400, found, code, *words)
    assert llm.calls == []


@pytest.mark.parametrize(("fields", "param", "code", "words"), [(f, p, c, w) for f, p, c, *w in WRONG_TEXT])
def test_wrong_completion_field(client, llm, fields, param, code, words):
    response = client.complete(**fields)
    found = response.json()["error"]["param"]
    assert response.status_code == 400, response.text
    assert found.startswith(param)
    check(response, 400, found, code, *words)
    assert llm.calls == []


@pytest.mark.parametrize(("path", "field"), [(CHAT, "messages"), (TEXT, "prompt"), (CHAT, "model"), (TEXT, "model")])
def test_missing_field(client, path, field):
    body = {"model": "tiny", "messages" if path == CHAT else "prompt": [USER] if path == CHAT else "Hi"}
    del body[field]
    check(client.request("POST", path, json=body), 400, field, "missing_required_parameter", field)


BROKEN = [
    b"",
    b"{",
    b'{"model": tiny}',
    b'{"model": "tiny", "prompt": "a",}',
    b'{"model": "tiny", "prompt": "\xff"}',
    b'{"model": "tiny", "prompt": "\\ud800"}',
    b'{"model": "tiny", "prompt": "\\ud83d \\ude00"}',
    b'{"model": "tiny", "prompt": "\xed\xa0\x80"}',
    b'{"model": "tiny", "prompt": "a\x00b"}',
    b'{"model": "tiny", "prompt": "\\x41"}',
    b'{"model": "tiny", "prompt": "\\u12"}',
    b"\xef\xbb\xbf{}",
    "{}".encode("utf-16"),
    b"\x00\x01\x02",
]
DEEP = [b"[" * 65, b'{"a":' * 5000, b"[" * 1_000_000, b'{"model": "tiny", "prompt": ' + b"[" * 64 + b"]" * 64 + b"}"]


@pytest.mark.parametrize("body", BROKEN, ids=range(len(BROKEN)))
@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_broken_json(client, path, body):
    check(client.request("POST", path, content=body), 400, None, "invalid_json", "not valid JSON")


@pytest.mark.parametrize("body", DEEP, ids=range(len(DEEP)))
@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_deep_nesting(client, path, body):
    check(client.request("POST", path, content=body), 400, None, "json_too_deep", "64 levels", "--max-json-depth")


@pytest.mark.parametrize("body", [b"[]", b"null", b"3", b'"x"'])
def test_json_that_is_no_object(client, body):
    check(client.request("POST", CHAT, content=body), 400, None, "invalid_type", "object")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("field", ["temperature", "top_p", "frequency_penalty", "logit_bias"])
def test_numbers_that_are_none(client, field, number):
    value = f'{{"5": {number}}}' if field == "logit_bias" else number
    body = f'{{"model": "tiny", "prompt": "a", "{field}": {value}}}'
    response = client.request("POST", TEXT, content=body)
    error = response.json()["error"]
    assert (response.status_code, error["type"]) == (400, "invalid_request_error")


def test_paths_and_methods(client):
    check(client.get("/nothing"), 404, None, "not_found", "/nothing")
    check(client.get(CHAT), 405, None, "method_not_allowed", "GET")
    check(client.request("PUT", "/v1/models"), 405, None, "method_not_allowed", "PUT")
    check(client.get("/v1/models/other"), 404, "model", "model_not_found", "'other'")
    check(client.get("/docs"), 404, None, "not_found")


def test_body_too_large(make_client, llm):
    client = make_client(max_body=1024)
    huge = json.dumps({"model": "tiny", "prompt": "x" * 2000}).encode()
    check(client.request("POST", TEXT, content=huge), 413, None, "request_too_large", "1024 bytes")

    async def chunks():
        for _ in range(100):
            yield b" " * 512

    check(client.request("POST", TEXT, content=chunks()), 413, None, "request_too_large")
    assert llm.calls == []


def test_wrong_content_length(client):
    headers = {"content-length": "many"}
    check(client.request("POST", TEXT, content=b"{}", headers=headers), 400, None, "invalid_header", "Content-Length")


class Boom(Exception):
    pass


def test_failing_engine_does_not_tell_its_secrets(client, llm):
    llm.fail = Boom("secret path /srv/x")
    message = check(client.complete(), 500, None, "internal_error", "log")
    assert "secret" not in message


def test_failing_server_does_not_tell_its_secrets(client, llm, monkeypatch):
    monkeypatch.setattr(llm, "chat_prompt", lambda *a, **k: 1 / 0)
    message = check(client.chat(), 500, None, "internal_error", "log")
    assert "zero" not in message


def test_refusal_of_the_engine_is_a_400(client, llm):
    llm.fail = ValueError("The prompt is not to my taste.")
    check(client.complete(), 400, None, "invalid_value", "taste")
    check(client.complete(stream=True), 400, None, "invalid_value", "taste")


def test_dead_engine(client, llm):
    llm.fail = EngineDead("The engine failed: secret")
    for stream in (False, True):
        message = check(client.chat(stream=stream), 503, None, "engine_dead", "restart")
        assert "secret" not in message


def test_full_queue(client, llm):
    llm.fail = QueueFull("The queue is full: 9 requests wait.", 7)
    for stream in (False, True):
        response = client.chat(stream=stream)
        check(response, 503, None, "overloaded", "queue is full")
        assert response.headers["retry-after"] == "7"


def test_refusal_of_the_tokenizer_is_a_400(client, llm, monkeypatch):
    def encode(text):
        raise ValueError("The text is not to be encoded.")

    monkeypatch.setattr(llm, "encode", encode)
    check(client.complete(), 400, "prompt", "invalid_value", "encoded")


def test_error_of_the_engine_ends_the_request(client, llm):
    llm.finish = FinishReason.ERROR
    check(client.complete(), 500, None, "internal_error")


def test_error_in_a_stream_is_its_last_event(client, llm, read_events):
    llm.fail, llm.fail_after = Boom("secret"), 3
    events = read_events(client.complete(stream=True))
    assert set(events[-1]) == {"error"}
    assert events[-1]["error"]["code"] == "internal_error"
    assert "secret" not in str(events)
    assert "".join(e["choices"][0]["text"] for e in events[:-1]) == llm.answer[:2]


def test_time_limit(make_client, llm):
    llm.finish = FinishReason.ABORT
    client = make_client(request_timeout=1e-9)
    check(client.complete(), 504, None, "timeout", "--request-timeout")
    assert llm.calls[0]["deadline"] is not None
