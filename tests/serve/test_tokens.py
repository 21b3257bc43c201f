from types import SimpleNamespace

import pytest

from tests.serve.conftest import FakeLLM


class Words:
    """A text layer with one token a byte and <s> (token 1) in front."""

    eos_ids = (2,)
    vocab_size = 256
    template = "{{ messages }}"
    tokenizer = SimpleNamespace(
        model=SimpleNamespace(), id_to_token=lambda token: f"<{token}>", get_added_tokens_decoder=dict
    )

    def __init__(self):
        self.special = {"bos_token": "<s>"}

    def encode(self, text, add_special_tokens=True):
        if text == "\udc00" or text == "bad":
            raise ValueError("The text is not to be encoded.")
        return [1] * add_special_tokens + list(text.encode())

    def decode(self, ids, skip_special_tokens=True):
        return "".join("" if i == 1 and skip_special_tokens else "<s>" if i == 1 else chr(i) for i in ids)

    def render_chat(self, messages, **settings):
        return messages[0]["content"].upper()


@pytest.fixture
def llm():
    fake = FakeLLM()
    fake.text = Words()
    return fake


def test_a_text(client):
    body = client.post("/tokenize", {"prompt": "ab"}).json()
    assert body == {"count": 3, "max_model_len": 128, "tokens": [1, 97, 98], "token_strs": None}
    body = client.post("/tokenize", {"prompt": "ab", "add_special_tokens": False, "return_token_strs": True}).json()
    assert (body["tokens"], body["token_strs"]) == ([97, 98], ["<97>", "<98>"])


def test_model_may_be_left_out(client):
    assert client.request("POST", "/tokenize", json={"prompt": "a"}).json()["count"] == 2
    assert client.request("POST", "/detokenize", json={"tokens": [97]}).json() == {"prompt": "a"}


def test_an_empty_text_and_a_long_one(client):
    assert client.post("/tokenize", {"prompt": "", "add_special_tokens": False}).json()["tokens"] == []
    assert client.post("/tokenize", {"prompt": "x" * 500}).json()["count"] == 501


def test_a_conversation(client, llm):
    messages = [{"role": "user", "content": "Hi"}]
    fields = {"add_generation_prompt": False, "chat_template_kwargs": {"enable_thinking": False}}
    body = client.post("/tokenize", {"messages": messages} | fields).json()
    assert bytes(body["tokens"]) == b"<user>Hi"
    assert llm.rendered == [(messages, {"add_generation_prompt": False, "enable_thinking": False})]
    body = client.post("/tokenize", {"messages": messages, "add_special_tokens": True}).json()
    assert body["tokens"] == [1, *b"HI"]


def test_back_to_text_with_special_tokens(client):
    assert client.post("/detokenize", {"tokens": [1, 97, 98]}).json() == {"prompt": "<s>ab"}
    assert client.post("/detokenize", {"tokens": []}).json() == {"prompt": ""}


def test_tokenizer_info(client):
    body = client.get("/tokenizer_info").json()
    assert body["special_tokens"] == {"bos_token": "<s>"}
    assert (body["vocab_size"], body["model_max_length"], body["has_chat_template"]) == (256, 128, True)
    assert "messages" not in str(body)  # the template itself is not told
    assert client.get("/tokenizer_info?model=other").status_code == 404
    assert client.get("/tokenizer_info?model=tiny").json() == body


WRONG = [
    ("/tokenize", {}, "prompt", "either"),
    ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "x"}]}, "prompt", "either"),
    ("/tokenize", {"prompt": 3}, "prompt", "string"),
    ("/tokenize", {"prompt": "bad"}, "prompt", "encoded"),
    ("/tokenize", {"messages": []}, "messages", "at least 1"),
    ("/tokenize", {"messages": [{"role": "user", "content": "bad"}]}, "messages", "template"),
    ("/tokenize", {"messages": [{"role": "user", "content": "x"}] * 2049}, "messages", "--max-messages"),
    ("/tokenize", {"prompt": "a", "chat_template": "{{ 1 }}"}, "chat_template", "own"),
    ("/detokenize", {}, "tokens", "required"),
    ("/detokenize", {"tokens": [256]}, "tokens", "0 to 255"),
    ("/detokenize", {"tokens": [-1]}, "tokens", "0 to 255"),
    ("/detokenize", {"tokens": "ab"}, "tokens", "array"),
    ("/detokenize", {"tokens": [2**70]}, "tokens", ""),
]


@pytest.mark.parametrize(("path", "fields", "param", "word"), WRONG)
def test_wrong_fields(client, path, fields, param, word):
    response = client.post(path, fields)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param), error
    assert word in error["message"]
