"""What clients are told of an engine that was restarted under their request."""

import json

import pytest

from tenfold.engine.loop import EngineDead, EngineRestarted

LOST = EngineRestarted("The engine failed while it worked on this request. Send the request again in 4 s.", 4)


def test_a_request_lost_with_its_engine_may_be_sent_again(make_client, llm):
    llm.fail = LOST
    response = make_client().chat()
    assert response.status_code == 503
    assert response.headers["retry-after"] == "4"
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("server_error", "engine_restarted")
    assert "Send the request again in 4 s." in error["message"]


@pytest.mark.parametrize(("raised", "code"), [(LOST, "engine_restarted"), (EngineDead("gone"), "engine_dead")])
def test_a_stream_ends_with_the_error(make_client, llm, raised, code):
    llm.fail, llm.fail_after = raised, 2
    response = make_client().complete(stream=True)
    assert response.status_code == 200
    events = [json.loads(e.removeprefix("data: ")) for e in response.text.split("\n\n") if e.startswith("data: {")]
    assert events[-1]["error"]["code"] == code
