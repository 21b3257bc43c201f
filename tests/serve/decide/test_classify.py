"""POST /v1/classify: any model told the classes, or a model with its own."""

import pytest

from tenfold.serve.decide.classify import Classified

LABELS = ["good", "bad"]


def opinion(text):
    first_is_good = text.index("A: good") >= 0 if "A: good" in text else False
    good = 4.0 if "lovely" in text else 1.0
    return {"A": good if first_is_good else 1.0, "B": 1.0 if first_is_good else good}


def test_classes(ask):
    client, _ = ask(opinion)
    body = client.post("/v1/classify", {"input": ["lovely", "meh"], "labels": LABELS}).json()
    assert (body["object"], body["labels"]) == ("list", LABELS)
    first, second = body["data"]
    assert (first["index"], first["label"], first["num_classes"]) == (0, "good", 2)
    assert first["probs"] == pytest.approx([0.8, 0.2])
    assert second["probs"] == pytest.approx([0.5, 0.5])
    assert body["usage"]["total_tokens"] == body["usage"]["prompt_tokens"] + body["usage"]["completion_tokens"]
    assert body["id"].startswith("classify-")


def test_instructions_are_the_question(ask):
    client, llm = ask(opinion)
    client.post("/v1/classify", {"input": "x", "labels": LABELS, "instructions": "Good day?"})
    assert all("\n\nGood day?\n\n" in text for text in llm.texts)


WRONG = [
    ({"input": "x"}, "labels", "required"),
    ({"input": [], "labels": LABELS}, "input", "empty"),
    ({"input": ["x"] * 65, "labels": LABELS}, "input", "--max-prompts"),
    ({"input": "x", "labels": ["a"]}, "labels", "at least 2"),
    ({"input": "x", "labels": ["a", "a"]}, "labels", "unique"),
    ({"input": "x", "labels": ["a", 1]}, "labels[1]", "string"),
    ({"input": "x", "labels": LABELS, "model": "other"}, "model", "'tiny'"),
]


@pytest.mark.parametrize(("body", "param", "word"), WRONG)
def test_wrong_fields(ask, body, param, word):
    client, llm = ask(opinion)
    response = client.post("/v1/classify", body)
    error = response.json()["error"]
    assert response.status_code in (400, 404)
    assert error["param"] == param
    assert word in error["message"]
    assert llm.calls == []


class Own:
    labels = ("neg", "pos")

    async def classify(self, given, http, terms):
        return Classified([[0.25, 0.75] for _ in given], 5)


def test_a_model_with_classes_of_its_own(ask):
    client, llm = ask(opinion)
    client.app.state.service.classifiers["mood"] = Own()
    body = client.post("/v1/classify", {"model": "mood", "input": "x"}).json()
    assert body["data"] == [{"index": 0, "label": "pos", "probs": [0.25, 0.75], "num_classes": 2}]
    assert (body["model"], body["labels"], body["usage"]["prompt_tokens"]) == ("mood", ["neg", "pos"], 5)
    assert llm.calls == []
    error = client.post("/v1/classify", {"model": "mood", "input": "x", "labels": LABELS}).json()["error"]
    assert error["param"] == "labels"
