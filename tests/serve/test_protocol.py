"""The models of the API against OpenAI's own client, and against docs/api.md."""

import typing

import pytest

from tenfold.serve import describe
from tenfold.serve.app import BODIES
from tenfold.serve.protocol.chat import ChatRequest
from tenfold.serve.protocol.completions import CompletionRequest
from tenfold.serve.protocol.decisions import DecisionRequest
from tenfold.serve.protocol.embeddings import EmbeddingRequest

# Module of OpenAI's client, its type of a request, and ours.
CLIENTS = [
    ("openai.types.chat.completion_create_params", "CompletionCreateParamsBase", ChatRequest),
    ("openai.types.completion_create_params", "CompletionCreateParamsBase", CompletionRequest),
    ("openai.types.embedding_create_params", "EmbeddingCreateParams", EmbeddingRequest),
    ("openai.types.decision_create_params", "DecisionCreateParams", DecisionRequest),
]


@pytest.mark.parametrize("model", BODIES)
def test_every_field_says_what_becomes_of_it(model):
    for name, field in model.model_fields.items():
        assert model.treatment(name) in ("honoured", "ignored", "refused")
        assert field.description


@pytest.mark.parametrize(("module", "kind", "ours"), CLIENTS, ids=[c[2].__name__ for c in CLIENTS])
def test_every_field_of_openais_client_is_known(module, kind, ours):
    theirs = getattr(pytest.importorskip(module), kind)
    assert set(theirs.__annotations__) - {"stream"} <= set(ours.model_fields)


def test_every_question_and_item_of_openais_client_is_known():
    params = pytest.importorskip("openai.types.decision_create_params")
    ours = DecisionRequest.model_json_schema()["$defs"]
    told = {name: set(schema.get("properties", ())) for name, schema in ours.items()}
    pairs = [("QuestionQuestionParamChoice", "ChoiceQuestion"), ("QuestionQuestionParamScore", "ScoreQuestion")]
    pairs += [("QuestionQuestionParamPredicate", "PredicateQuestion")]
    pairs += [
        ("QuestionQuestionParamChoiceChoice", "DecisionChoice"),
        ("QuestionQuestionParamScoreLevel", "DecisionLevel"),
    ]
    pairs += [("InputUnionMember1DecisionInputFunctionCall", "DecisionFunctionCall")]
    pairs += [("InputUnionMember1DecisionInputFunctionCallOutput", "DecisionCallOutput")]
    pairs += [("InputUnionMember1DecisionInputCustomToolCall", "DecisionToolCall")]
    pairs += [("InputUnionMember1DecisionInputCustomToolCallOutput", "DecisionCallOutput")]
    pairs += [("InputUnionMember1DecisionInputAssistantMessage", "DecisionAssistantMessage")]
    pairs += [("InputUnionMember1DecisionInputUserMessage", "DecisionUserMessage")]
    for theirs, own in pairs:
        assert set(typing.get_type_hints(getattr(params, theirs))) <= told[own], theirs


@pytest.mark.parametrize("page", describe.TABLES)
def test_docs_are_up_to_date(page):
    text = (describe.DOCS / page).read_text(encoding="utf-8")
    assert describe.renewed(page, text) == text, "run: python -m tenfold.serve.describe"


def test_docs_list_every_field():
    text = (describe.DOCS / "api.md").read_text(encoding="utf-8")
    for make, model in describe.TABLES["api.md"].values():
        assert make is describe.field_table
        for name in model.model_fields:
            assert f"| `{name}` | {model.treatment(name)} |" in text
