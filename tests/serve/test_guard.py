"""What stands before the routes: keys, names of the server, other sites' pages, caps, and what a response carries."""

import asyncio
import base64
import logging

import pytest

from tenfold.serve.app import create_app
from tenfold.serve.routes.health import WhileLoading
from tenfold.serve.settings import ServeConfig

KEY = "sk-tenfold-0123456789"
ADMIN = "sk-admin-0123456789ab"
PATHS = [
    ("GET", "/v1/models"),
    ("POST", "/v1/chat/completions"),
    ("GET", "/openapi.json"),
    ("GET", "/metrics"),
    ("GET", "/"),
    ("GET", "/nothing"),
    ("PUT", "/v1/models"),
    ("GET", "/admin"),
    ("POST", "/admin/drain"),
    ("GET", "/health/"),
    ("GET", "//health"),
    ("GET", "/health/../v1/models"),
    ("OPTIONS", "/v1/models"),
]
WRONG_KEYS = [
    {},
    {"authorization": "Bearer wrong"},
    {"authorization": "Bearer"},
    {"authorization": f"Bearer {KEY}x"},
    {"authorization": f"Bearer {KEY[:-1]}"},
    {"authorization": KEY},
    {"authorization": f"Digest {KEY}"},
    {"authorization": b"Bearer \xff\xfe"},
    {"authorization": "Basic !!!"},
    {"authorization": "Basic " + base64.b64encode(f"{KEY}:".encode()).decode()},
    {"x-api-key": "wrong"},
    {"cookie": f"api_key={KEY}"},
]


def bearer(key=KEY):
    return {"authorization": f"Bearer {key}"}


def basic(key=KEY, user="me"):
    return {"authorization": "Basic " + base64.b64encode(f"{user}:{key}".encode()).decode()}


def error_of(response, status, code):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    return error["message"]


# Keys


@pytest.mark.parametrize(("method", "path"), PATHS)
@pytest.mark.parametrize("header", WRONG_KEYS, ids=range(len(WRONG_KEYS)))
def test_every_path_needs_a_key(make_client, method, path, header):
    response = make_client(header, api_key=KEY, admin_key=ADMIN).request(method, path)
    error_of(response, 401, "invalid_api_key")
    assert response.json()["error"]["type"] == "authentication_error"
    assert response.headers["www-authenticate"] == "Bearer"


def test_a_key_in_the_address_is_none(make_client):
    client = make_client(api_key=KEY)
    error_of(client.get(f"/v1/models?api_key={KEY}&key={KEY}"), 401, "invalid_api_key")


@pytest.mark.parametrize(
    "header",
    [
        bearer(),
        {"authorization": f"bearer  {KEY}"},
        {"x-api-key": KEY},
        basic(),
        basic(user=""),
        bearer("EMPTY") | {"x-api-key": KEY},
        bearer() | {"x-api-key": "EMPTY"},
    ],
    ids=range(7),
)
def test_the_key_opens(make_client, header):
    client = make_client(header, api_key=f"sk-other-0123456789,{KEY}")
    assert client.get("/v1/models").status_code == 200
    assert client.chat().status_code == 200
    error_of(client.get("/nothing"), 404, "not_found")


@pytest.mark.parametrize(
    ("method", "path", "accept", "scheme"),
    [
        ("GET", "/", "text/html,*/*", 'Basic realm="Tenfold"'),
        ("GET", "/", "*/*", "Bearer"),
        ("GET", "/v1/models", "text/html", "Bearer"),
        ("POST", "/", "text/html", "Bearer"),
    ],
)
def test_only_a_browser_that_opens_the_page_is_asked_for_a_password(make_client, method, path, accept, scheme):
    response = make_client({"accept": accept}, api_key=KEY).request(method, path)
    assert (response.status_code, response.headers["www-authenticate"]) == (401, scheme)


def test_health_is_open(make_client):
    assert make_client(api_key=KEY).get("/health").status_code == 200


