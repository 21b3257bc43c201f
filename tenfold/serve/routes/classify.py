"""POST /v1/classify: posts in, a probability for each class out; shaped like vLLM's /classify."""

import time
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from tenfold.serve.decide.classify import INSTRUCTIONS, AnyModel, Classifier
from tenfold.serve.decide.given import Given, check_pictures
from tenfold.serve.decide.labelled import tempered
from tenfold.serve.errors import invalid
from tenfold.serve.prompts import check_count
from tenfold.serve.protocol.body import parse
from tenfold.serve.protocol.decisions import Classification, ClassifyRequest
from tenfold.serve.reply import ERROR_RESPONSES, body_schema, whole
from tenfold.serve.routes.decisions import decider_of
from tenfold.serve.service import new_id, service_of

router = APIRouter()


@router.post(
    "/v1/classify",
    response_model=None,
    responses={200: {"model": Classification}, **ERROR_RESPONSES},
    openapi_extra=body_schema(ClassifyRequest),
)
async def classify(http: Request) -> Response:
    """The class of each post."""
    body = parse(ClassifyRequest, await http.body())
    given = body.given()
    if not given:
        raise invalid("input is an empty list; give at least one text.", "input")
    settings = service_of(http).settings
    check_count(given, settings.max_prompts, "input", "max_prompts")
    check_pictures(given, settings.max_images)
    name, classifier = _classifier(http, body)
    return await whole(http, body, _answer(http, body, name, classifier, given))


def _classifier(http: Request, body: ClassifyRequest) -> tuple[str, Classifier]:
    """A classifier of that name, or a language model that is told the labels. Raises ApiError."""
    service = service_of(http)
    if body.model in service.classifiers:
        own = service.classifiers[body.model]
        if body.labels is not None and set(body.labels) != set(own.labels):
            raise invalid(f"labels must be left out: this model has its own, {', '.join(own.labels)}.", "labels")
        return body.model, own
    served = service.served(body.model)
    if body.labels is None:
        raise invalid("labels is required: this model has no classes of its own.", "labels")
    decider = decider_of(http, served)
    return served.name, AnyModel(decider, tuple(body.labels), body.instructions or INSTRUCTIONS, body.manner())


async def _answer(
    http: Request, body: ClassifyRequest, name: str, classifier: Classifier, given: list[Given]
) -> dict[str, Any]:
    told = await classifier.classify(given, http, body.terms())
    labels = list(classifier.labels)
    data = []
    for i, each in enumerate(told.probabilities):
        probs = tempered(each, body.temperature) if name in service_of(http).classifiers else each
        best = max(range(len(probs)), key=probs.__getitem__)
        data.append({"index": i, "label": labels[best], "probs": probs, "num_classes": len(probs)})
    usage = {
        "prompt_tokens": told.prompt,
        "completion_tokens": told.completion,
        "total_tokens": told.prompt + told.completion,
    }
    head = {"id": new_id("classify", http), "object": "list", "created": int(time.time()), "model": name}
    return head | {"labels": labels, "data": data, "usage": usage}
