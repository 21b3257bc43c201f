"""OpenAI's own client asks for embeddings and decisions as it likes to, and understands what it gets."""

import asyncio

import pytest

from tenfold.serve.app import create_app
from tenfold.serve.settings import ServeConfig
from tests.serve.decide.conftest import Opinionated
from tests.serve.decide.test_decisions import CHOICE, COLOURS, PREDICATE, SCORE, colours
from tests.serve.test_embeddings import Embedder

httpx2 = pytest.importorskip("httpx2", reason="the OpenAI client is older than 3, where it came to know decisions")
openai = pytest.importorskip("openai")


def call(llm, use):
    """What `use(client)` gives, where the client's requests go straight into an app around `llm`."""

    async def run():
        transport = httpx2.ASGITransport(create_app({"tiny": llm}, ServeConfig()))
        async with (
            httpx2.AsyncClient(transport=transport) as http,
            openai.AsyncOpenAI(base_url="http://localhost/v1", api_key="k", http_client=http, max_retries=0) as client,
        ):
            return await use(client)

    return asyncio.run(run())


@pytest.mark.parametrize("form", [{}, {"encoding_format": "float"}, {"encoding_format": "base64"}])
def test_embeddings(form):
    found = call(Embedder(), lambda c: c.embeddings.create(model="tiny", input=["ab", "c"], **form))
    assert [entry.index for entry in found.data] == [0, 1]
    if form.get("encoding_format") != "base64":  # asked for by name, the client hands it on as it is
        assert found.data[0].embedding == pytest.approx([0.6, 0.0, -0.8])
    assert found.usage.total_tokens == 3


def test_decisions():
    def opinion(text):
        return colours(text) | {"Yes": 0.9, "No": 0.1}

    score = SCORE | {"levels": [{"label": name} for name in COLOURS], "name": "s"}
    found = call(
        Opinionated(opinion),
        lambda c: c.decisions.create(
            model="tiny",
            input=[{"role": "user", "content": "The sky."}],
            questions=[PREDICATE, CHOICE, score],
            safety_identifier="me",
            prompt_cache_key="k",
            extra_body={"calibrate": False},
        ),
    )
    predicate, choice, levels = found.answers
    assert (predicate.type, predicate.name, predicate.probability) == ("predicate", None, pytest.approx(0.9))
    assert (choice.choice, choice.name, choice.confidence) == ("red", "c", pytest.approx(0.6))
    assert {p.value: p.probability for p in choice.probabilities} == pytest.approx(COLOURS)
    assert levels.score == pytest.approx(0.3 + 2 * 0.1)
    assert [(p.label, p.value) for p in levels.probabilities] == [("red", 0), ("green", 1), ("blue", 2)]
    assert found.model == "tiny"
    assert found.usage.input_tokens_details.cached_tokens == 3 * 6
    assert type(found).model_validate(found.model_dump(), strict=True)


def test_an_error_is_the_clients_own():
    with pytest.raises(openai.BadRequestError) as told:
        call(Embedder(), lambda c: c.embeddings.create(model="tiny", input=""))
    assert told.value.param == "input"
