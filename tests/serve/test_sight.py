"""Pictures in requests, on a tiny random model that sees: every API's spelling, limits, and refusals with a reason."""

import base64
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tenfold.engine import text as engine_text
from tenfold.engine.llm import AsyncLLM
from tenfold.serve.app import create_app
from tenfold.serve.settings import ServeConfig
from tests import vision
from tests.serve.conftest import Client, FakeLLM, events_of

CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"


def data_url(image: Image.Image, kind: str = "PNG") -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


@pytest.fixture(scope="module")
def urls() -> list[str]:
    return [data_url(image.resize((70, 50))) for image in vision.pictures()[:3]]


@pytest.fixture(scope="module", params=["qwen2-vl", "idefics3", "internvl"])
def llm(request: pytest.FixtureRequest, seeing: Callable[[str], Path]) -> Iterator[AsyncLLM]:
    """One whose template reads texts and lists, one that reads lists only, and one that reads texts only."""
    made = AsyncLLM(str(seeing(request.param)), kernels="torch", max_model_len=1024, kv_memory=16 << 20)
    yield made
    made.close()


@pytest.fixture
def client(llm: AsyncLLM) -> Client:
    return Client(create_app({"tiny": llm}, ServeConfig()))


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def text(said: str) -> dict[str, Any]:
    return {"type": "text", "text": said}


def image(url: str, **more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, **more}}


def chat(client: Client, *messages: dict[str, Any], **fields: Any) -> Any:
    body = {"messages": list(messages), "max_tokens": 6, "temperature": 0, "ignore_eos": True, **fields}
    return client.post(CHAT, body)


def said(client: Client, *messages: dict[str, Any], **fields: Any) -> tuple[str, int]:
    response = chat(client, *messages, **fields)
    assert response.status_code == 200, response.text
    body = response.json()
    return body["choices"][0]["message"]["content"], body["usage"]["prompt_tokens"]


def test_answers_depend_on_the_picture(client: Client, urls: list[str]) -> None:
    answers = [said(client, user(text("What is it?"), image(url))) for url in urls]
    assert len({answer for answer, _ in answers}) == 3
    assert answers == [said(client, user(text("What is it?"), image(url, detail="low"))) for url in urls]
    _, words = said(client, user(text("What is it?")))
    assert all(tokens > words + 8 for _, tokens in answers)


def test_text_needs_no_list(client: Client) -> None:
    assert said(client, user(text("Hello"))) == said(client, {"role": "user", "content": "Hello"})
    system = {"role": "system", "content": "Be brief."}
    one, plain = said(client, system, {"role": "user", "content": "Hello"}), said(client, user(text("Hello")))
    assert one[1] > plain[1]


def test_history_with_pictures(client: Client, urls: list[str]) -> None:
    first = user(image(urls[0]), text("What is it?"))
    answer = {"role": "assistant", "content": "A face."}
    both = said(client, first, answer, user(text("And this?"), image(urls[1])), max_tokens=16)
    other = said(client, first, answer, user(text("And this?"), image(urls[2])), max_tokens=16)
    assert both[0] != other[0]


def test_a_stream_says_the_same(client: Client, urls: list[str]) -> None:
    asked = user(text("What is it?"), image(urls[0]))
    events = events_of(chat(client, asked, stream=True))
    streamed = "".join(e["choices"][0]["delta"].get("content") or "" for e in events if e["choices"])
    assert streamed == said(client, asked)[0]


def test_cached_prefixes_know_pictures(client: Client, urls: list[str]) -> None:
    def cached(url: str) -> int:
        body = chat(client, user(image(url), text("How many are there, and of what kind are they?"))).json()
        found: int = body["usage"]["prompt_tokens_details"]["cached_tokens"]
        return found

    cached(urls[0])
    again = cached(urls[0])
    assert again >= 16
    assert cached(urls[1]) < again or cached(urls[1]) >= 16  # the second time it is known itself


def test_messages(client: Client, urls: list[str]) -> None:
    data = urls[0].partition(",")[2]
    block = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}}
    asked = {"messages": [user(block, text("What is it?"))], "max_tokens": 6, "temperature": 0}
    response = client.post(MESSAGES, asked)
    assert response.status_code == 200, response.text
    counted = client.post(f"{MESSAGES}/count_tokens", {"messages": asked["messages"]}).json()["input_tokens"]
    usage = response.json()["usage"]
    assert counted == usage["input_tokens"] + usage.get("cache_read_input_tokens", 0)
    assert counted == said(client, user(image(urls[0]), text("What is it?")))[1]


