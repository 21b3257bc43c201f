"""POST /v1/completions: text or tokens in, their continuation out; several prompts are computed together."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from tenfold.engine.request import Logprob, Output
from tenfold.serve.logprobs import TextLogprobs
from tenfold.serve.prompts import Prompt, each, encode_all
from tenfold.serve.protocol.body import parse
from tenfold.serve.protocol.completions import Completion, CompletionRequest
from tenfold.serve.reply import (
    ERROR_RESPONSES,
    FINISH,
    body_schema,
    check_stream,
    checked,
    events,
    head,
    usage,
    whole,
)
from tenfold.serve.service import Counts, Job, answers, service_of
from tenfold.serve.stream import event
from tenfold.serve.structured import FIELDS, asked_format
from tenfold.serve.turn import checked_grammar

router = APIRouter()


@router.post(
    "/v1/completions",
    response_model=None,
    responses={200: {"model": Completion}, **ERROR_RESPONSES},
    openapi_extra=body_schema(CompletionRequest),
)
async def create_completion(http: Request) -> Response:
    """What follows the prompt."""
    body = parse(CompletionRequest, await http.body())
    served = service_of(http).served(body.model)
    check_stream(body)
    params = checked(body.params(served.llm.default_params()), body, served)
    grammar, held_by = asked_format({name: getattr(body, name) for name in FIELDS}, served.settings)
    if grammar is not None:
        params = replace(params, grammar=await asyncio.to_thread(checked_grammar, served, lambda: grammar, held_by))
    given = each(body.prompt, served, "prompt")
    prompts = await encode_all(given, served, "prompt")
    job = Job.of(http, served, "cmpl", prompts, params, body.terms())
    choices = _choices(job, body, given)
    if body.stream:
        return await events(http, body, _chunks(job, body, choices), lane=job.lane)
    return await whole(http, body, _answer(job, body, choices))


@dataclass(slots=True)
class Choice:
    """One continuation while it grows: turns outputs into text, log-probabilities and finish reason as the request
    wants them.
    """

    index: int
    echo: str  # the prompt's text where it is to be repeated
    prompt: tuple[int, ...]
    silent: bool  # max_tokens 0: the prompt alone was wanted
    logprobs: TextLogprobs | None
    begun: bool = False
    places: Sequence[Logprob | None] | None = None  # of the prompt's tokens
    held: list[Output] = field(default_factory=list)  # until the places are known

    def piece(self, output: Output) -> dict[str, Any]:
        """An entry of `choices` with what `output` added."""
        text = "" if self.silent else output.text
        if not self.begun:
            self.begun = True
            text = self.echo + text
            if self.logprobs and self.echo:
                self.logprobs.add_prompt(self.prompt, self.places)
        if self.logprobs and not self.silent:
            for place in output.logprobs:
                self.logprobs.add(place)
        finish = ("length" if self.silent else FINISH[output.finish]) if output.finish else None
        taken = self.logprobs.take() if self.logprobs else None
        return {"index": self.index, "text": text, "logprobs": taken, "finish_reason": finish}


def _choices(job: Job, body: CompletionRequest, given: Sequence[Prompt]) -> list[Choice]:
    silent = body.max_tokens == 0
    choices = []
    for i in range(len(job.prompts) * job.params.n):
        prompt = given[i // job.params.n]
        echo = "" if not body.echo else prompt if isinstance(prompt, str) else job.served.llm.decode(prompt)
        logprobs = None if job.params.logprobs is None else TextLogprobs(job.served.llm.token_bytes)
        ids = job.prompts[i // job.params.n]
        assert isinstance(ids, tuple)  # there are no pictures in texts
        choices.append(Choice(i, echo, ids, silent, logprobs))
    return choices


def _pieces(choices: Sequence[Choice], n: int, i: int, output: Output) -> list[dict[str, Any]]:
    """The entries of `choices` that `output` of choice `i` brings. The engine tells a prompt's log-probabilities to the
    first of its n answers only; the others wait for them."""
    choice, first = choices[i], choices[i - i % n]
    if choice is not first and choice.echo and choice.logprobs and not first.begun:
        choice.held.append(output)
        return []
    if choice.begun or choice is not first:
        return [choice.piece(output)]
    answers = choices[i : i + n]
    for other in answers:
        other.places = output.prompt_logprobs
    choice.held.append(output)
    made = [other.piece(held) for other in answers for held in other.held]
    for other in answers:
        other.held.clear()
    return made


def _merge(whole: dict[str, Any], piece: dict[str, Any]) -> None:
    """Append `piece`, a later entry of the same choice, to `whole`."""
    whole["text"] += piece["text"]
    whole["finish_reason"] = piece["finish_reason"]
    if piece["logprobs"]:
        for name, column in piece["logprobs"].items():
            whole["logprobs"][name].extend(column)


async def _answer(job: Job, body: CompletionRequest, choices: Sequence[Choice]) -> dict[str, Any]:
    counts = Counts(sum(map(len, job.prompts)))
    entries: list[dict[str, Any]] = [{} for _ in choices]
    async with aclosing(answers(job, counts)) as outputs:
        async for i, output in outputs:
            for piece in _pieces(choices, job.params.n, i, output):
                entry = entries[piece["index"]]
                if entry:
                    _merge(entry, piece)
                else:
                    entry.update(piece)
    if body.max_tokens == 0:
        counts.completion = 0
    return head(job.id, "text_completion", job.served) | {"choices": entries, "usage": usage(counts)}


async def _chunks(job: Job, body: CompletionRequest, choices: Sequence[Choice]) -> AsyncGenerator[dict[str, Any], None]:
    counts = Counts(sum(map(len, job.prompts)))
    common = head(job.id, "text_completion", job.served)
    options = body.stream_options
    running = bool(options and options.continuous_usage_stats)
    with_usage = running or bool(options and options.include_usage)

    def chunks_of(i: int, output: Output) -> list[dict[str, Any]]:
        chunks = []
        for piece in _pieces(choices, job.params.n, i, output):
            if not (piece["text"] or piece["finish_reason"] or (piece["logprobs"] and piece["logprobs"]["tokens"])):
                continue  # half a character, or what may become a stop string
            chunk = common | {"choices": [piece]}
            if with_usage:
                chunk["usage"] = usage(counts) if running else None
            chunks.append(chunk)
        return chunks

    job.lane.spell = lambda output: b"".join(map(event, chunks_of(output.index, output)))
    async with aclosing(answers(job, counts)) as outputs:
        async for i, output in outputs:
            for chunk in chunks_of(i, output):
                yield chunk
    if body.max_tokens == 0:
        counts.completion = 0
    if with_usage:
        yield common | {"choices": [], "usage": usage(counts)}
