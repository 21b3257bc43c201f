"""A classifier of text and pictures behind /v1/classify and /v1/decisions."""

import asyncio
import base64
import io
import threading
import zlib

import httpx
import pytest
from PIL import Image

from tenfold.engine.pool import Pool, PoolConfig
from tenfold.serve.app import create_app
from tenfold.serve.decide.own import Own, open_own
from tenfold.serve.settings import ServeConfig
from tests.models.sentiment import small
from tests.serve.conftest import Client, FakeLLM

LABELS = list(small.LABELS)


def png(colour=(200, 30, 30), size=(40, 30)):
    out = io.BytesIO()
    Image.new("RGB", size, colour).save(out, "PNG")
    return out.getvalue()


def url(data, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def huge():
    """A PNG whose header says 40,000 x 40,000 pixels: 12 bytes of file would be gigabytes of memory."""
    head = (40_000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])

    def chunk(name, data):
        return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def parts(text=None, *pictures):
    made = [] if text is None else [{"type": "text", "text": text}]
    return [*made, *({"type": "image_url", "image_url": {"url": each}} for each in pictures)]


@pytest.fixture
def serve():
    """serve(**settings) -> client, own; the classifier is called mood."""
    made = []

    def make(classifier=None, **settings):
        config = ServeConfig(**settings)
        pool = Pool(classifier or small.classifier(), PoolConfig(queue=config.classifier_queue))
        own = Own("mood", pool, config)
        made.append(own)
        return Client(create_app({"tiny": FakeLLM()}, config, {"mood": own})), own  # type: ignore[dict-item]

    yield make
    for own in made:
        own.close()


def classify(client, *posts, **fields):
    response = client.post("/v1/classify", {"model": "mood", "input": list(posts)} | fields)
    assert response.status_code == 200, response.text
    return response.json()


def decide(client, content, *questions, **fields):
    given = content if isinstance(content, str) else [{"role": "user", "content": content}]
    return client.post("/v1/decisions", {"model": "mood", "input": given, "questions": list(questions)} | fields)


CHOICE = {"type": "choice", "instructions": "How does it feel?", "choices": [{"value": label} for label in LABELS]}
SCORE = {"type": "score", "instructions": "How good?", "levels": [{"label": label} for label in LABELS]}
PREDICATE = {"type": "predicate", "instructions": "The post is positive."}


def test_texts_and_pictures_are_classified(serve):
    client, own = serve()
    body = classify(client, "a good day", parts("a good day", url(png())), parts(None, url(png())))
    assert body["labels"] == LABELS
    assert body["model"] == "mood"
    assert body["usage"]["prompt_tokens"] == 5 + 5 + 2
    probabilities = [row["probs"] for row in body["data"]]
    assert all(sum(row) == pytest.approx(1) for row in probabilities)
    assert len({tuple(row) for row in probabilities}) == 3
    reader, model = own.pool.classifier.reader, own.pool.classifier
    logits = model.model(reader.batch([reader.read("a good day")])).logits
    assert probabilities[0] == pytest.approx(model.probabilities(logits)[0].tolist(), abs=1e-6)
    assert own.stats.posts == 3


def test_one_text_and_another_temperature(serve):
    client, _ = serve()
    plain = client.post("/v1/classify", {"model": "mood", "input": "bad"}).json()["data"][0]["probs"]
    flat = client.post("/v1/classify", {"model": "mood", "input": "bad", "temperature": 100}).json()["data"][0]["probs"]
    assert max(abs(p - 1 / 3) for p in flat) < 0.01 < max(abs(p - 1 / 3) for p in plain)


def test_decisions_are_the_labels_probabilities(serve):
    client, _ = serve()
    (row,) = classify(client, parts("a good day", url(png())))["data"]
    content = [{"type": "input_text", "text": "a good day"}, {"type": "input_image", "image_url": url(png())}]
    body = decide(client, content, CHOICE, SCORE, PREDICATE).json()
    choice, score, predicate = body["answers"]
    assert [p["probability"] for p in choice["probabilities"]] == pytest.approx(row["probs"])
    assert choice["choice"] == row["label"]
    assert score["score"] == pytest.approx(row["probs"][1] + 2 * row["probs"][2])
    assert predicate["probability"] == pytest.approx(row["probs"][2])
    assert body["usage"]["input_tokens"] == 5
    two = CHOICE | {"choices": [{"value": "Positive"}, {"value": "negative"}]}
    (answer,) = decide(client, content, two).json()["answers"]
    neg, _, pos = row["probs"]
    assert [p["probability"] for p in answer["probabilities"]] == pytest.approx([pos / (pos + neg), neg / (pos + neg)])


