"""POST /v1/decisions: typed questions about one input, each answered with a probability for everything allowed."""

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from tenfold.serve.decide import labelled
from tenfold.serve.decide.classify import Classifier
from tenfold.serve.decide.decider import Case, Decider
from tenfold.serve.decide.given import check_pictures
from tenfold.serve.prompts import check_count
from tenfold.serve.protocol.body import parse
from tenfold.serve.protocol.decisions import Decision, DecisionRequest, DecisionUsage, answer
from tenfold.serve.reply import ERROR_RESPONSES, body_schema, whole
from tenfold.serve.service import Served, service_of

router = APIRouter()


@router.post(
    "/v1/decisions",
    response_model=None,
    responses={200: {"model": Decision}, **ERROR_RESPONSES},
    openapi_extra=body_schema(DecisionRequest),
)
async def create_decision(http: Request) -> Response:
    """Probabilities for the answers to each question."""
    body = parse(DecisionRequest, await http.body())
    service = service_of(http)
    check_count(body.questions, service.settings.max_questions, "questions", "max_questions")
    if body.model in service.classifiers:
        return await whole(http, body, _labelled(http, body, service.classifiers[body.model]))
    served = service.served(body.model)
    body.check_text()
    return await whole(http, body, _answer(http, body, decider_of(http, served)))


def decider_of(http: Request, served: Served) -> Decider:
    """That of a model; it keeps priors from one request to the next."""
    state = http.app.state
    if served.name not in state.deciders:
        state.deciders[served.name] = Decider(served, state.temperatures.get(served.name, 1.0))
    decider: Decider = state.deciders[served.name]
    return decider


async def _labelled(http: Request, body: DecisionRequest, classifier: Classifier) -> dict[str, Any]:
    """By a model that has labels of its own: one look at the input answers all questions."""
    given = body.given()
    check_pictures([given], service_of(http).settings.max_images)
    labels, even = classifier.labels, [1.0 / len(classifier.labels)] * len(classifier.labels)
    questions = [(asked, asked.question(), f"questions[{i}]") for i, asked in enumerate(body.questions)]
    for _, question, where in questions:
        labelled.read(question, labels, even, where)  # what is wrong with one is told before there is work to do
    told = await classifier.classify([given], http, body.terms())
    each = labelled.tempered(told.probabilities[0], body.temperature)
    found = [answer(asked, labelled.read(question, labels, each, where)) for asked, question, where in questions]
    usage = DecisionUsage.of(told.prompt, told.completion, 0)
    return Decision(model=body.model, answers=found, usage=usage).model_dump()


async def _answer(http: Request, body: DecisionRequest, decider: Decider) -> dict[str, Any]:
    given = body.text()
    cases = [Case(given, asked.question()) for asked in body.questions]
    told, counts = await decider.decide(http, cases, body.manner(), body.terms(), "dec")
    found = [answer(asked, probabilities) for asked, probabilities in zip(body.questions, told)]
    usage = DecisionUsage.of(counts.prompt, counts.completion, counts.cached)
    return Decision(model=decider.served.name, answers=found, usage=usage).model_dump()
