"""Requests that no client should send, for every endpoint that reads a body, and a way to throw them at a server.

Invariant: a seed makes the same requests everywhere. None asks for a long answer by intention, so that what is measured
is how they are refused.
"""

import http.client
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

Headers = dict[str, str]
QUESTIONS = (
    {"type": "predicate", "instructions": "Is it good?"},
    {"type": "choice", "instructions": "Which?", "choices": [{"value": "a"}, {"value": "b"}]},
)
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
USER = [{"role": "user", "content": "Hi"}]

# A body of each endpoint that asks for little; what it asks for is then made wrong in one way or another.
BODIES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("/v1/chat/completions", {"messages": USER, "max_tokens": 1, "temperature": 0.5, "stop": ["x"]}),
    ("/v1/chat/completions", {"messages": USER, "max_tokens": 1, "tools": [TOOL], "tool_choice": "auto"}),
    ("/v1/chat/completions", {"messages": USER, "max_tokens": 1, "n": 2, "logprobs": True, "top_logprobs": 2}),
    ("/v1/chat/completions", {"messages": USER, "max_tokens": 1, "response_format": {"type": "json_object"}}),
    ("/v1/completions", {"prompt": "Hi", "max_tokens": 1, "logit_bias": {"5": 1}, "seed": 3}),
    ("/v1/completions", {"prompt": [[1, 2], [3]], "max_tokens": 1, "stream": True, "echo": True, "logprobs": 1}),
    ("/v1/responses", {"input": "Hi", "max_output_tokens": 1, "text": {"format": {"type": "text"}}}),
    ("/v1/responses", {"input": [{"role": "user", "content": "Hi"}], "max_output_tokens": 1, "store": False}),
    ("/v1/responses/input_tokens", {"input": "Hi"}),
    ("/v1/messages", {"messages": USER, "max_tokens": 1, "system": "Be brief.", "stop_sequences": ["x"]}),
    ("/v1/messages", {"messages": USER, "max_tokens": 1, "tools": [{"name": "f", "input_schema": {"type": "object"}}]}),
    ("/v1/messages/count_tokens", {"messages": USER}),
    ("/v1/embeddings", {"input": ["a", "b"], "encoding_format": "base64"}),
    ("/v1/decisions", {"input": "Hi", "questions": QUESTIONS}),
    ("/v1/classify", {"input": ["good", "bad"], "labels": ["praise", "blame"]}),
    ("/tokenize", {"prompt": "Hi", "add_special_tokens": True}),
    ("/detokenize", {"tokens": [1, 2, 3]}),
)
LENGTHS = frozenset({"max_tokens", "max_output_tokens"})  # stay as they are, or every answer would be a long one
OTHERS = ("top_p", "top_k", "user", "priority", "é", "")
NAMES = (*sorted({name for _, body in BODIES for name in body} - LENGTHS), *OTHERS)
# As they stand in JSON, or where JSON should.
VALUES = (
    *("null", "true", "[]", "{}", '""', "0", "-1", "-0", "1e999", "-1e999", "1e-999", "NaN", "Infinity", "-Infinity"),
    *("9223372036854775808", "-9223372036854775809", "1" + "0" * 400, "9" * 5000, "0.1e1", "1.5", "01", "+1", ".5"),
    *('"\\ud800"', '"\\udc00\\ud800"', '"\\u0000"', '"\\u12"', '"\\x41"', '"a\x00b"', '"' + "x" * 5000 + '"', "'a'"),
    *('"﷽﷽"', '"\u202e\u2028"', '["a", 1, null]', "[[[[[[1]]]]]]", '{"a": {"b": {"c": []}}}', '{"": ""}', "undefined"),
    *("[" * 70 + "]" * 70, '{"a":' * 70 + "1" + "}" * 70, "[" * 9000, '[{"type": "text"}]', '{"type": "object"}', "\\"),
    *('{"type": "json_schema", "json_schema": {"name": "a", "schema": {"$ref": "#"}}}', '{"type": "regex"}'),
    *('[{"role": "tool", "content": null}]', '[{"role": "assistant", "tool_calls": [{}]}]', "-1e308", "4e15", '"(((("'),
)
GARBAGE = (b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\x00", b"\xef\xbb\xbf", b"{", b"}", b'"', b"\\", b",", b":", b"]")
TYPES = ("application/json", "text/plain", "multipart/form-data; boundary=x", "application/x-www-form-urlencoded", "")


@dataclass(frozen=True, slots=True)
class Malformed:
    """One request. model: which was put into it, so that the rest is what is wrong."""

    path: str
    headers: Headers
    body: bytes


def malformed(seed: int, count: int, model: str = "default") -> Iterator[Malformed]:
    """`count` requests; each is wrong in one to three ways, few of them so little that it is right again."""
    rng = random.Random(seed)
    for _ in range(count):
        path, valid = rng.choice(BODIES)
        fields = {name: json.dumps(value) for name, value in ({"model": model} | valid).items()}
        for _ in range(rng.choice((0, 1, 1, 2))):
            rng.choice(FIELD_WAYS)(rng, fields)
        text = "{" + ", ".join(f"{json.dumps(name)}: {value}" for name, value in fields.items()) + "}"
        body = text.encode("utf-8", "surrogatepass")
        if rng.random() < 0.4:
            body = rng.choice(BYTE_WAYS)(rng, body)
        yield Malformed(path, {"content-type": rng.choice(TYPES)}, body)


def _replace(rng: random.Random, fields: dict[str, str]) -> None:
    if names := [name for name in fields if name not in LENGTHS]:
        fields[rng.choice(names)] = rng.choice(VALUES)


def _add(rng: random.Random, fields: dict[str, str]) -> None:
    fields[rng.choice(NAMES)] = rng.choice(VALUES)


def _remove(rng: random.Random, fields: dict[str, str]) -> None:
    if names := [name for name in fields if name not in LENGTHS]:
        del fields[rng.choice(names)]


def _inside(rng: random.Random, fields: dict[str, str]) -> None:
    """Make something within a value wrong."""
    name = rng.choice(list(fields))
    value = fields[name]
    places = [i for i, c in enumerate(value) if c in '"[]{}:,0123456789'] if name not in LENGTHS else []
    if places:
        place = rng.choice(places)
        fields[name] = value[:place] + rng.choice(VALUES)[:200] + value[place + rng.choice((0, 1)) :]


def _cut(rng: random.Random, body: bytes) -> bytes:
    return body[: rng.randrange(len(body))]


def _flip(rng: random.Random, body: bytes) -> bytes:
    flipped = bytearray(body)
    for _ in range(rng.randint(1, 4)):
        flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
    return bytes(flipped)


def _insert(rng: random.Random, body: bytes) -> bytes:
    place = rng.randrange(len(body) + 1)
    return body[:place] + rng.choice(GARBAGE) * rng.choice((1, 1, 3, 100)) + body[place:]


def _noise(rng: random.Random, body: bytes) -> bytes:
    return rng.randbytes(rng.randrange(200))


def _encode(rng: random.Random, body: bytes) -> bytes:
    return body.decode("utf-8", "replace").encode(rng.choice(("utf-16", "utf-32-be", "utf-8-sig")))


def _wrap(rng: random.Random, body: bytes) -> bytes:
    before, after = rng.choice(((b"[", b"]"), (b"", b"x"), (b"", b"{}"), (b"\n\t ", b"\n"), (b'"', b'"'), (b"//", b"")))
    return before + body + after


FIELD_WAYS: tuple[Callable[[random.Random, dict[str, str]], None], ...] = (_replace, _replace, _add, _remove, _inside)
BYTE_WAYS: tuple[Callable[[random.Random, bytes], bytes], ...] = (_cut, _flip, _insert, _noise, _encode, _wrap)


def wrong_answer(path: str, status: int, body: bytes) -> str:
    """Why an answer is not what a bad request may get; empty where it is. 4xx is right in the API's error shape, and so
    is 200: not every change breaks a request. A 503 says that the server is busy, which is not about the request."""
    if status < 400 or status == 503:
        return ""
    if status >= 500:
        return f"status {status}"
    try:
        said = json.loads(body)
        error = said["error"]
        right = isinstance(error["message"], str) and isinstance(error["type"], str)
        if path.startswith("/v1/messages"):
            right = right and said["type"] == "error"
        else:
            right = right and set(error) == {"message", "type", "param", "code"}
    except (ValueError, KeyError, TypeError):
        right = False
    return "" if right else f"status {status} without the shape of an error"


@dataclass(slots=True)
class Tally:
    """What came of requests: how many had each status; of those answered wrongly, why and the request; of those that
    got no answer, the error."""

    statuses: Counter[int] = field(default_factory=Counter)
    wrong: list[tuple[str, Malformed]] = field(default_factory=list)
    lost: list[tuple[str, Malformed]] = field(default_factory=list)

    def add(self, request: Malformed, status: int, body: bytes) -> None:
        self.statuses[status] += 1
        if why := wrong_answer(request.path, status, body):
            self.wrong.append((why, request))

    def __str__(self) -> str:
        counts = " · ".join(f"{status}: {count}" for status, count in sorted(self.statuses.items()))
        return f"{counts} · wrong: {len(self.wrong)} · lost: {len(self.lost)}"


def throw(url: str, count: int = 10_000, seed: int = 0, key: str = "", timeout: float = 60.0) -> Tally:
    """Send `count` malformed requests to the server at `url`, one after the other on as few connections as it allows.

    timeout: seconds to wait for an answer.
    """
    place = urlsplit(url)
    connection = http.client.HTTPConnection(place.hostname or "127.0.0.1", place.port or 80, timeout=timeout)
    authorization = {"authorization": f"Bearer {key}"} if key else {}
    tally = Tally()
    for request in malformed(seed, count):
        try:
            connection.request("POST", request.path, request.body, request.headers | authorization)
            answer = connection.getresponse()
            tally.add(request, answer.status, answer.read())
        except (OSError, http.client.HTTPException) as error:
            tally.lost.append((repr(error), request))
            connection.close()
    connection.close()
    return tally
