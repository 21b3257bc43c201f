"""`tenfold run`: one prompt, one answer. The text alone goes to standard output, so that it can be piped on."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tenfold.base.config import EngineConfig
from tenfold.engine.llm import LLM
from tenfold.engine.request import FinishReason, Pictured, SamplingParams
from tenfold.engine.stream import RequestFailed
from tenfold.serve.cli.load import load
from tenfold.serve.cli.terminal import Stopwatch, safe


def run(
    config: EngineConfig,
    prompt: str,
    *,
    raw: bool,
    system: str,
    images: Sequence[str],
    sampling: dict[str, Any],
    quiet: bool,
) -> None:
    """Print the answer as it is made, then its times. images: files of pictures, which come before the prompt, or raw
    where the model's own mark for one stands in it. Raises ValueError for what the engine refuses.
    """
    with load(LLM, config, quiet) as llm:
        if not raw:
            asked = llm.prompt_for(conversation(system, prompt, images))
        else:
            asked = llm.pictured(prompt, images) if images else llm.encode(prompt)
        watch = answer(llm, asked, with_defaults(llm, sampling, chat=not raw))
    if not quiet:
        print(watch, file=sys.stderr)


def conversation(system: str, text: str, images: Sequence[str] = ()) -> list[dict[str, Any]]:
    first = [{"role": "system", "content": system}] if system else []
    return [*first, {"role": "user", "content": content(text, images)}]


def content(text: str, images: Sequence[str]) -> str | list[dict[str, str]]:
    """What a user says, pictures first."""
    if not images:
        return text
    return [*({"type": "image", "image": file} for file in images), {"type": "text", "text": text}]


def with_defaults(llm: LLM, sampling: dict[str, Any], chat: bool) -> SamplingParams:
    """The model's own parameters with those of the command line. Raises ValueError for one that is out of range."""
    base = llm.default_params(chat)
    given = {name: value for name, value in sampling.items() if value is not None}
    given["stop"] = (*given.get("stop", ()), *base.stop)
    params = replace(base, **given)
    params.check(llm.vocab_size)
    return params


def answer(llm: LLM, asked: list[int] | Pictured, params: SamplingParams, said: list[str] | None = None) -> Stopwatch:
    """Print an answer as it comes, its pieces also into `said`. Raises RequestFailed when the engine cannot go on."""
    is_terminal = sys.stdout.isatty()
    watch = Stopwatch(len(asked))
    with llm.stream(asked, params) as outputs:
        for output in outputs:
            if output.finish in (FinishReason.ERROR, FinishReason.ABORT):
                raise RequestFailed(output.error or "The engine ended the request.")
            watch.take(output)
            if said is not None:
                said.append(output.text)
            sys.stdout.write(safe(output.text, is_terminal))
            sys.stdout.flush()
    sys.stdout.write("\n")
    return watch
