"""llama.cpp on a CPU, through its C interface with its own sampler."""

import ctypes
from collections.abc import Sequence
from typing import Any

from tenfold.bench.engines import Prompts, Setup, Stopwatch, Timing, one_length
from tenfold.weights.find import resolve


class LlamaCpp:
    """llama.cpp through the C functions that llama-cpp-python exposes."""

    capacity: int | None

    def __init__(self, setup: Setup) -> None:
        import llama_cpp

        model = str(resolve(setup.model))
        self.api = api = llama_cpp
        silence(api)
        api.llama_backend_init()
        settings = api.llama_model_default_params()
        self.model = api.llama_model_load_from_file(model.encode(), settings)
        if not self.model:
            raise ValueError(f"llama.cpp cannot load {model}; it reads GGUF files only.")
        options = api.llama_context_default_params()
        self.capacity = options.n_ctx = setup.cached
        options.n_batch = options.n_ubatch = 512
        options.n_seq_max = setup.batch
        options.n_threads = options.n_threads_batch = setup.threads
        self.context = api.llama_init_from_model(self.model, options)
        self.batch = api.llama_batch_init(512, 0, 1)
        self.sampler = api.llama_sampler_init_greedy()

    def _run(self, entries: Sequence[tuple[int, int, int, bool]]) -> None:
        """Decode (token, position, sequence, wants logits) entries in one call."""
        batch = self.batch
        batch.n_tokens = len(entries)
        for i, (token, position, sequence, logits) in enumerate(entries):
            batch.token[i] = token
            batch.pos[i] = position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = logits
        if self.api.llama_decode(self.context, batch) != 0:
            raise RuntimeError("llama_decode failed")

    def generate(self, prompts: Prompts, tokens: int | Sequence[int]) -> Timing:
        api, tokens = self.api, one_length(prompts, tokens, "llama.cpp")
        api.llama_memory_clear(api.llama_get_memory(self.context), True)
        found: list[list[int]] = [[] for _ in prompts]
        entries = [(t, p, s, p == len(prompt) - 1) for s, prompt in enumerate(prompts) for p, t in enumerate(prompt)]
        watch = Stopwatch()
        for start in range(0, len(entries), 512):
            chunk = entries[start : start + 512]
            self._run(chunk)
            for i, (_, _, sequence, last) in enumerate(chunk):
                if last:
                    found[sequence].append(api.llama_sampler_sample(self.sampler, self.context, i))
        watch.mark()
        for step in range(tokens - 1):
            self._run([(found[s][-1], len(prompt) + step, s, True) for s, prompt in enumerate(prompts)])
            for s in range(len(prompts)):
                found[s].append(api.llama_sampler_sample(self.sampler, self.context, s))
        watch.mark()
        return watch.timing(found)


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
def _silent(level: int, text: bytes, data: Any) -> None:
    """A log function for llama.cpp that says nothing."""


def silence(api: Any) -> None:
    """Keep llama.cpp's log off the terminal."""
    api.llama_log_set(_silent, ctypes.c_void_p(0))
