"""One turn of a conversation, whatever API asked for it: `Ask` says what is wanted, `Turn` runs it and gives its
answers as pieces: text, reasoning and tool calls.

Invariant: chat completions, responses and messages differ only in how they are spelt; what they mean is decided here.
A turn without tools and reasoning costs its tokens next to nothing: there is no parser in it.
"""

from collections.abc import AsyncGenerator, Callable, Collection, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from starlette.requests import Request as HttpRequest

from tenfold.base.pictures import PictureError
from tenfold.engine.request import FinishReason, Grammar, Output, Pictured, SamplingParams
from tenfold.serve import sight
from tenfold.serve.conversation import Choose, Tool, shaped
from tenfold.serve.errors import ApiError, from_value_error, invalid
from tenfold.serve.fetch import Fetcher
from tenfold.serve.parse.dialect import Dialect, dialect_for
from tenfold.serve.parse.parser import Parser
from tenfold.serve.parse.pieces import Piece, Reasoning, Text
from tenfold.serve.protocol.body import Terms
from tenfold.serve.protocol.sampling import check_caps
from tenfold.serve.reply import check_prompt
from tenfold.serve.service import Counts, Job, Served, answers
from tenfold.serve.structured import Held

__all__ = ["Ask", "Choose", "Tool", "Turn", "count_prompt", "manner_of", "open_turn"]

TAIL = 16  # tokens at the end of a prompt that tell whether it opens the reasoning


@dataclass(frozen=True, slots=True)
class Ask:
    """A conversation to go on with.

    messages: as chat templates read them, content text, or parts where there are pictures (`sight`). params: not
    yet checked. template: keywords of `AsyncLLM.chat_prompt`. grammar: what the answer is held to. reasoning: "split"
    from the text, "drop", or "keep" in the text as the model wrote it. For error messages: where, the request's field
    with the conversation; fields, all its fields; renamed, engine names of parameters to the request's; held_by, the
    field that `grammar` comes from.
    """

    messages: list[dict[str, Any]]
    params: SamplingParams
    tools: tuple[Tool, ...] = ()
    choose: Choose = field(default_factory=Choose)
    grammar: Grammar | None = None
    reasoning: str = "split"
    template: dict[str, Any] = field(default_factory=dict)
    where: str = "messages"
    fields: Collection[str] = ()
    renamed: dict[str, str] = field(default_factory=dict)
    held_by: str = "response_format"

    @property
    def offered(self) -> tuple[Tool, ...]:
        """The tools that the model is told of."""
        return () if self.choose.mode == "none" else self.tools


@dataclass(frozen=True, slots=True)
class Manner:
    """How a model writes. specials: its special tokens, text to id."""

    dialect: Dialect
    specials: Mapping[str, int]


def manner_of(served: Served) -> Manner:
    """Found out once for each model."""
    if served.manner is None:
        text = getattr(served.llm, "text", None)
        tokenizer = getattr(text, "tokenizer", None)
        added = tokenizer.get_added_tokens_decoder() if tokenizer is not None else {}
        family = getattr(getattr(served.llm, "facts", None), "family", "")
        dialect = dialect_for(str(family), getattr(text, "template", None) or "", {t.content for t in added.values()})
        specials = {token.content: id for id, token in added.items() if token.special}
        served.manner = Manner(dialect, specials)
    manner: Manner = served.manner
    return manner


class Turn:
    """A conversation ready to run: `job` as the engine wants it, and a parser for each answer that needs one."""

    def __init__(self, served: Served, ask: Ask, job: Job, parsers: list[Parser] | None = None) -> None:
        self.served = served
        self.ask = ask
        self.job = job
        self.counts = Counts(len(job.prompts[0]))
        self._parsers = parsers
        self._called: set[int] = set()  # answers with a tool call in them

    async def pieces(self) -> AsyncGenerator[tuple[int, list[Piece], Output], None]:
        """(choice, what the output adds to it, the output) as the answers are made. Raises ApiError."""
        async with aclosing(answers(self.job, self.counts)) as outputs:
            async for i, output in outputs:
                yield i, self.read(i, output), output

    def read(self, choice: int, output: Output) -> list[Piece]:
        """What the next output of a choice adds to it."""
        if self._parsers is None:
            return [Text(output.text)] if output.text else []
        return self._parsed(choice, self._parsers[choice], output)

    def _parsed(self, choice: int, parser: Parser, output: Output) -> list[Piece]:
        thinking, calls = parser.reasoning, parser.calls
        pieces = parser.feed(output.text)
        if output.finish is not None:
            pieces = pieces + parser.end()
        if thinking or parser.reasoning:
            self.counts.reasoning += len(output.tokens)
        if parser.calls != calls:
            self._called.add(choice)
        if self.ask.reasoning == "drop" and pieces:
            return [piece for piece in pieces if not isinstance(piece, Reasoning)]
        return pieces

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
    # Long texts and large grammars must not hold up the other streams.
    pictured = await sight.fetch(ask.messages, served)
    prompt, params, parsers = await sight.aside(pictured, _prepared, served, ask)
    return Turn(served, ask, Job.of(http, served, prefix, [prompt], params, terms), parsers)


