"""POST /v1/embeddings: texts in, vectors of length 1 out: the final hidden states of the model, pooled."""

import base64
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any

import numpy as np
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from tenfold.engine.request import SamplingParams
from tenfold.serve.errors import invalid
from tenfold.serve.prompts import each, encode_all
from tenfold.serve.protocol.body import parse
from tenfold.serve.protocol.embeddings import EmbeddingList, EmbeddingRequest
from tenfold.serve.reply import ERROR_RESPONSES, body_schema, whole
from tenfold.serve.service import Counts, Job, answers, service_of

router = APIRouter()


@router.post(
    "/v1/embeddings",
    response_model=None,
    responses={200: {"model": EmbeddingList}, **ERROR_RESPONSES},
    openapi_extra=body_schema(EmbeddingRequest),
)
async def create_embeddings(http: Request) -> Response:
    """A vector for each input."""
    body = parse(EmbeddingRequest, await http.body())
    served = service_of(http).served(body.model)
    given = each(body.input, served, "input")
    prompts = await encode_all(given, served, "input", answer=False)
    params = SamplingParams(max_tokens=1, temperature=0.0)
    job = Job.of(http, served, "embd", prompts, params, body.terms(), pool=body.pooling or "mean")
    return await whole(http, body, _answer(job, body))


async def _answer(job: Job, body: EmbeddingRequest) -> dict[str, Any]:
    counts = Counts(sum(map(len, job.prompts)))
    vectors: list[Sequence[float]] = [()] * len(job.prompts)
    async with aclosing(answers(job, counts)) as outputs:
        async for i, output in outputs:
            if output.embedding is not None:
                vectors[i] = output.embedding
    check_dimensions(body.dimensions, len(vectors[0]))
    written = [encoded(vector, body.encoding_format or "float") for vector in vectors]
    return {
        "object": "list",
        "data": [{"object": "embedding", "index": i, "embedding": vector} for i, vector in enumerate(written)],
        "model": job.served.name,
        "usage": {"prompt_tokens": counts.prompt, "total_tokens": counts.prompt},
    }


def check_dimensions(asked: int | None, own: int) -> None:
    """Raises ApiError (400) for a vector shorter or longer than the model makes."""
    if asked is not None and asked != own:
        message = f"dimensions is {asked}; this model's embeddings have {own} and cannot be cut. Leave the field out."
        raise invalid(message, "dimensions")


def encoded(vector: Sequence[float], form: str) -> list[float] | str:
    """A vector scaled to length 1, as a list or as base64 of little-endian float32."""
    values = np.asarray(vector, dtype="<f4")
    values /= max(float(np.linalg.norm(values)), 1e-12)
    return base64.b64encode(values.tobytes()).decode("ascii") if form == "base64" else values.tolist()
