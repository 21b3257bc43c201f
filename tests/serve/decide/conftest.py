"""A language model whose opinions are written down: it answers a prompt with the log-probabilities a test gives it."""

import math
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import pytest

from tenfold.engine.request import FinishReason, Logprob, Output, SamplingParams
from tenfold.serve.app import create_app
from tenfold.serve.settings import ServeConfig
from tests.serve.conftest import Client, FakeLLM

WORDS = (b"Yes", b" yes", b"NO", b"No")  # tokens 256 and on; below stand single bytes


class Opinionated(FakeLLM):
    """opinion(text of the prompt) -> weight of what a token says; everything else weighs next to nothing."""

    vocab_size = 256 + len(WORDS)
    max_model_len = 16384

    def __init__(self, opinion: Callable[[str], dict[str, float]]) -> None:
        super().__init__()
        self.opinion = opinion
        self.texts: list[str] = []

    def token_bytes(self, token: int) -> bytes:
        return bytes([token]) if token < 256 else WORDS[token - 256]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return b"".join(map(self.token_bytes, ids)).decode()

    async def generate(
        self, prompt: Sequence[int], params: SamplingParams, *, request_id: str, **rest: Any
    ) -> AsyncIterator[Output]:
        self.calls.append({"prompt": tuple(prompt), "params": params, "request_id": request_id} | rest)
        if self.fail is not None:
            raise self.fail
        text = self.decode(prompt)
        self.texts.append(text)
        weights = self.opinion(text)
        asked = [math.log(weights.get(self.token_bytes(t).decode(), 1e-20)) for t in params.logprob_token_ids]
        places = (Logprob(65, asked[0], (), tuple(asked)),)
        yield Output(request_id, 0, (65,), "A", places, None, FinishReason.LENGTH, cached_tokens=3)


@pytest.fixture
def ask() -> Callable[..., tuple[Client, Opinionated]]:
    def make(opinion: Callable[[str], dict[str, float]], **settings: Any) -> tuple[Client, Opinionated]:
        llm = Opinionated(opinion)
        return Client(create_app({"tiny": llm}, ServeConfig(**settings))), llm  # type: ignore[dict-item]

    return make