@pytest.mark.parametrize(
    ("question", "param", "word"),
    [
        (CHOICE | {"choices": [{"value": "happy"}, {"value": "sad"}]}, "questions[0]", "'happy'; allowed"),
        (CHOICE | {"choices": [{"value": True}, {"value": False}]}, "questions[0]", "negative, neutral, positive"),
        (PREDICATE | {"instructions": "It is about food."}, "questions[0].instructions", "must state one label"),
        (PREDICATE | {"instructions": "It is not positive."}, "questions[0].instructions", "without negation"),
        (PREDICATE | {"instructions": "It is positive or neutral."}, "questions[0].instructions", "one label"),
    ],
)
def test_other_questions_are_refused(serve, question, param, word):
    client, own = serve()
    response = decide(client, "a day", question)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert word in response.json()["error"]["message"]
    assert own.stats.posts == 0


BAD_PICTURES = {
    "no picture": (url(b"%PDF-1.4 ..."), "no format that is read"),
    "damaged": (url(png()[:60]), "damaged"),
    "bomb": (url(huge()), "40000 x 40000"),
    "base64": ("data:image/png;base64,@@@", "not valid base64"),
    "host": ("http://example.com/a.png", ""),
    "file": ("file:///etc/passwd", ""),
    "empty": ("", ""),
    "thin": (url(png(size=(100, 1))), "64 times"),
}


@pytest.mark.parametrize("name", BAD_PICTURES)
@pytest.mark.parametrize("endpoint", ["classify", "decisions"])
def test_bad_pictures_are_the_clients_mistake(serve, name, endpoint):
    client, own = serve()
    given, word = BAD_PICTURES[name]
    if endpoint == "classify":
        response = client.post("/v1/classify", {"model": "mood", "input": ["x", parts("a day", given)]})
        where = "input[1]"
    else:
        response = decide(client, [{"type": "input_image", "image_url": given}], CHOICE)
        where = "input"
    error = response.json()["error"]
    assert response.status_code == 400, error
    assert error["param"].startswith(where)
    assert word in error["message"]
    assert own.stats.posts == 0
    assert classify(client, "still there")["data"]


def test_limits_of_pictures(serve):
    client, _ = serve(max_images=1, max_image_pixels=100, max_image_bytes=1024)
    many = client.post("/v1/classify", {"model": "mood", "input": [parts("x", url(png())), parts("y", url(png()))]})
    assert "--max-images" in many.json()["error"]["message"]
    large = client.post("/v1/classify", {"model": "mood", "input": [parts("x", url(png()))]})
    assert "1200 in all" in large.json()["error"]["message"]
    heavy = client.post("/v1/classify", {"model": "mood", "input": [parts("x", url(png() + bytes(2000)))]})
    assert "1024" in heavy.json()["error"]["message"]
    assert {many.status_code, large.status_code, heavy.status_code} == {400}


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"input": ""}, 400, "input"),
        ({"input": ["x", " "]}, 400, "input[1]"),
        ({"input": [parts(" ")]}, 400, "input[0]"),
        ({"input": []}, 400, "input"),
        ({"input": [[]]}, 400, "input[0]"),
        ({"input": [parts("x", url(png()), url(png()))]}, 400, "input[0][2]"),
        ({"input": [[{"type": "audio"}]]}, 400, "input[0][0]"),
        ({"input": ["x"] * 65}, 400, "input"),
        ({"input": "x", "model": "moody"}, 404, "model"),
        ({"input": "x", "labels": ["a", "b"]}, 400, "labels"),
        ({"input": "x", "temperature": 0}, 400, "temperature"),
        ({"input": [parts("x", url(png()))], "model": "tiny", "labels": ["a", "b"]}, 400, "input[0][1]"),
    ],
)
def test_wrong_requests(serve, fields, status, param):
    client, own = serve()
    response = client.post("/v1/classify", {"model": "mood"} | fields)
    assert response.status_code == status, response.text
    assert response.json()["error"]["param"] == param
    assert own.stats.posts == 0


def test_decisions_read_user_messages_only(serve):
    client, _ = serve()
    given = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "a day"}]
    response = client.post("/v1/decisions", {"model": "mood", "input": given, "questions": [CHOICE]})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "input[0]"


def test_a_language_model_sees_no_images(serve):
    client, _ = serve()
    content = [{"type": "input_text", "text": "x"}, {"type": "input_image", "image_url": url(png())}]
    response = decide(client, content, CHOICE, model="tiny")
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "unsupported_content"
    assert response.json()["error"]["param"] == "input[0].content[1]"


def test_it_is_listed_and_does_not_chat(serve):
    client, _ = serve()
    assert [card["id"] for card in client.get("/v1/models").json()["data"]] == ["tiny", "mood"]
    assert client.get("/v1/models/mood").json()["max_model_len"] == 64
    assert client.get("/v1/models/tiny").json()["input_modalities"] == ["text"]


