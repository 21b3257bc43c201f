"""/admin: what it does, and that nobody else can."""

import logging

import pytest

ADMIN = "sk-admin-0123456789ab"
KEY = "sk-tenfold-0123456789"
POSTS = ["drain", "resume", "restart", "dump", "log_level"]


@pytest.fixture
def admin(make_client, llm):
    llm.done = []
    llm.restart = lambda: llm.done.append("restart")
    llm.dump = lambda: llm.done.append("dump")
    return make_client({"authorization": f"Bearer {ADMIN}"}, admin_key=ADMIN, api_key=KEY)


def act(client, what, body=None, **kwargs):
    return client.request("POST", f"/admin/{what}", **({"json": body} if body is not None else {}), **kwargs)


@pytest.mark.parametrize("what", POSTS)
@pytest.mark.parametrize(("key", "status"), [(KEY, 403), ("wrong", 401)])
def test_nobody_else_may(admin, llm, what, key, status):
    admin.headers = {"x-api-key": key}
    assert act(admin, what, {}).status_code == status
    assert llm.done == []
    assert not admin.app.state.service.draining


@pytest.mark.parametrize("what", POSTS)
def test_without_an_admin_key_there_is_no_admin(make_client, what):
    assert act(make_client(), what, {}).status_code == 404


def test_drain_and_resume(admin):
    service = admin.app.state.service
    assert act(admin, "drain").json() == {"draining": True}
    assert service.draining
    assert admin.chat().json()["error"]["code"] == "draining"
    assert act(admin, "drain", {}).status_code == 200, "saying it twice does no harm"
    assert act(admin, "resume").json() == {"draining": False}
    assert admin.chat().status_code == 200


def test_a_server_that_was_told_to_stop_does_not_resume(admin):
    service = admin.app.state.service
    service.draining = service.stopping = True
    response = act(admin, "resume")
    assert (response.status_code, response.json()["error"]["code"]) == (409, "stopping")
    assert service.draining


@pytest.mark.parametrize("what", ["restart", "dump"])
@pytest.mark.parametrize("body", [None, {}, {"model": "tiny"}, {"model": "default"}])
def test_restart_and_dump(admin, llm, what, body):
    assert act(admin, what, body).json() == {"model": "tiny"}
    assert llm.done == [what]


@pytest.mark.parametrize(
    ("what", "body", "status"),
    [
        ("restart", b'{"model": "other"}', 404),
        ("restart", b'{"model": 3}', 400),
        ("dump", b'{"modell": "tiny"}', 400),
        ("dump", b"[]", 400),
        ("log_level", b"", 400),
        ("log_level", b"{}", 400),
        ("log_level", b'{"level": "loud"}', 400),
        ("log_level", b'{"level": 10}', 400),
    ],
)
def test_wrong_bodies(admin, llm, what, body, status):
    response = act(admin, what, content=body)
    assert (response.status_code, set(response.json())) == (status, {"error"})
    assert llm.done == []


def test_log_level(admin):
    before = logging.getLogger("tenfold").level
    try:
        assert act(admin, "log_level", {"level": "debug"}).json() == {"level": "debug"}
        assert logging.getLogger("tenfold.serve").getEffectiveLevel() == logging.DEBUG
    finally:
        logging.getLogger("tenfold").setLevel(before)


def test_keys_are_listed_by_name_with_what_they_use(admin):
    admin.headers = {"x-api-key": KEY}
    admin.complete(prompt="abc", max_tokens=4)
    admin.headers = {"x-api-key": ADMIN}
    response = admin.get("/admin/keys")
    user, operator = response.json()["data"]
    assert operator["name"] == "admin"
    assert user | {"name": ""} == {
        "name": "",
        "under_way": 0,
        "requests_this_minute": 1,
        "tokens_this_minute": 7,
    }
    assert KEY not in response.text


def test_what_was_done_is_in_the_log(admin, caplog):
    act(admin, "dump")
    assert "admin: dump" in caplog.text


def test_admin_is_not_part_of_the_described_api(admin):
    assert not [path for path in admin.app.openapi()["paths"] if path.startswith("/admin")]