def test_responses(client: Client, urls: list[str]) -> None:
    parts = [
        {"type": "input_image", "image_url": urls[0], "detail": "high"},
        {"type": "input_text", "text": "What is it?"},
    ]
    asked = {"input": [{"role": "user", "content": parts}], "max_output_tokens": 16, "temperature": 0}
    first = client.post(RESPONSES, asked)
    assert first.status_code == 200, first.text
    body = first.json()
    assert body["usage"]["input_tokens"] == said(client, user(image(urls[0]), text("What is it?")))[1]
    more = {"previous_response_id": body["id"], "input": "And why?", "max_output_tokens": 16, "temperature": 0}
    second = client.post(RESPONSES, more)
    assert second.status_code == 200, second.text
    assert second.json()["usage"]["input_tokens"] > body["usage"]["input_tokens"]
    kept = client.get(f"{RESPONSES}/{body['id']}/input_items").json()["data"]
    assert kept[0]["content"][0]["type"] == "input_image"
    assert (
        client.post(f"{RESPONSES}/input_tokens", {"input": asked["input"]}).json()["input_tokens"]
        == body["usage"]["input_tokens"]
    )


def test_structured_answers(client: Client, urls: list[str]) -> None:
    answer, _ = said(client, user(image(urls[0])), guided_choice=["a cat", "a dog"], max_tokens=40, ignore_eos=False)
    assert answer in ("a cat", "a dog")


def test_tools_beside_pictures(client: Client, urls: list[str]) -> None:
    """Whatever way the model is told of tools; a result that came before does not disturb the picture after it."""
    tool = {"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {}}}}
    call = {"id": "c", "type": "function", "function": {"name": "find", "arguments": "{}"}}
    history = [
        user(text("Find it."), image(urls[0])),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "found"},
        user(image(urls[1]), text("Like this?")),
    ]
    answers = [chat(client, *history, tools=[tool], tool_choice="none", n=2) for _ in range(2)]
    assert [a.status_code for a in answers] == [200, 200], answers[0].text
    assert [c["message"]["content"] for c in answers[0].json()["choices"]] == [
        c["message"]["content"] for c in answers[1].json()["choices"]
    ]
    assert chat(client, *history, tools=[tool], ignore_eos=False).status_code == 200


def test_messages_with_results_and_pictures(client: Client, urls: list[str]) -> None:
    block = {
        "type": "image",
        "source": {"type": "base64", "media_type": "image/png", "data": urls[0].partition(",")[2]},
    }
    use = {"type": "tool_use", "id": "c", "name": "find", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "c", "content": "found"}
    messages = [
        user(text("Find it.")),
        {"role": "assistant", "content": [text("Yes."), use]},
        user(result, text("Like"), block, text("this?")),
    ]
    tool = {"name": "find", "input_schema": {"type": "object"}}
    response = client.post(MESSAGES, {"messages": messages, "tools": [tool], "max_tokens": 5})
    assert response.status_code == 200, response.text
    wrong = {"type": "tool_result", "tool_use_id": "c", "content": [block]}
    response = client.post(MESSAGES, {"messages": [*messages[:2], user(wrong)], "tools": [tool], "max_tokens": 5})
    assert response.status_code == 400
    assert "text only" in response.json()["error"]["message"]


def test_models_say_what_they_read(client: Client) -> None:
    assert client.get("/v1/models").json()["data"][0]["input_modalities"] == ["text", "image"]


def refused(client: Client, *messages: dict[str, Any], code: str, words: str, **fields: Any) -> None:
    response = chat(client, *messages, **fields)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["code"] == code
    assert words in error["message"]
    assert "/" not in error["message"].replace("http://", "").replace("https://", "").replace("image/png", "")


