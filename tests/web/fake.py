"""A model made of a few lines that streams words at a pace, and knows facts about itself as a real engine does."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

from tenfold.base.config import EngineConfig
from tenfold.engine.facts import Facts, Stats
from tenfold.engine.request import FinishReason, Output, Pictured, SamplingParams
from tests.serve.conftest import FakeLLM

WORDS = ["The", "page", "shows", "what", "the", "server", "does", "while", "it", "does", "it", ",", "and", "why", "."]
CHOICES = tuple(
    {
        "operation": operation,
        "shape": shape,
        "format": "q4_1",
        "batch": batch,
        "budget": 2,
        "arm": arm,
        "microseconds": time and time * batch,
        "runner_up": "rows" if time else None,
        "runner_up_microseconds": time and time * batch * 1.2,
        "source": "measured" if time else "rule",
        "why": f"measured; rows takes {time * batch * 1.2:.1f} us" if time else "rule; not measured",
    }
    for operation, shape, arm, time in (
        ("linear", "960 x 576", "dot", 41.5),
        ("linear", "576 x 1536", "tiles", 88.2),
        ("linear", "3072 x 576", "tiles", None),
        ("attend", "9 heads of 64", "split", 12.0),
    )
    for batch in (1, 2, 4, 8)
)
MEMORY = """weights      98.41 MiB
KV cache      1.25 GiB   58240 tokens in 3640 pages of 16, 22.50 KiB a token in float16
workspace    61.20 MiB
total         1.41 GiB   of 5.02 GiB free
context           2048   tokens at most in one sequence; 28 such at a time"""


class PagedLLM(FakeLLM):
    """`pace`: seconds between words. `hold`: answers wait for it after their third word, where it is set."""

    max_model_len = 2048
    config = EngineConfig()
    state = "ready"
    restarts = 0
    pace = 0.0
    hold: asyncio.Event | None = None
    repeat = 1

    def __init__(self) -> None:
        super().__init__()
        self.running = self.generated = self.prompts = self.hits = 0
        self.border: dict[str, Any] = {}  # of Stats, where phases run side by side
        self.facts = Facts(
            config=EngineConfig(dtype="float32", kv_dtype="float16", max_batch=64, max_step_tokens=512, threads=2),
            vocab_size=49152,
            max_model_len=2048,
            pages=3640,
            family="Llama",
            device="cpu",
            kernels="native",
            kernels_reason="compiled for AVX-512 VNNI",
            memory=MEMORY,
            timeline=(("open", 0.02), ("kernels", 0.04), ("tokenizer", 0.11), ("weights", 0.28), ("warm-up", 0.06)),
            choices=CHOICES,
        )

    def stats(self) -> Stats:
        used = self.running * 40
        return Stats(
            running=self.running,
            waiting=max(0, self.running - 4),
            pages=3640,
            pages_used=used,
            pages_cached=700,
            pages_free=3640 - 700 - used,
            steps=self.generated,
            step_seconds=self.generated * 0.01,
            last_step_seconds=0.01,
            preemptions=0,
            errors=0,
            prompt_tokens=self.prompts,
            prefix_hit_tokens=self.hits,
            computed_tokens=self.prompts + self.generated,
            generated_tokens=self.generated,
            **self.border,
        )

    async def generate(
        self, prompt: Sequence[int] | Pictured, params: SamplingParams, *, request_id: str, **rest: Any
    ) -> AsyncIterator[Output]:
        words = (WORDS * self.repeat)[: params.max_tokens]
        tokens = prompt.tokens if isinstance(prompt, Pictured) else tuple(prompt)
        self.calls.append({"prompt": tokens, "params": params, "request_id": request_id} | rest)
        self.prompts += len(prompt)
        self.hits += len(prompt) // 2
        self.running += 1
        try:
            await asyncio.sleep(self.pace * 3)
            for i, word in enumerate(words):
                if self.hold is not None and i == 3:
                    await self.hold.wait()
                self.generated += 1
                finish = FinishReason.STOP if i == len(words) - 1 else None
                yield Output(request_id, 0, (i,), f"{word} ", finish=finish, cached_tokens=len(prompt) // 2)
                await asyncio.sleep(self.pace)
            self.finished.append(request_id)
        finally:
            self.running -= 1
            if request_id not in self.finished:
                self.cancelled.append(request_id)
