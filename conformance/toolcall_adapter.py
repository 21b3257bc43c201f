"""Tenfold's parser as an engine of `canitoolcall run --engine conformance.toolcall_adapter:TenfoldAdapter`.

The package's own tokenizers are on a hub, so there are none here: a fixture's recorded text is cut into small runs of
characters that stand in for tokens; the markers are never cut, as no engine cuts a special token. `char:` strategies
cut them, too.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from canitoolcall.adapters.base import Adapter, ReplayInput, Support, ToolSpec
from canitoolcall.results import ParseResult, StreamAccumulator

import tenfold
from tenfold.serve.parse.dialect import DIALECTS, Dialect
from tenfold.serve.parse.parser import Parser
from tenfold.serve.parse.pieces import CallArguments, CallBegin, Piece, Reasoning

# Part of a fixture's model name, its dialect and the markers of its reasoning; the first that fits counts.
THINK = ("<think>", "</think>")
BRACKETS = ("[THINK]", "[/THINK]")
MODELS: tuple[tuple[str, str, tuple[str, str] | None], ...] = (
    ("Qwen3-Coder", "qwen-xml", None),
    ("Qwen3.", "qwen-xml", THINK),
    ("Qwen3-Next", "qwen-xml", THINK),
    ("Qwen", "hermes", THINK),
    ("Llama-3", "llama", None),
    ("Llama-4", "pythonic", None),
    ("Magistral-Small-2506", "mistral", THINK),
    ("Magistral", "mistral", BRACKETS),
    ("Ministral-3", "mistral", BRACKETS),
    ("Mistral-Small-4", "mistral", BRACKETS),
    ("Mistral-Medium-3.5", "mistral", BRACKETS),
    ("mistralai/", "mistral", None),
    ("DeepSeek-V3-0324", "deepseek", None),
    ("DeepSeek-R1", "deepseek", THINK),
    ("DeepSeek-V3.1", "deepseek-v3.1", THINK),
)
XML_FAMILY = "qwen3-xml"

# Fixtures in which a call breaks off after its name and a part of its arguments were streamed. The suite wants no call
# then; whoever streams arguments while they are made has told of it already. As OpenAI's API does, Tenfold leaves the
# arguments open, which no JSON parser takes for whole, and says "length" where the answer was cut off.
BROKEN_OFF = frozenset(
    {
        "deepseek/v3-truncated-mid-arguments",
        "deepseek/v31-truncated-mid-arguments",
        "deepseek/vllm-v3-malformed-missing-brace",
        "llama/l3-truncated-inside-parameters",
        "mistral/v13think-truncated-in-arguments",
        "qwen3-hermes/bug-sglang-30480-truncated-mid-arguments",
        "qwen3-hermes/truncated-mid-arguments-no-thinking",
        "qwen3-hermes/truncated-mid-arguments-thinking",
        "qwen3-hermes/truncated-second-parallel-call",
        "qwen3-hermes/vllm-invalid-json-missing-brace",
        "qwen3-xml/q38-truncated-in-parameter",
    }
)


def dialect_of(family: str, model: str) -> Dialect | None:
    for part, name, think in MODELS:
        if part in model:
            name = "qwen-xml" if family == XML_FAMILY else name
            return replace(DIALECTS[name], think=think)
    return None


class TenfoldAdapter(Adapter):
    name = "tenfold"
    pinned_version = tenfold.__version__
    supports_text_deltas = True

    def version(self) -> str:
        return tenfold.__version__

    def supports(self, family: str, model: str) -> Support:
        if dialect_of(family, model) is None:
            return Support(False, "Tenfold does not serve this family")
        return Support(True)

    def parser_config(self, raw: ReplayInput) -> dict[str, Any]:
        dialect = dialect_of(raw.family, raw.model)
        assert dialect is not None
        return {"dialect": dialect.name, "think": dialect.think}

    def units(self, raw: ReplayInput) -> list[int]:
        return list(range(len(self._tokens(raw))))

    def special_token_ids(self, raw: ReplayInput) -> Collection[int]:
        dialect = dialect_of(raw.family, raw.model)
        assert dialect is not None
        return {i for i, token in enumerate(self._tokens(raw)) if token in dialect.markers}

    def parse(self, raw: ReplayInput, tools: Sequence[ToolSpec]) -> ParseResult:
        return self._parse(raw, [raw.text], tools)

    def parse_stream(self, raw: ReplayInput, chunks: Sequence[Sequence[int]], tools: Sequence[ToolSpec]) -> ParseResult:
        tokens = self._tokens(raw)
        return self._parse(raw, ["".join(tokens[i] for i in chunk) for chunk in chunks], tools)

    def parse_stream_text(self, raw: ReplayInput, deltas: Sequence[str], tools: Sequence[ToolSpec]) -> ParseResult:
        return self._parse(raw, deltas, tools)

    def _tokens(self, raw: ReplayInput) -> list[str]:
        dialect = dialect_of(raw.family, raw.model)
        assert dialect is not None
        markers = "|".join(re.escape(m) for m in sorted(dialect.markers, key=len, reverse=True))
        return [m.group() for m in re.finditer(rf"{markers}|\s?\w{{1,4}}|.", raw.text, re.DOTALL)]

    def _parse(self, raw: ReplayInput, texts: Sequence[str], tools: Sequence[ToolSpec]) -> ParseResult:
        dialect = dialect_of(raw.family, raw.model)
        assert dialect is not None
        offered = {t["function"]["name"]: t["function"].get("parameters", {}) for t in tools}
        prompt = (raw.generation_prompt or "").rstrip()
        thinking = dialect.think is not None and prompt.endswith(dialect.think[0])
        parser = Parser(dialect, offered, thinking=thinking)
        answer = StreamAccumulator()
        for text in texts:
            _add(answer, parser.feed(text))
        _add(answer, parser.end())
        return answer.result()


def _add(answer: StreamAccumulator, pieces: Sequence[Piece]) -> None:
    for piece in pieces:
        if isinstance(piece, CallBegin):
            answer.add_tool_call(piece.number, name=piece.name)
        elif isinstance(piece, CallArguments):
            answer.add_tool_call(piece.number, arguments=piece.text)
        elif isinstance(piece, Reasoning):
            answer.add_reasoning(piece.text)
        else:
            answer.add_content(piece.text)