def test_what_is_no_picture(client: Client, urls: list[str]) -> None:
    broken = urls[0][: len(urls[0]) // 8 * 4 + len("data:image/png;base64,") % 4]
    for url, words in (
        ("data:image/png;base64,AAAA", "in no format that is read"),
        (broken, "damaged"),
        ("data:image/png;base64,*", "not valid base64"),
        ("data:,", "in no format that is read"),
        ("file:///etc/passwd", "another scheme or no host"),
        ("/etc/passwd", "another scheme or no host"),
        ("https://pictures.example/a.png", "--image-hosts"),
    ):
        refused(client, user(text("What?"), image(url)), code="invalid_image", words=words)
    refused(client, user(image("")), code="invalid_type", words="messages[0].content[0].image_url must be the URL")
    refused(client, user({"type": "image_url"}), code="invalid_type", words="must be the URL")
    refused(client, user({"type": "image", "image": "/etc/passwd"}), code="unsupported_content", words="'image'")
    refused(client, user({"type": "input_audio"}), code="unsupported_content", words="'input_audio'")


def test_the_picture_at_fault_is_named(client: Client, urls: list[str]) -> None:
    response = chat(client, user(image(urls[0]), text("and"), image("data:;base64,*")))
    assert response.json()["error"]["param"] == "messages[0].content[2].image_url"


def test_only_users_show_pictures(client: Client, urls: list[str]) -> None:
    for role in ("system", "assistant", "tool"):
        message = {"role": role, "content": [image(urls[0])], "tool_call_id": "a"}
        refused(client, message, user(text("Hi")), code="unsupported_content", words="'image_url'")


def test_the_mark_is_not_to_be_written(client: Client, llm: AsyncLLM, urls: list[str]) -> None:
    """A user who writes the model's own mark for a picture gets told, and no other request is touched."""
    mark = llm.text.processor.placeholder  # type: ignore[union-attr]
    response = chat(client, user(text(f"a {mark} b")))
    assert response.status_code == 400
    assert "pictures" in response.json()["error"]["message"]
    refused(
        client, user(text(f"a {mark} b"), image(urls[0])), code="invalid_value", words="it must stand once for each"
    )
    assert said(client, user(text("Hello")))


def test_counts_and_sizes(llm: AsyncLLM, urls: list[str]) -> None:
    few = Client(create_app({"tiny": llm}, ServeConfig(max_images=2)))
    refused(few, user(*[image(urls[0])] * 3), code="invalid_value", words="up to 2 (--max-images)")
    small = Client(create_app({"tiny": llm}, ServeConfig(max_image_bytes=1024)))
    refused(small, user(image(urls[0])), code="invalid_image", words="more than 1024 bytes")
    flat = Client(create_app({"tiny": llm}, ServeConfig(max_image_pixels=100)))
    refused(flat, user(image(urls[0])), code="invalid_image", words="allowed: up to 100")


def test_pictures_that_are_too_much_together(client: Client, urls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_text, "MOST_SEEN", 20_000)
    refused(client, user(*[image(url) for url in urls]), code="invalid_value", words="more than 20000 bytes")


def test_a_prompt_that_is_too_long(llm: AsyncLLM, client: Client, urls: list[str]) -> None:
    response = chat(client, user(*[image(url) for url in urls * 5], text("long " * 200)))
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": [user(image("data:,"))]}),
        (MESSAGES, {"messages": [user({"type": "image", "source": {"type": "url", "url": "x"}})], "max_tokens": 5}),
        (RESPONSES, {"input": [user({"type": "input_image", "image_url": "x"})]}),
    ],
)
def test_a_model_of_text_says_so(path: str, body: dict[str, Any]) -> None:
    client = Client(create_app({"tiny": FakeLLM()}, ServeConfig()))  # type: ignore[dict-item]
    response = client.post(path, body)
    assert response.status_code == 400
    assert "is an image; this model reads text only" in response.json()["error"]["message"]
    assert client.get("/v1/models").json()["data"][0]["input_modalities"] == ["text"]


ODD = st.sampled_from(
    [None, 0, True, "", "x", "data:", "data:,", "data:image/png;base64,AAAA", "http://[", "\x00", [], {}]
)
URL = st.one_of(
    ODD, st.text(max_size=30), st.binary(max_size=60).map(lambda b: f"data:;base64,{base64.b64encode(b).decode()}")
)
PART = st.one_of(
    st.fixed_dictionaries(
        {"type": st.just("image_url"), "image_url": st.one_of(URL, st.fixed_dictionaries({"url": URL}))}
    ),
    st.fixed_dictionaries({"type": st.sampled_from(["image", "input_image"]), "source": ODD, "image_url": URL}),
    st.fixed_dictionaries(
        {
            "type": st.just("image"),
            "source": st.fixed_dictionaries({"type": ODD | st.just("base64"), "data": URL, "url": URL}),
        }
    ),
    st.fixed_dictionaries({"type": st.just("text"), "text": st.text(max_size=10)}),
)


@settings(max_examples=60, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=st.lists(PART, max_size=4), path=st.sampled_from([CHAT, MESSAGES, RESPONSES]))
def test_whatever_is_sent(client: Client, parts: list[dict[str, Any]], path: str) -> None:
    """A 200 or a 4xx in the API's shape."""
    body: dict[str, Any] = {"max_tokens": 2} if path != RESPONSES else {"max_output_tokens": 16}
    body["input" if path == RESPONSES else "messages"] = [{"role": "user", "content": parts}]
    response = client.post(path, body)
    assert response.status_code in (200, 400), response.text
    if response.status_code == 400:
        assert response.json()["error"]["message"]
