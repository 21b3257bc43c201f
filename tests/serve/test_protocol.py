"""The models of the API against OpenAI's own client, and against docs/api.md."""

import re
from pathlib import Path

import pytest

from tenfold.serve.protocol import ChatRequest, CompletionRequest

DOCS = Path(__file__).parents[2] / "docs" / "api.md"
ROW = re.compile(r"^\| `(\w+)` \| (honoured|ignored|refused) \| (.*) \|$", re.MULTILINE)


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


@pytest.mark.parametrize(
    ("model", "heading"), [(ChatRequest, "## Chat completions"), (CompletionRequest, "## Completions")]
)
def test_docs_list_every_field(model, heading):
    section = DOCS.read_text().split(heading + "\n")[1].split("\n## ")[0]
    documented = {name: (treatment, text) for name, treatment, text in ROW.findall(section)}
    fields = {name: (model.treatment(name), f.description) for name, f in model.model_fields.items()}
    assert documented == fields
