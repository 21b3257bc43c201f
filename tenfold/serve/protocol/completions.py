"""POST /v1/completions: its request and its response."""

from typing import Literal

from pydantic import BaseModel

from tenfold.engine.request import SamplingParams
from tenfold.serve.protocol.body import MOST, honoured, refused
from tenfold.serve.protocol.sampling import Sampling, Usage


class CompletionRequest(Sampling):
    """POST /v1/completions"""

    prompt: str | list[str] | list[int] | list[list[int]] = honoured(
        ..., "a text, a list of token ids, or up to --max-prompts (64) of either"
    )
    max_tokens: int | None = honoured(
        16, "longest answer in tokens; 16 where absent; 0 computes the prompt only", le=MOST
    )
    echo: bool | None = honoured(None, "begin the answer with the prompt; with logprobs, those of the prompt too")
    logprobs: int | None = honoured(
        None, "give the log-probability of each token and of this many likeliest ones, 0 to --max-logprobs (20)"
    )
    best_of: int | None = refused("of several answers only all are given; ask with n.", 1)
    suffix: str | None = refused("the models served continue text; they cannot fill a gap before a suffix.", "")

    def params(self, base: SamplingParams) -> SamplingParams:
        """`base` with what was given. Not yet checked. One token is made even where none is asked for, since the prompt
        has to be computed.
        """
        prompt_logprobs = self.logprobs if self.echo else None
        limit = 1 if self.max_tokens == 0 else None
        return self.sampling(base, max_tokens=limit, logprobs=self.logprobs, prompt_logprobs=prompt_logprobs)


class TextLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(BaseModel):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"]


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[TextChoice]
    usage: Usage