def test_keys_do_not_share_cached_prefixes(make_client, llm):
    for key in ("one", "two"):
        make_client(bearer(key), api_key="one,two").chat(cache_salt="s")
    make_client(bearer("one"), api_key="one").chat(cache_salt="s")
    salts = [call["salt"] for call in llm.calls]
    assert salts[0] == salts[2] != salts[1], "the salt belongs to the key, whoever else has one"
    assert all(salt.endswith(":s") and "one" not in salt and len(salt) > 60 for salt in salts)


def test_requests_without_a_key_where_none_is_set(client):
    assert client.get("/v1/models").status_code == 200
    assert client.request("GET", "/v1/models", headers=bearer("EMPTY")).status_code == 200
    error_of(client.get("/admin/keys"), 404, "not_found")


def test_admin_needs_the_admin_key(make_client):
    guarded = {"api_key": KEY, "admin_key": ADMIN}
    error_of(make_client(bearer(), **guarded).get("/admin/keys"), 403, "not_admin")
    error_of(make_client(bearer(), **guarded).get("/admin/nothing"), 403, "not_admin")
    assert make_client(bearer(ADMIN), **guarded).get("/admin/keys").status_code == 200
    assert make_client(bearer(ADMIN), **guarded).chat().status_code == 200
    error_of(make_client(bearer(), api_key=KEY).get("/admin/keys"), 404, "not_found")
    error_of(make_client(admin_key=ADMIN).get("/admin/keys"), 401, "invalid_api_key")
    error_of(make_client(bearer(), admin_key=ADMIN).get("/%61dmin/keys"), 401, "invalid_api_key")
    assert make_client(admin_key=ADMIN).get("/v1/models").status_code == 200


# Names


LOCAL = {"host": "127.0.0.1"}
PUBLIC = {"host": "0.0.0.0", "insecure": True}
KEYED = {"host": "0.0.0.0", "api_key": KEY}


@pytest.mark.parametrize(
    ("settings", "host", "status"),
    [
        (LOCAL, "localhost", 200),
        (LOCAL, "LocalHost:8000", 200),
        (LOCAL, "127.0.0.1:8000", 200),
        (LOCAL, "127.8.9.1", 200),
        (LOCAL, "[::1]:8000", 200),
        (LOCAL, "app.localhost:8000", 200),
        (LOCAL, "evil.example", 421),
        (LOCAL, "evil.example:8000", 421),
        (LOCAL, "localhost.evil.example", 421),
        (LOCAL, "127.0.0.1.evil.example", 421),
        (LOCAL, "10.0.0.5", 421),
        (LOCAL, "0.0.0.0:8000", 421),
        (LOCAL, "2130706433", 421),
        (LOCAL, "[2001:db8::1]", 421),
        (LOCAL, "", 400),
        (LOCAL, "localhost/x", 400),
        (LOCAL, "a@localhost", 400),
        (LOCAL, "[localhost]", 400),
        (LOCAL, "localhost:80:90", 400),
        (LOCAL | {"allowed_hosts": "api.example, Other.example"}, "API.example:443", 200),
        (LOCAL | {"allowed_hosts": "api.example, Other.example"}, "other.example", 200),
        (LOCAL | {"allowed_hosts": "api.example"}, "localhost", 200),
        (LOCAL | {"allowed_hosts": "api.example"}, "evil.example", 421),
        (LOCAL | {"allowed_hosts": "*"}, "evil.example", 200),
        (LOCAL | {"allowed_hosts": "*"}, "evil.example/x", 400),
        (PUBLIC, "10.0.0.5:8000", 200),
        (PUBLIC, "[2001:db8::1]", 200),
        (PUBLIC, "evil.example", 421),
        (KEYED, "api.example", 200),
        (KEYED | {"allowed_hosts": "api.example"}, "evil.example", 421),
        ({"host": "gpu.example", "insecure": True}, "gpu.example:8000", 200),
    ],
)
def test_names_the_server_answers_to(make_client, settings, host, status):
    client = make_client(bearer() | {"host": host}, **settings)
    response = client.get("/v1/models")
    assert response.status_code == status, response.text
    if status == 421:
        assert "--allowed-hosts" in error_of(response, 421, "unknown_host")
    if status == 400:
        error_of(response, 400, "invalid_host")


