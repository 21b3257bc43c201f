"""The part of a response that says how it was asked for."""

from typing import Any

from tenfold.engine.request import SamplingParams
from tenfold.serve.protocol.responses import ResponsesRequest
from tenfold.serve.service import Served

SAME = (
    *("instructions", "previous_response_id", "max_output_tokens", "max_tool_calls", "user", "safety_identifier"),
    "prompt_cache_key",
)


def echo(body: ResponsesRequest, served: Served, params: SamplingParams, store: bool) -> dict[str, Any]:
    """Fields of the response that do not change while it is made. params: with which it is made. store: whether it is
    kept.
    """
    text, reasoning = body.text, body.reasoning
    return {name: getattr(body, name) for name in SAME} | {
        "model": served.name,
        "tools": [_tool(tool) for tool in body.tools or ()],
        "tool_choice": "auto" if body.tool_choice is None else body.tool_choice,
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "text": {"format": (text and text.format) or {"type": "text"}, "verbosity": text and text.verbosity},
        "reasoning": {"effort": reasoning and reasoning.effort, "summary": None},
        "truncation": body.truncation or "disabled",
        "temperature": params.temperature,
        "top_p": params.top_p,
        "presence_penalty": params.presence_penalty,
        "frequency_penalty": params.frequency_penalty,
        "top_logprobs": params.logprobs or 0,
        "metadata": body.metadata or {},
        "store": store,
        "background": bool(body.background),
        "service_tier": "default",
    }


def _tool(given: dict[str, Any]) -> dict[str, Any]:
    return {"description": None, "parameters": None, "strict": False} | given
