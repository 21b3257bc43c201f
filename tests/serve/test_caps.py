"""How much one request may ask for is the server's setting, and an error names it."""

import pytest

from tenfold.engine.request import SamplingParams
from tenfold.serve.protocol.sampling import CAPS
from tenfold.serve.settings import ServeConfig

OVER = [
    ("max_n", {"n": 3}, "n", "1 to 2"),
    ("max_stop", {"stop": ["a", "b", "c"]}, "stop", "up to 2"),
    ("max_logprobs", {"logprobs": 3}, "logprobs", "0 to 2"),
    ("max_prompts", {"prompt": ["a"] * 3}, "prompt", "up to 2"),
]


@pytest.mark.parametrize(("setting", "fields", "param", "allowed"), OVER)
def test_a_lower_cap(make_client, llm, setting, fields, param, allowed):
    response = make_client(**{setting: 2}).complete(**fields)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param)
    assert allowed in error["message"]
    assert f"--{setting.replace('_', '-')}" in error["message"]
    assert llm.calls == []


@pytest.mark.parametrize(("setting", "fields"), [(s, f) for s, f, *_ in OVER])
def test_up_to_the_cap(make_client, setting, fields):
    assert make_client(**{setting: 3}).complete(**fields).status_code == 200


HIGHER = [
    ("max_n", {"n": 20}),
    ("max_stop", {"stop": [str(i) for i in range(20)]}),
    ("max_logprobs", {"logprobs": 30}),
    ("max_prompts", {"prompt": ["a"] * 70}),
]


@pytest.mark.parametrize(("setting", "fields"), HIGHER)
def test_a_higher_cap(make_client, setting, fields):
    assert make_client().complete(**fields).status_code == 400
    assert make_client(**{setting: 100}).complete(**fields).status_code == 200


def test_chat_has_the_same_caps(make_client):
    client = make_client(max_n=2, max_logprobs=2)
    assert "--max-n" in client.chat(n=3).json()["error"]["message"]
    error = client.chat(logprobs=True, top_logprobs=3).json()["error"]
    assert (error["param"], "--max-logprobs" in error["message"]) == ("top_logprobs", True)


def test_the_message_of_a_long_value_is_short(client):
    assert len(client.complete(stop=["x" * 1000] * 17).json()["error"]["message"]) < 400


@pytest.mark.parametrize("stop", ["x" * 4097, ["x" * 1000] * 5])
def test_stop_strings_are_bounded_in_characters(client, llm, stop):
    for send in (client.complete, client.chat):
        response = send(stop=stop)
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (400, "stop")
        assert "4096 characters in all" in error["message"]
        assert len(error["message"]) < 400
    assert llm.calls == []
    assert client.complete(stop="x" * 4096).status_code == 200


@pytest.mark.parametrize("cap", sorted({cap for _, cap, *_ in CAPS}))
def test_settings_start_within_the_engines_bounds(cap):
    params = {"max_n": {"n": ServeConfig().max_n}, "max_logprobs": {"logprobs": ServeConfig().max_logprobs}}
    SamplingParams(**params.get(cap, {"stop": ("a",) * ServeConfig().max_stop})).check()


@pytest.mark.parametrize("penalty", [0, 5e-324, 1e-45, 10.5])
def test_a_penalty_that_32_bits_cannot_divide_by_is_refused(client, llm, penalty):
    """Found by schemathesis: it became 0 in the engine, and the logits infinite."""
    response = client.complete(repetition_penalty=penalty)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "repetition_penalty")
    assert llm.calls == []