# Other sites' pages

EVIL = {"origin": "http://evil.example"}
PREFLIGHT = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
APP = {"origin": "https://app.example"}


def test_no_page_may_read_by_default(client):
    for headers in (EVIL, EVIL | PREFLIGHT, APP, {"origin": "null"}):
        response = client.request("GET", "/v1/models", headers=headers)
        assert not [name for name in response.headers if name.startswith("access-control")]
    error_of(client.request("OPTIONS", "/v1/models", headers=EVIL | PREFLIGHT), 403, "cross_site_request")


def test_no_page_may_set_off_work_on_an_open_server(client, llm):
    body = b'{"model": "tiny", "prompt": "Hi"}'
    for headers in (EVIL, {"origin": "null"}, {"origin": "http://localhost:3000"}, {"sec-fetch-site": "cross-site"}):
        simple = headers | {"content-type": "text/plain"}
        response = client.request("POST", "/v1/completions", content=body, headers=simple)
        assert "another site" in error_of(response, 403, "cross_site_request")
    assert llm.calls == []
    own = {"origin": "http://localhost", "sec-fetch-site": "same-origin"}
    assert client.request("POST", "/v1/completions", content=body, headers=own).status_code == 200


def test_a_key_sent_on_purpose_vouches_for_the_request(make_client):
    assert make_client(bearer() | EVIL, api_key=KEY).complete().status_code == 200
    assert make_client({"x-api-key": "EMPTY"} | EVIL).complete().status_code == 200


@pytest.mark.parametrize("settings", [{"api_key": KEY}, {"api_key": KEY, "cors_origins": "http://evil.example"}, {}])
@pytest.mark.parametrize(
    ("site", "method", "status"),
    [
        (EVIL, "GET", 403),
        ({"sec-fetch-site": "cross-site"}, "GET", 403),
        ({"sec-fetch-site": "same-site"}, "GET", 403),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}, "GET", 200),
        (EVIL | {"sec-fetch-mode": "navigate"}, "POST", 403),
        ({"sec-fetch-site": "same-origin"}, "GET", 200),
        ({"sec-fetch-site": "none"}, "GET", 200),
        ({"origin": "http://localhost"}, "GET", 200),
        ({"origin": "https://localhost"}, "GET", 200),
        ({}, "GET", 200),
    ],
)
def test_credentials_a_browser_adds_are_for_its_own_pages_only(make_client, settings, site, method, status):
    response = make_client(basic() | site, **settings).request(method, "/v1/models")
    assert response.status_code == status, response.text


def test_listed_origins(make_client):
    client = make_client(bearer(), api_key=KEY, cors_origins="https://app.example, http://localhost:3000/")
    response = client.request("GET", "/v1/models", headers=APP)
    assert response.headers["access-control-allow-origin"] == "https://app.example"
    assert "Origin" in response.headers["vary"]
    assert "x-request-id" in response.headers["access-control-expose-headers"]
    assert "access-control-allow-credentials" not in response.headers
    near = ("https://app.example.evil", "http://app.example", "https://app.example:444", "https://xapp.example", "null")
    for origin in near:
        response = client.request("GET", "/v1/models", headers={"origin": origin})
        assert "access-control-allow-origin" not in response.headers
    assert client.request("GET", "/nothing", headers=APP).headers["access-control-allow-origin"] == APP["origin"]