@pytest.mark.parametrize(
    ("modalities", "told"), [("both", ["text", "image"]), ("text", ["text"]), ("image", ["image"])]
)
def test_models_tell_what_they_look_at(serve, modalities, told):
    client, _ = serve(small.classifier(modalities=modalities))
    assert client.get("/v1/models/mood").json()["input_modalities"] == told
    error = client.chat(model="mood").json()["error"]
    assert "classifier" in error["message"]
    assert error["code"] == "model_not_found"


def test_it_is_counted(serve):
    client, _ = serve()
    classify(client, "a day", "bad")
    client.post("/v1/classify", {"model": "mood", "input": " "})
    text = client.get("/metrics").text
    labels = '{endpoint="/v1/classify",key="",model="mood",outcome='
    assert f'tenfold_requests_total{labels}"ok"}} 1.0' in text
    assert f'tenfold_requests_total{labels}"invalid_value"}} 1.0' in text
    assert 'tenfold_requests_open{model="mood"} 0.0' in text
    assert 'tenfold_classifier_posts_total{model="mood"} 2.0' in text
    assert 'tenfold_prompt_tokens_total{endpoint="/v1/classify",key="",model="mood"} 7.0' in text


def test_tokens_are_charged_to_the_key(serve):
    client, _ = serve(api_key="secret-of-sixteen-or-more", key_tokens_per_minute=5)
    client.headers["authorization"] = "Bearer secret-of-sixteen-or-more"
    assert client.post("/v1/classify", {"model": "mood", "input": "a good day is very good !"}).status_code == 200
    assert client.post("/v1/classify", {"model": "mood", "input": "a"}).status_code == 429


class Held:
    """A model that waits before each batch until it is let go."""

    def __init__(self, model):
        self.model, self.go, self.begun = model, threading.Event(), threading.Event()
        self.parameters, self.config = model.parameters, model.config

    def __call__(self, posts):
        self.begun.set()
        assert self.go.wait(10)
        return self.model(posts)


def held():
    made = small.classifier()
    return type(made)(Held(made.model), made.reader, made.temperature, made.card)  # type: ignore[arg-type]


def test_a_full_queue_is_told(serve):
    client, own = serve(held(), classifier_queue=3)
    first = own.pool.submit(own.pool.classifier.reader.read("a"))
    own.pool.classifier.model.begun.wait(10)
    own.pool.submit(own.pool.classifier.reader.read("b"))
    response = client.post("/v1/classify", {"model": "mood", "input": ["a", "b", "c"]})
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "overloaded"
    never = client.post("/v1/classify", {"model": "mood", "input": ["a", "b", "c", "d"]})
    assert never.status_code == 400  # trying again would not help
    assert "4 posts were given at once; allowed: up to 3" in never.json()["error"]["message"]
    own.pool.classifier.model.go.set()
    assert len(first.future.result(10)) == 3


def test_who_leaves_is_not_computed(serve):
    client, own = serve(held())
    own.pool.submit(own.pool.classifier.reader.read("a"))
    own.pool.classifier.model.begun.wait(10)

    async def leave():
        transport = httpx.ASGITransport(client.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as sender:
            asked = asyncio.ensure_future(sender.post("/v1/classify", json={"model": "mood", "input": ["b", "c"]}))
            while own.stats.waiting < 2:
                await asyncio.sleep(0.01)
            asked.cancel()
            await asyncio.gather(asked, return_exceptions=True)

    asyncio.run(leave())
    own.pool.classifier.model.go.set()
    last = own.pool.submit(own.pool.classifier.reader.read("d"))
    last.future.result(10)
    assert (own.stats.posts, own.stats.cancelled) == (2, 2)
    text = client.get("/metrics").text
    assert 'outcome="cancelled"} 1.0' in text
    assert 'tenfold_requests_open{model="mood"} 0.0' in text


def test_a_deadline_holds(serve):
    client, own = serve(held(), request_timeout=0.05)
    own.pool.submit(own.pool.classifier.reader.read("a"))
    own.pool.classifier.model.begun.wait(10)
    late = threading.Timer(5, own.pool.classifier.model.go.set)  # so that a deadline that does not hold ends the test
    late.start()
    response = client.post("/v1/classify", {"model": "mood", "input": "b"})
    late.cancel()
    own.pool.classifier.model.go.set()
    assert response.status_code == 504
    assert response.json()["error"]["code"] == "timeout"


def test_a_closed_classifier_is_told(serve):
    client, own = serve()
    own.close()
    response = client.post("/v1/classify", {"model": "mood", "input": "b"})
    assert response.status_code == 503
    assert client.get("/health").status_code == 503


def test_a_folder_is_opened_under_its_name(tmp_path):
    own = open_own("feel", str(small.folder(tmp_path)), ServeConfig(classifier_threads=0, classifier_device="cpu"))
    assert (own.name, list(own.labels), own.max_tokens) == ("feel", LABELS, 64)
    own.close()
    with pytest.raises(ValueError, match="no classifier"):
        open_own("feel", str(tmp_path / "none"), ServeConfig())
