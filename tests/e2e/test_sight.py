"""Pictures the whole way: clients, a socket, `tenfold serve`, an engine process, and back; and on the command line."""

import base64
import io

import anthropic
import openai
import pytest

from tests import vision

MODEL = "qwen2.5-vl"
KEY = "sk-e2e"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Files of two pictures."""
    folder = tmp_path_factory.mktemp("photos")
    vision.photograph().resize((90, 110)).save(folder / "portrait.jpg")
    vision.flower().resize((80, 60)).save(folder / "flower.png")
    return folder


@pytest.fixture(scope="module")
def server(seeing, serve):
    folder = str(seeing(MODEL))
    options = ("--kernels", "torch", "--api-key", KEY, "--kv-memory", "8M", "--max-model-len", "512")
    with serve("--model", folder, *options, "--served-name", "eyes") as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def shown(path):
    kind = "jpeg" if path.suffix == ".jpg" else "png"
    data = base64.b64encode(path.read_bytes()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{data}", "detail": "high"}}


def chat(client, *parts, **fields):
    given = {"model": "eyes", "messages": [{"role": "user", "content": list(parts)}], "temperature": 0} | fields
    return client.chat.completions.create(**({"max_tokens": 12, "extra_body": {"ignore_eos": True}} | given))


QUESTION = {"type": "text", "text": "What is it?"}


def test_a_streamed_chat_with_a_picture(client, photos):
    whole = chat(client, shown(photos / "portrait.jpg"), QUESTION)
    events = list(chat(client, shown(photos / "portrait.jpg"), QUESTION, stream=True))
    streamed = "".join(e.choices[0].delta.content or "" for e in events if e.choices)
    assert streamed == whole.choices[0].message.content
    assert whole.usage.completion_tokens == 12
    other = chat(client, shown(photos / "flower.png"), QUESTION)
    assert other.choices[0].message.content != streamed


def test_the_model_says_that_it_sees(client):
    assert client.models.retrieve("eyes").input_modalities == ["text", "image"]


def test_responses(client, photos):
    url = shown(photos / "flower.png")["image_url"]["url"]
    parts = [{"type": "input_text", "text": "What is it?"}, {"type": "input_image", "image_url": url, "detail": "auto"}]
    answer = client.responses.create(
        model="eyes", input=[{"role": "user", "content": parts}], max_output_tokens=16, temperature=0
    )
    assert answer.usage.input_tokens > 20


def test_messages(server, photos):
    data = base64.b64encode((photos / "portrait.jpg").read_bytes()).decode()
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/jpeg", "data": data}}
    with anthropic.Anthropic(base_url=server.url, api_key=KEY, max_retries=0) as client:
        messages = [{"role": "user", "content": [image, QUESTION]}]
        answer = client.messages.create(model="eyes", max_tokens=8, messages=messages)
        counted = client.messages.count_tokens(model="eyes", messages=messages)
    assert counted.input_tokens == answer.usage.input_tokens + (answer.usage.cache_read_input_tokens or 0)


def test_bad_pictures_are_told_and_leave_no_trace(client, photos):
    buffer = io.BytesIO()
    vision.photograph().save(buffer, "JPEG")
    broken = base64.b64encode(buffer.getvalue()[:9000]).decode()
    for url in ("data:image/png;base64,QUJD", f"data:;base64,{broken}", "http://169.254.169.254/latest/meta-data"):
        with pytest.raises(openai.BadRequestError) as caught:
            chat(client, {"type": "image_url", "image_url": {"url": url}})
        assert caught.value.code == "invalid_image"
    assert chat(client, QUESTION).usage.completion_tokens == 12


def test_run(inside, seeing, photos):
    folder = str(seeing(MODEL))
    options = ("--kernels", "torch", "--kv-memory", "8M", "--max-model-len", "512", "--max-tokens", "6", "-q")
    texts = []
    for name in ("portrait.jpg", "flower.png"):
        result = inside("run", "-m", folder, *options, "--image", str(photos / name), "What is it?")
        assert result.returncode == 0, result.stderr
        texts.append(result.stdout)
    assert texts[0] != texts[1]
    result = inside("run", "-m", folder, *options, "--image", str(photos / "none.png"), "What is it?")
    assert result.returncode != 0
    assert "cannot be read" in result.stderr


def test_run_on_a_model_of_text(inside, tiny, photos):
    options = ("--kernels", "torch", "-q", "--image", str(photos / "flower.png"))
    result = inside("run", "-m", str(tiny("llama")), *options, "What is it?")
    assert result.returncode != 0
    assert "reads only text" in result.stderr


def test_chat(inside, seeing, photos):
    options = ("--kernels", "torch", "--kv-memory", "8M", "--max-model-len", "512", "--max-tokens", "4")
    lines = f"/image {photos / 'portrait.jpg'}\nWhat is it?\nAnd now?\n/image\n/exit\n"
    result = inside("chat", str(seeing(MODEL)), *options, input=lines)
    assert result.returncode == 0, result.stderr
    assert "shows 1 picture" in result.stderr
    assert "error" not in result.stderr
