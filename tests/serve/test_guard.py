import pytest

KEY = "sk-tenfold"
PATHS = [("GET", "/v1/models"), ("POST", "/v1/chat/completions"), ("GET", "/openapi.json"), ("GET", "/nothing")]


@pytest.mark.parametrize(("method", "path"), PATHS)
@pytest.mark.parametrize(
    "header", [{}, {"authorization": "Bearer wrong"}, {"authorization": KEY}, {"x-api-key": "wrong"}]
)
def test_every_path_needs_the_key(make_client, method, path, header):
    response = make_client(header, api_key=KEY).request(method, path)
    assert response.status_code == 401
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert response.json()["error"]["type"] == "authentication_error"
    assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "header", [{"authorization": f"Bearer {KEY}"}, {"authorization": f"bearer  {KEY}"}, {"x-api-key": KEY}]
)
def test_the_key_opens(make_client, header):
    client = make_client(header, api_key=KEY)
    assert client.get("/v1/models").status_code == 200
    assert client.chat().status_code == 200


def test_health_is_open(make_client):
    assert make_client(api_key=KEY).get("/health").status_code == 200


def test_keys_do_not_share_cached_prefixes(make_client, llm):
    for key in ("one", "two"):
        make_client({"authorization": f"Bearer {key}"}, api_key=key).chat(cache_salt="s")
    salts = [call["salt"] for call in llm.calls]
    assert len(set(salts)) == 2
    assert all(salt.endswith(":s") and "one" not in salt for salt in salts)


def test_a_key_of_any_bytes_is_only_wrong(make_client):
    assert make_client({"authorization": b"Bearer \xff\xfe"}, api_key=KEY).get("/v1/models").status_code == 401


def test_requests_without_a_key_where_none_is_set(client):
    assert client.get("/v1/models").status_code == 200
