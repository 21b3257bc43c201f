"""The models of the API against OpenAI's own client, and against docs/api.md."""

import pytest

from tenfold.serve import describe
from tenfold.serve.protocol.chat import ChatRequest
from tenfold.serve.protocol.completions import CompletionRequest


@pytest.mark.parametrize("model", [ChatRequest, CompletionRequest])
def test_every_field_says_what_becomes_of_it(model):
    for name, field in model.model_fields.items():
        assert model.treatment(name) in ("honoured", "ignored", "refused")
        assert field.description


def test_every_field_of_openais_client_is_known():
    from openai.types import completion_create_params as text
    from openai.types.chat import completion_create_params as chat

    assert set(chat.CompletionCreateParamsBase.__annotations__) - {"stream"} <= set(ChatRequest.model_fields)
    assert set(text.CompletionCreateParamsBase.__annotations__) - {"stream"} <= set(CompletionRequest.model_fields)


@pytest.mark.parametrize("page", describe.TABLES)
def test_docs_are_up_to_date(page):
    text = (describe.DOCS / page).read_text(encoding="utf-8")
    assert describe.renewed(page, text) == text, "run: python -m tenfold.serve.describe"


def test_docs_list_every_field():
    text = (describe.DOCS / "api.md").read_text(encoding="utf-8")
    for model in (ChatRequest, CompletionRequest):
        for name in model.model_fields:
            assert f"| `{name}` | {model.treatment(name)} |" in text
