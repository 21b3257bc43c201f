"""One turn of a conversation, whatever API asked for it: `Ask` says what is wanted, `Turn` runs it and gives its
answers as pieces: text, reasoning and tool calls.

Invariant: chat completions, responses and messages differ only in how they are spelt; what they mean is decided here.
"""

import asyncio
from collections.abc import AsyncGenerator, Collection
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request as HttpRequest

from tenfold.engine.request import FinishReason, Grammar, Output, SamplingParams
from tenfold.serve.errors import from_value_error, invalid
from tenfold.serve.parse.pieces import Piece, Text
from tenfold.serve.protocol.body import Terms
from tenfold.serve.protocol.sampling import check_caps
from tenfold.serve.reply import check_prompt
from tenfold.serve.service import Counts, Job, Served, answers


@dataclass(frozen=True, slots=True)
class Tool:
    """A function the model may call. parameters: a JSON schema. strict: arguments are held to it."""

    name: str
    description: str
    parameters: dict[str, Any]
    strict: bool = False


@dataclass(frozen=True, slots=True)
class Choose:
    """Whether tools are called. mode: "auto", "none", "required" or "named" (`name`). parallel: several."""

    mode: str = "auto"
    name: str = ""
    parallel: bool = True


@dataclass(frozen=True, slots=True)
class Ask:
    """A conversation to go on with.

    messages: as chat templates read them, content already text. params: not yet checked. template: keywords of
    `AsyncLLM.chat_prompt`. grammar: what the answer is held to. For error messages: where, the request's field with the
    conversation; fields, all its fields; renamed, engine names of parameters to the request's.
    """

    messages: list[dict[str, Any]]
    params: SamplingParams
    tools: tuple[Tool, ...] = ()
    choose: Choose = Choose()
    grammar: Grammar | None = None
    template: dict[str, Any] = field(default_factory=dict)
    where: str = "messages"
    fields: Collection[str] = ()
    renamed: dict[str, str] = field(default_factory=dict)


class Turn:
    """A conversation ready to run: `job` as the engine wants it, and a parser for each answer."""

    def __init__(self, served: Served, ask: Ask, job: Job) -> None:
        self.served = served
        self.ask = ask
        self.job = job
        self.counts = Counts(len(job.prompts[0]))
        self._called: set[int] = set()  # answers with a tool call in them

    async def pieces(self) -> AsyncGenerator[tuple[int, list[Piece], Output], None]:
        """(choice, what the output adds to it, the output) as the answers are made. Raises ApiError."""
        async with aclosing(answers(self.job, self.counts)) as outputs:
            async for i, output in outputs:
                yield i, [Text(output.text)] if output.text else [], output

    def finish(self, choice: int, output: Output) -> str | None:
        """OpenAI's finish_reason of a choice's last output: "stop", "length" or "tool_calls"; None before."""
        if output.finish is None:
            return None
        if output.finish is FinishReason.LENGTH:
            return "length"
        return "tool_calls" if choice in self._called else "stop"


async def open_turn(http: HttpRequest, served: Served, ask: Ask, prefix: str, terms: Terms) -> Turn:
    """A turn for `ask`. prefix: of the answer's id. Raises ApiError (400) for what cannot be done."""
    try:
        check_caps(ask.params, served.settings)
        ask.params.check(served.llm.vocab_size)
    except ValueError as error:
        raise from_value_error(error, ask.fields, ask.renamed) from None
    prompt = await asyncio.to_thread(_prompt, served, ask)  # long texts must not hold up the other streams
    return Turn(served, ask, Job.of(http, served, prefix, [prompt], ask.params, terms))


def _prompt(served: Served, ask: Ask) -> list[int]:
    try:
        ids = served.llm.chat_prompt(ask.messages, **ask.template)
    except ValueError as error:
        raise invalid(str(error), ask.where) from None
    check_prompt(ids, served, ask.where)
    return ids
