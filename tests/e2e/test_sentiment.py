"""The whole way of a classifier: a set is made up, a tiny model trained for seconds and served beside a language model,
and OpenAI's client asks it about texts and pictures.
"""

import base64
import io
import json

import httpx
import openai
import pytest
from PIL import Image

LABELS = ["congruent", "incongruent"]
QUESTION = {"type": "choice", "instructions": "Do they clash?", "choices": [{"value": label} for label in LABELS]}


def data_url(colour, kind="PNG"):
    out = io.BytesIO()
    Image.new("RGB", (64, 48), colour).save(out, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(out.getvalue()).decode()}"


@pytest.fixture(scope="module")
def classifier(tenfold, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "mood"
    line = ["train", "sentiment", str(out), "--data", "incongruity-tiny", "--text", "new", "--tokens", "200"]
    sizes = ["--width", "32", "--layers", "1", "--size", "24", "--epochs", "2", "--device", "cpu"]
    done = tenfold(*line, *sizes)
    assert done.returncode == 0, done.stderr
    assert "epoch 2" in done.stdout
    return out


@pytest.fixture(scope="module")
def server(tiny, serve, classifier):
    arguments = ["--model", str(tiny("llama")), "--kernels", "torch", "--classifier", f"{classifier},feel=default"]
    with serve(*arguments, "--classifier-device", "cpu") as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def decide(client, content, question=QUESTION, model="mood"):
    if not hasattr(client, "decisions"):
        pytest.skip("the OpenAI client is older than 3, where it came to know decisions")
    given = [{"role": "user", "content": content}]
    return client.decisions.create(model=model, input=given, questions=[question])


def test_models_and_classifiers_are_listed(client):
    cards = client.models.list().data
    assert [card.id for card in cards] == ["llama", "mood", "feel"]
    assert [card.input_modalities for card in cards] == [["text"], ["text", "image"], ["text", "image"]]


def test_texts_and_pictures_are_decided(client):
    text = {"type": "input_text", "text": "what a lovely day"}
    told = [
        decide(client, [text, {"type": "input_image", "image_url": data_url(colour, kind)}])
        for colour, kind in (((250, 220, 60), "PNG"), ((20, 20, 60), "JPEG"))
    ]
    for each in told:
        (answer,) = each.answers
        assert answer.choice in LABELS
        assert sum(p.probability for p in answer.probabilities) == pytest.approx(1)
        assert each.model == "mood"
    assert told[0].answers[0].confidence != told[1].answers[0].confidence


def test_the_packaged_one_knows_good_from_bad(client):
    states = {"type": "predicate", "instructions": "The post is positive."}
    good, bad = (
        decide(client, [{"type": "input_text", "text": text}], states, "feel").answers[0].probability
        for text in ("I love this, it is wonderful!", "This is terrible and I hate it.")
    )
    assert good > 0.6 > 0.3 > bad


def test_generation_goes_on_beside_it(client):
    answer = client.completions.create(model="llama", prompt="the land", max_tokens=5)
    assert answer.usage.prompt_tokens > 0


@pytest.mark.parametrize(
    ("content", "param"),
    [
        ([{"type": "input_image", "image_url": "data:image/png;base64,AAAA"}], "input[0].content[0]"),
        ([{"type": "input_image", "image_url": "http://127.0.0.1/x.png"}], "input[0].content[0]"),
        ([{"type": "input_text", "text": "  "}], "input"),
    ],
)
def test_mistakes_reach_the_client_as_its_own(client, content, param):
    with pytest.raises(openai.BadRequestError) as raised:
        decide(client, content)
    assert raised.value.param == param


def test_unknown_classifiers(client):
    with pytest.raises(openai.NotFoundError):
        decide(client, [{"type": "input_text", "text": "x"}], model="moody")


def test_classes(server):
    post = [{"type": "text", "text": "what a day"}, {"type": "image_url", "image_url": {"url": data_url((9, 9, 9))}}]
    body = {"model": "mood", "input": ["what a day", post]}
    found = httpx.post(f"{server.url}/v1/classify", json=body).json()
    assert found["labels"] == LABELS
    assert len(found["data"]) == 2
    assert found["data"][0]["probs"] != found["data"][1]["probs"]


def test_the_command_says_the_same(tenfold, server, classifier, tmp_path):
    (tmp_path / "p.png").write_bytes(base64.b64decode(data_url((9, 200, 9)).partition(",")[2]))
    done = tenfold(
        *("classify", "what a day", "--image", str(tmp_path / "p.png")),
        *("--classifier", str(classifier), "--device", "cpu", "--json"),
    )
    told = json.loads(done.stdout)["probabilities"]
    post = [{"type": "text", "text": "what a day"}, {"type": "image_url", "image_url": {"url": data_url((9, 200, 9))}}]
    (row,) = httpx.post(f"{server.url}/v1/classify", json={"model": "mood", "input": [post]}).json()["data"]
    assert list(told.values()) == pytest.approx(row["probs"], abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["classify"], "nothing to classify"),
        (["classify", "x", "--image", "none.png"], "none.png"),
        (["classify", "x", "--classifier", "nowhere"], "no classifier"),
        (["classify", "a \udcff day"], "half of a surrogate pair"),
        (["train", "sentiment", "out", "--data", "imdb"], "allowed: incongruity"),
        (["train", "sentiment", "out", "--data", "mvsa-single"], "mvsa-single=FOLDER"),
        (["train", "sentiment", "out", "--data", "incongruity", "--text", "/nope"], "BERT"),
        (["train", "sentiment", "out", "--data", "incongruity", "--cbam", "some"], "cbam is 'some'"),
        (["serve", "--classifier", "nowhere"], "nowhere"),
        (["serve", "--classifier", "a=x,a=y"], "Two models are called 'a'"),
    ],
)
def test_mistakes_of_a_user(inside, arguments, word, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = inside(*arguments)
    assert done.returncode == 2, done.stderr
    assert word in done.stderr.replace("\n", " ")
