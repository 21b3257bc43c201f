"""Engines under one interface for paired runs: Tenfold, llama.cpp and Hugging Face transformers.

Each answers `generate(prompts, tokens)`: greedy continuation of every prompt by `tokens` tokens, as one batch, and the
seconds until every prompt had its first token (prefill) and of the rest (decode). Every engine is driven at its best:
llama.cpp through its C interface with its own sampler, transformers with its cache and a bare loop.
"""

import ctypes
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tenfold.base.table import entry


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of wall clock for both phases, and the tokens produced."""

    prefill: float
    decode: float
    tokens: list[list[int]]


class Engine(Protocol):
    def generate(self, prompts: Sequence[Sequence[int]], tokens: int) -> Timing: ...


class _Stopwatch:
    def __init__(self) -> None:
        self.marks = [time.perf_counter()]

    def mark(self) -> None:
        self.marks.append(time.perf_counter())

    def timing(self, tokens: list[list[int]]) -> Timing:
        begin, first, end = self.marks
        return Timing(first - begin, end - first, tokens)


class Tenfold:
    """The whole engine: scheduler, paged cache, sampler and detokeniser, as a server would run it."""

    def __init__(self, model: str, threads: int, batch: int, context: int) -> None:
        from tenfold.base.config import EngineConfig
        from tenfold.engine.core import Engine as Core

        self.core = Core.load(
            EngineConfig(model=model, threads=threads, max_batch=batch, max_model_len=context, prefix_cache=False)
        )
        self.count = 0

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int) -> Timing:
        from tenfold.engine.request import Request, SamplingParams

        params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        found: dict[str, list[int]] = {}
        watch = _Stopwatch()
        for prompt in prompts:
            self.count += 1
            request = Request(str(self.count), tuple(prompt), params)
            found[request.id] = []
            self.core.add(request)
        first = False
        while self.core.has_work:
            for output in self.core.step():
                if output.error:
                    raise RuntimeError(output.error)
                found[output.request_id].extend(output.tokens)
            if not first and all(found.values()):
                first = True
                watch.mark()
        watch.mark()
        return watch.timing(list(found.values()))


class LlamaCpp:
    """llama.cpp through the C functions that llama-cpp-python exposes."""

    def __init__(self, model: str, threads: int, batch: int, context: int) -> None:
        import llama_cpp

        self.api = api = llama_cpp
        silence(api)
        api.llama_backend_init()
        settings = api.llama_model_default_params()
        self.model = api.llama_model_load_from_file(model.encode(), settings)
        if not self.model:
            raise ValueError(f"llama.cpp cannot load {model}; it reads GGUF files only.")
        options = api.llama_context_default_params()
        options.n_ctx = context * batch
        options.n_batch = options.n_ubatch = 512
        options.n_seq_max = batch
        options.n_threads = options.n_threads_batch = threads
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

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int) -> Timing:
        api = self.api
        api.llama_memory_clear(api.llama_get_memory(self.context), True)
        found: list[list[int]] = [[] for _ in prompts]
        entries = [(t, p, s, p == len(prompt) - 1) for s, prompt in enumerate(prompts) for p, t in enumerate(prompt)]
        watch = _Stopwatch()
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


class HuggingFace:
    """transformers in float32 from the same weights, dequantised."""

    def __init__(self, model: str, threads: int, batch: int, context: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self.torch = torch
        self.model = reference_model(model)

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int) -> Timing:
        if len({len(p) for p in prompts}) != 1:
            raise ValueError("The transformers loop takes prompts of one length.")
        torch = self.torch
        found: list[list[int]] = [[] for _ in prompts]
        with torch.inference_mode():
            ids = torch.tensor([list(p) for p in prompts])
            watch = _Stopwatch()
            out = self.model(ids, use_cache=True, logits_to_keep=1)
            for step in range(tokens):
                best = out.logits[:, -1].argmax(-1)
                for row, token in zip(found, best.tolist()):
                    row.append(token)
                if step == 0:
                    watch.mark()
                if step < tokens - 1:
                    out = self.model(best[:, None], past_key_values=out.past_key_values, use_cache=True)
            watch.mark()
        return watch.timing(found)


def reference_model(model: str) -> Any:
    """A transformers model in float32 with our checkpoint's weights, dequantised. Raises where one is missing."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from tenfold.ops.blocks import dequantize
    from tenfold.weights.find import resolve
    from tenfold.weights.open import open_checkpoint

    checkpoint = open_checkpoint(resolve(model))
    settings = dict(checkpoint.config)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    with torch.device("meta"):
        reference = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    state = {name: dequantize(checkpoint.tensor(name), torch.float32) for name in checkpoint.names()}
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    reference.load_state_dict(state, assign=True)
    # Rotary tables are buffers that no checkpoint holds; build them again off the meta device.
    reference.model.rotary_emb = type(reference.model.rotary_emb)(config)
    return reference.eval()


ENGINES = {
    "tenfold": "tenfold.bench.engines:Tenfold",
    "llama.cpp": "tenfold.bench.engines:LlamaCpp",
    "hf": "tenfold.bench.engines:HuggingFace",
}


def make_engine(name: str, model: str | Path, threads: int, batch: int, context: int) -> Engine:
    """Build an engine by name. Raises ValueError for an unknown name, ImportError for a peer not installed."""
    engine: Engine = entry(ENGINES, name, "engine")(str(model), threads, batch, context)
    return engine
