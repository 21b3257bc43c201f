import pytest

from tenfold.serve.settings import ServeConfig, is_loopback


def test_models(client):
    body = client.get("/v1/models").json()
    assert body["object"] == "list"
    (card,) = body["data"]
    assert (card["id"], card["object"], card["owned_by"], card["max_model_len"]) == ("tiny", "model", "tenfold", 128)
    assert client.get("/v1/models/tiny").json() == card
    assert client.get("/v1/models/default").json() == card


def test_default_is_always_a_name(client):
    assert client.chat(model="default").json()["model"] == "tiny"


def test_health(client, llm):
    assert client.get("/health").json() == {"status": "ok"}
    llm.alive = False
    response = client.get("/health")
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "engine_dead"


def test_openapi_describes_bodies_and_has_no_dangling_references(client):
    schema = client.get("/openapi.json").json()
    defined = schema["components"]["schemas"]
    references = set()

    def walk(node):
        if isinstance(node, dict):
            references.update({node["$ref"]} if "$ref" in node else ())
            for value in node.values():
                walk(value)
        elif isinstance(node, list):
            for value in node:
                walk(value)

    walk(schema)
    assert {r.removeprefix("#/components/schemas/") for r in references} <= set(defined)
    assert defined["ChatRequest"]["required"] == ["model", "messages"]
    assert defined["ChatRequest"]["additionalProperties"] is False


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("", False),
        ("10.0.0.1", False),
        ("example.org", False),
    ],
)
def test_public_addresses_need_a_key(host, loopback):
    assert is_loopback(host) is loopback
    ServeConfig(host=host, api_key="k").check()
    ServeConfig(host=host, insecure=True).check()
    if loopback:
        ServeConfig(host=host).check()
    else:
        with pytest.raises(ValueError, match="--api-key"):
            ServeConfig(host=host).check()


@pytest.mark.parametrize(
    "wrong", [{"port": -1}, {"port": 70000}, {"max_body": 3}, {"request_timeout": -1.0}, {"drain_timeout": -1}]
)
def test_wrong_settings(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ServeConfig(**wrong).check()