def test_preflights_are_answered_without_a_key_and_without_telling_routes(make_client):
    client = make_client(api_key=KEY, cors_origins="https://app.example")
    for path in ("/v1/chat/completions", "/nothing", "/admin/drain"):
        response = client.request("OPTIONS", path, headers=APP | PREFLIGHT)
        assert (response.status_code, response.content) == (204, b"")
        assert response.headers["access-control-allow-origin"] == APP["origin"]
        assert response.headers["access-control-allow-headers"] == "authorization,content-type"
        assert "POST" in response.headers["access-control-allow-methods"]
        assert "access-control-allow-credentials" not in response.headers
    odd = APP | PREFLIGHT | {"access-control-request-headers": "a: b; <script>"}
    assert client.request("OPTIONS", "/", headers=odd).headers["access-control-allow-headers"] == "authorization"
    error_of(client.request("OPTIONS", "/v1/models", headers=EVIL | PREFLIGHT), 403, "cross_site_request")


def test_any_origin_never_with_credentials(make_client):
    client = make_client(cors_origins="*")
    response = client.request("POST", "/v1/completions", json={"model": "tiny", "prompt": "x"}, headers=EVIL)
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == "*"
    assert "access-control-allow-credentials" not in response.headers


# Caps


def test_head_caps(make_client):
    client = make_client(max_head=2048, max_headers=20)
    assert client.request("GET", "/v1/models", headers={"x-long": "a" * 1500}).status_code == 200
    for kwargs in (
        {"headers": {"x-long": "a" * 2000}},
        {"headers": {f"x-{i}": "a" for i in range(20)}},
        {"params": {"q": "a" * 2000}},
    ):
        assert "--max-head" in error_of(client.request("GET", "/v1/models", **kwargs), 431, "head_too_large")
    error_of(client.get("/" + "a" * 2000), 431, "head_too_large")


@pytest.mark.parametrize("name", ["host", "content-length", "authorization", "x-api-key", "origin"])
def test_headers_that_must_not_be_there_twice(client, name):
    headers = [(name, "localhost"), (name, "1")]
    assert name in error_of(client.request("GET", "/v1/models", headers=headers), 400, "invalid_header")


def test_compressed_bodies_are_refused(client):
    response = client.request("POST", "/v1/completions", content=b"\x1f\x8b", headers={"content-encoding": "gzip"})
    error_of(response, 415, "unsupported_encoding")


@pytest.mark.parametrize("length", ["-1", "1e3", "0x10", "+5", "5,5", "9" * 30, "٣".encode()])
def test_content_lengths_that_are_none(client, length):
    response = client.request("POST", "/v1/completions", content=b"{}", headers={"content-length": length})
    assert response.status_code in (400, 413)
    assert response.headers["connection"] == "close"


class Exchange:
    """One request to an app, whose body comes in parts; a part that is None never comes."""

    def __init__(self, app, parts, headers=(), path="/v1/completions"):
        self.app, self.parts, self.sent = app, list(parts), []
        self.scope = {
            "type": "http",
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": list(headers),
        }

    async def receive(self):
        if not self.parts or self.parts[0] is None:
            await asyncio.Event().wait()
        part = self.parts.pop(0)
        return {"type": "http.request", "body": part, "more_body": bool(self.parts)}

    async def send(self, message):
        self.sent.append(message)

    def run(self):
        asyncio.run(asyncio.wait_for(self.app(self.scope, self.receive, self.send), 10))
        return self.sent[0]["status"], b"".join(message.get("body", b"") for message in self.sent[1:])


def test_a_body_without_a_length_is_capped_as_it_comes(llm):
    exchange = Exchange(create_app({"tiny": llm}, ServeConfig(max_body=2048)), [b"a" * 1000] * 1000)
    status, body = exchange.run()
    assert (status, b"request_too_large" in body) == (413, True)
    assert len(exchange.parts) == 997, "what comes after the cap is not read"


