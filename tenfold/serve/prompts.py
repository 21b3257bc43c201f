"""Prompts as OpenAI's endpoints spell them, a text, tokens, or a list of either, made into checked token ids."""

import asyncio
from collections.abc import Sequence
from typing import Any

from tenfold.serve.errors import invalid
from tenfold.serve.reply import check_prompt
from tenfold.serve.service import Served

LONG = 4096  # characters or tokens of a request's prompts

Prompt = str | list[int]
Prompts = str | list[str] | list[int] | list[list[int]]


def each(given: Any, served: Served, param: str) -> list[Prompt]:
    """Each prompt by itself. Raises ApiError (400) for none, or for more than the server takes."""
    if isinstance(given, str):
        return [given]
    if not given:
        raise invalid(f"{param} is an empty list; give a text or at least one token.", param)
    if isinstance(given[0], int):
        return [given]
    check_count(given, served.settings.max_prompts, param, "max_prompts")
    return list(given)


def check_count(given: Sequence[Any], most: int, param: str, setting: str) -> None:
    """Raises ApiError (400) for a list longer than a setting allows."""
    if len(given) > most:
        flag = f"--{setting.replace('_', '-')}"
        raise invalid(f"{param} has {len(given)} entries; allowed: up to {most} in one request ({flag}).", param)


async def encode_all(prompts: Sequence[Prompt], served: Served, param: str, answer: bool = True) -> list[list[int]]:
    """Token ids of all. answer: room for one is needed. Raises ApiError (400)."""

    def work() -> list[list[int]]:
        return [_encode(prompt, served, param, answer) for prompt in prompts]

    # Long texts must not hold up other streams; short ones are done sooner than a thread is there.
    return work() if sum(map(len, prompts)) < LONG else await asyncio.to_thread(work)


def _encode(prompt: Prompt, served: Served, param: str, answer: bool) -> list[int]:
    try:
        ids = served.llm.encode(prompt) if isinstance(prompt, str) else prompt
    except ValueError as error:
        raise invalid(str(error), param) from None
    check_tokens(ids, served, param)
    check_prompt(ids, served, param, answer)
    return ids


def check_tokens(ids: Sequence[int], served: Served, param: str) -> None:
    """Raises ApiError (400) for a token the model does not have."""
    vocab = served.llm.vocab_size
    wrong = next((token for token in ids if not 0 <= token < vocab), None)
    if wrong is not None:
        raise invalid(f"{param} has the token {wrong}; allowed: 0 to {vocab - 1}.", param)