async def count_prompt(served: Served, ask: Ask) -> int:
    """Tokens of the prompt for `ask`, however long it is. Raises ApiError (400)."""
    pictured = await sight.fetch(ask.messages, served)
    return len(await sight.aside(pictured, _prompt, served, ask, manner_of(served).dialect))


def _prepared(served: Served, ask: Ask) -> tuple[list[int] | Pictured, SamplingParams, list[Parser] | None]:
    manner = manner_of(served)
    dialect = manner.dialect if ask.reasoning != "keep" else replace(manner.dialect, think=None)
    prompt = _prompt(served, ask, dialect)
    check_prompt(prompt, served, ask.where)
    tokens = prompt.tokens if isinstance(prompt, Pictured) else prompt
    thinking = _thinking(served, manner.dialect, tokens)
    params = replace(ask.params, grammar=_grammar(served, ask, Held(manner.dialect, manner.specials, thinking)))
    if not ask.offered and dialect.think is None:
        return prompt, params, None
    dropped: Collection[str] = ()
    if params.skip_special_tokens and any(marker in manner.specials for marker in _read(dialect, ask)):
        params = replace(params, skip_special_tokens=False)
        dropped = manner.specials
    return prompt, params, [_parser(ask, dialect, thinking == "open", tuple(dropped)) for _ in range(params.n)]


def _read(dialect: Dialect, ask: Ask) -> tuple[str, ...]:
    """The markers that the parser has to see."""
    return dialect.markers if ask.offered else dialect.think or ()


def _parser(ask: Ask, dialect: Dialect, thinking: bool, dropped: tuple[str, ...]) -> Parser:
    tools = {tool.name: tool.parameters for tool in ask.offered}
    one = not ask.choose.parallel
    return Parser(dialect, tools, thinking=thinking and dialect.think is not None, one=one, dropped=dropped)


def _prompt(served: Served, ask: Ask, dialect: Dialect) -> list[int] | Pictured:
    messages, more = shaped(ask.messages, ask.offered, dialect)
    try:
        if sight.shown(messages):
            limits = Fetcher.of(served.settings).limits
            return served.llm.pictured_chat(messages, limits=limits, **ask.template, **more)
        return served.llm.chat_prompt(messages, **ask.template, **more)
    except PictureError as error:
        raise sight.refused(error, ask.where) from None
    except ValueError as error:
        raise invalid(str(error), ask.where) from None


def _thinking(served: Served, dialect: Dialect, prompt: Sequence[int]) -> str:
    """ "open" where the prompt ends in an open reasoning, "may" where the model may open one, else ""."""
    if dialect.think is None:
        return ""
    tail = served.llm.decode(prompt[-TAIL:], False).rstrip()
    if tail.endswith(dialect.think[0]):
        return "open"
    return "" if tail.endswith(dialect.think[1]) else "may"


def _grammar(served: Served, ask: Ask, held: Held) -> Grammar | None:
    """What the answer is held to, checked. Raises ApiError (400) with the reason for what cannot be held."""
    parallel = ask.choose.parallel
    if ask.offered and ask.choose.mode in ("required", "named"):
        return _forced(served, ask, held)
    if ask.grammar is not None:
        given = ask.grammar
        checked_grammar(served, lambda: given, ask.held_by)  # by itself first, for its own message
        if ask.offered:
            return checked_grammar(served, lambda: held.may_call(ask.offered, parallel, given), "tools")
        return checked_grammar(served, lambda: held.answer(given), ask.held_by) if held.thinking else given
    if any(tool.strict for tool in ask.offered):
        return checked_grammar(served, lambda: held.may_call(ask.offered, parallel), "tools")
    return None


def _forced(served: Served, ask: Ask, held: Held) -> Grammar | None:
    """Calls and nothing else. A schema that cannot be held to is an error where it was promised, by strict."""
    named = ask.choose.mode == "named"
    tools = [tool for tool in ask.tools if not named or tool.name == ask.choose.name]
    parallel = ask.choose.parallel and not named
    try:
        return checked_grammar(served, lambda: held.must_call(tools, parallel), "tools")
    except ApiError:
        if held.dialect.writing is None or any(tool.strict for tool in tools):
            raise
    return checked_grammar(served, lambda: held.must_call(tools, parallel, loose=True), "tools")


def checked_grammar(served: Served, make: Callable[[], Grammar | None], param: str) -> Grammar | None:
    """What `make` gives, if the engine can hold to it; blocking. Raises ApiError (400) with the reason."""
    try:
        grammar = make()
        if grammar is not None:
            served.llm.check_grammar(grammar)
    except ValueError as error:
        raise invalid(str(error), param) from None
    return grammar