def test_deep_nesting_is_seen_before_the_rest_is_read(llm):
    exchange = Exchange(create_app({"tiny": llm}), [b'{"a":' * 10] * 1000)
    status, body = exchange.run()
    assert (status, b"json_too_deep" in body) == (400, True)
    assert len(exchange.parts) == 993


def test_brackets_in_strings_do_not_nest(client):
    for text in ("[" * 5000, '\\"[' * 5000, "\\\\", '"]{'):
        assert client.complete(prompt=text[:100]).status_code == 200
    assert "5000" not in client.complete(prompt="[" * 5000).json()["error"]["code"]


def test_a_body_that_does_not_come_is_not_waited_for(llm):
    app = create_app({"tiny": llm}, ServeConfig(read_timeout=0.01))
    status, body = Exchange(app, [b'{"model":', None]).run()
    assert (status, b"request_timeout" in body) == (408, True)


def test_a_long_answer_is_not_cut_off_by_the_time_to_read(llm):
    async def scenario():
        llm.gate = asyncio.Event()
        exchange = Exchange(app, [b'{"model": "tiny", "prompt": "x", "stream": true}'])
        asyncio.get_running_loop().call_later(0.1, llm.gate.set)
        await asyncio.wait_for(app(exchange.scope, exchange.receive, exchange.send), 10)
        return exchange.sent

    app = create_app({"tiny": llm}, ServeConfig(read_timeout=0.01))
    sent = asyncio.run(scenario())
    assert sent[0]["status"] == 200
    assert sent[-2]["body"] == b"data: [DONE]\n\n"


def test_websockets_are_refused(llm):
    async def scenario():
        sent = []

        async def send(message):
            sent.append(message)

        await create_app({"tiny": llm})({"type": "websocket", "path": "/v1/responses", "headers": []}, None, send)
        return sent

    assert asyncio.run(scenario()) == [{"type": "websocket.close", "code": 1008}]


# Responses


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/nothing", "/admin"])
def test_security_headers(client, path):
    headers = client.get(path).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["content-security-policy"] == "default-src 'none'; frame-ancestors 'none'"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cross-origin-resource-policy"] == "same-origin"
    assert headers["x-request-id"].startswith("req-")
    assert "server" not in headers


def test_streams_keep_their_own_cache_control(client):
    response = client.chat(stream=True)
    assert response.headers.get_list("cache-control") == ["no-cache"]
    assert response.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    ("given", "kept"),
    [("abc-1:2._", "abc-1:2._"), ("a" * 64, "a" * 64), ("a" * 65, ""), ("a b", ""), ("a\x1b[0m", ""), ("", "")],
)
def test_a_clients_own_id_is_kept_for_the_log_but_is_not_ours(llm, given, kept):
    seen = []

    class Spy:
        async def __call__(self, scope, receive, send):
            seen.append(scope["state"]["client_request_id"])
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b""})

    app = create_app({"tiny": llm})
    app.build_middleware_stack()
    guard = next(m for m in app.user_middleware if m.cls.__name__ == "Guard")
    exchange = Exchange(guard.cls(Spy(), **guard.kwargs), [b""], [(b"x-request-id", given.encode())])
    exchange.run()
    assert seen == [kept]
    assert dict(exchange.sent[0]["headers"])[b"x-request-id"] != given.encode()


# Draining and limits


def test_draining_takes_no_new_work_but_answers(make_client, llm):
    client = make_client(bearer(), api_key=KEY)
    client.app.state.service.draining = True
    response = client.chat()
    error_of(response, 503, "draining")
    assert int(response.headers["retry-after"]) >= 1
    assert response.headers["connection"] == "close"
    assert llm.calls == []
    assert client.get("/v1/models").status_code == 200
    assert client.get("/health").status_code in (200, 503)
    client.headers = {}
    error_of(client.chat(), 401, "invalid_api_key")
    client.headers = bearer()
    client.app.state.service.draining = False
    assert client.chat().status_code == 200


