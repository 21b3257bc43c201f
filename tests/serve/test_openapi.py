"""/openapi.json describes every route with its body, its answer, its errors and its key, and what a server allows."""

import jsonschema
import pytest

from tenfold.serve.app import BODIES
from tests.serve.test_fuzz_nested import REQUESTS


@pytest.fixture
def schema(client):
    return client.get("/openapi.json").json()


def described(schema, path):
    """The JSON schema of a request body, with the definitions it points to."""
    body = schema["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    return body | {"components": schema["components"]}


def operations(schema):
    return [(path, method, op) for path, methods in schema["paths"].items() for method, op in methods.items()]


def test_every_operation_has_an_answer_and_errors(schema):
    for path, method, operation in operations(schema):
        assert any(status.startswith("2") for status in operation["responses"]), (path, method)
        assert "422" not in operation["responses"], path
        if "requestBody" in operation:
            assert {"400", "401", "404", "413", "429", "500", "503", "504"} <= set(operation["responses"]), path


def test_every_body_is_described_and_used(schema):
    text = str(schema["paths"])
    for model in BODIES:
        assert f"'#/components/schemas/{model.__name__}'" in text
        assert schema["components"]["schemas"][model.__name__]["additionalProperties"] is False


@pytest.mark.parametrize("path", REQUESTS)
def test_right_requests_fit_their_description(schema, path):
    jsonschema.validate(REQUESTS[path], described(schema, path))


WRONG = [
    ("/v1/completions", {"model": "other"}),
    ("/v1/completions", {"n": 17}),
    ("/v1/completions", {"temperature": -1}),
    ("/v1/completions", {"best_of": 2}),
    ("/v1/completions", {"stop": ["a"] * 17}),
    ("/v1/completions", {"temprature": 1}),
    ("/v1/decisions", {"questions": []}),
    ("/v1/decisions", {"questions": [{"type": "essay", "instructions": "x"}]}),
    ("/v1/classify", {"labels": ["a"]}),
    ("/detokenize", {"tokens": [-1]}),
]


@pytest.mark.parametrize(("path", "change"), WRONG)
def test_wrong_requests_do_not(client, schema, path, change):
    body = REQUESTS[path] | change
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(body, described(schema, path))
    assert client.request("POST", path, json=body).status_code in (400, 404)


def test_events_are_described_where_there_are_some(schema):
    kinds = {path: set(op["responses"]["200"]["content"]) for path, _, op in operations(schema) if "requestBody" in op}
    assert kinds["/v1/completions"] == {"application/json", "text/event-stream"}
    assert kinds["/v1/embeddings"] == {"application/json"}


def test_limits_are_those_of_the_settings(make_client):
    schema = make_client(max_n=3).get("/openapi.json").json()
    assert schema["components"]["schemas"]["CompletionRequest"]["properties"]["n"]["maximum"] == 3


def test_keys_are_described_where_they_are_needed(client, make_client):
    assert "security" not in client.get("/openapi.json").json()
    key = "k" * 32
    schema = make_client({"authorization": f"Bearer {key}"}, api_key=key).get("/openapi.json").json()
    assert {name for entry in schema["security"] for name in entry} == set(schema["components"]["securitySchemes"])
    assert schema["paths"]["/health"]["get"]["security"] == []
    assert "security" not in schema["paths"]["/v1/completions"]["post"]


def test_a_405_names_every_method_of_a_path(client):
    response = client.request("PUT", "/v1/completions")
    assert (response.status_code, response.headers["allow"]) == (405, "POST")
    response = client.request("PUT", "/v1/responses/resp_1")
    assert (response.status_code, response.headers["allow"]) == (405, "DELETE, GET")
    response = client.request("PUT", "/v1/responses/input_tokens")
    assert (response.status_code, response.headers["allow"]) == (405, "POST")