def test_rate_limits_and_their_headers(make_client):
    client = make_client(bearer(), api_key=f"{KEY},sk-other-0123456789", key_requests_per_minute=2)
    assert client.get("/v1/models").status_code == 200, "reading is not work"
    assert client.chat().headers["x-ratelimit-remaining-requests"] == "1"
    assert client.complete(prompt=3).headers["x-ratelimit-remaining-requests"] == "0", "wrong requests count, too"
    response = client.chat()
    assert "--key-requests-per-minute" in error_of(response, 429, "rate_limit_exceeded")
    assert 1 <= int(response.headers["retry-after"]) <= 30
    assert response.headers["x-ratelimit-limit-requests"] == "2"
    client.headers = bearer("sk-other-0123456789")
    assert client.chat().status_code == 200, "the limits of one key are not those of another"


def test_tokens_of_prompt_and_answer_are_charged(make_client):
    client = make_client(key_tokens_per_minute=1000)
    for stream in (False, True):
        client.complete(prompt="abc", max_tokens=4, stream=stream)
    client.complete(prompt="abc", temperature=-1)
    usage = client.app.state.limits.usage("")
    assert usage == {"under_way": 0, "requests_this_minute": 3, "tokens_this_minute": 14}
    assert client.complete(max_tokens=1).headers["x-ratelimit-remaining-tokens"] == "986"


def test_a_stream_counts_until_its_end_and_not_after_its_client_left(llm):
    async def scenario():
        llm.gate = asyncio.Event()
        app = create_app({"tiny": llm}, ServeConfig(key_concurrency=1))
        first = Exchange(app, [b'{"model": "tiny", "prompt": "x", "stream": true}'])
        leave = asyncio.Event()

        async def receive():
            if first.parts:
                return await first.receive()
            await leave.wait()
            return {"type": "http.disconnect"}

        running = asyncio.ensure_future(app(first.scope, receive, first.send))
        await asyncio.wait_for(llm.started.wait(), 5)
        second = Exchange(app, [b'{"model": "tiny", "prompt": "x"}'])
        await app(second.scope, second.receive, second.send)
        assert second.sent[0]["status"] == 429
        leave.set()
        await asyncio.wait_for(running, 5)
        llm.gate.set()
        third = Exchange(app, [b'{"model": "tiny", "prompt": "x"}'])
        await app(third.scope, third.receive, third.send)
        assert third.sent[0]["status"] == 200
        assert app.state.limits.usage("")["under_way"] == 0

    asyncio.run(scenario())


# Logs


def test_logs_hold_no_key_and_no_text(make_client, llm, caplog):
    caplog.set_level(logging.DEBUG)
    secret, text = "sk-secret-zebra-0123456789", "the prompt about okapis"
    for header in (bearer(secret), basic(secret), {"x-api-key": secret}, bearer("sk-wrong-quagga-0123456789")):
        client = make_client(header, api_key=f"{secret},short", admin_key="sk-admin-walrus-0123456789")
        client.chat(messages=[{"role": "user", "content": text}])
        client.chat(messages=[{"role": "user", "content": text}], stream=True)
        client.complete(prompt=text, temperature=-1)
        client.request("POST", "/v1/completions", content=f'{{"prompt": "{text}'.encode())
    llm.fail = RuntimeError("the engine fell over")
    assert make_client(bearer(secret), api_key=secret).complete(prompt=text).status_code == 500
    assert caplog.records, "the failure at least is told"
    assert "Traceback" in caplog.text
    lines = [caplog.handler.format(r) for r in caplog.records if r.name != "httpx"]  # which is the test's client
    for word in ("zebra", "quagga", "walrus", "okapi"):
        assert not [line for line in lines if word in line]


def test_the_server_answers_while_its_models_load():
    for path in ("/v1/chat/completions", "/v1/messages"):
        exchange = Exchange(WhileLoading(["tiny"]), [b"{}"], path=path)
        exchange.scope["state"] = {}
        assert exchange.run()[0] == 503
