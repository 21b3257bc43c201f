"""Hugging Face transformers in three forms, all from our checkpoint's own weights: a bare loop with its cache, its
`generate`, and its static cache with a compiled decode step.

float32 on a CPU, bfloat16 on a GPU. One model in memory serves all forms that live in a process.
"""

import inspect
import os
import shlex
import shutil
import time
from collections.abc import Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from tenfold.bench.engines import NotInstalled, Prompts, Setup, Stopwatch, Timing, one_length
from tenfold.ops.blocks import dequantize
from tenfold.ops.matrix import Deferred
from tenfold.weights.find import resolve
from tenfold.weights.open import open_checkpoint

CACHE_STEP = 128  # static caches are a multiple of this many tokens, as attention kernels like them

_models: WeakValueDictionary[tuple[str, str], Any] = WeakValueDictionary()


def reference_model(model: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """A transformers model with our checkpoint's weights, dequantised. Raises where one is missing."""
    from transformers import AutoConfig, AutoModelForCausalLM

    checkpoint = open_checkpoint(resolve(model))
    settings = dict(checkpoint.config)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    with torch.device("meta"):
        reference = AutoModelForCausalLM.from_config(config, dtype=dtype)
    state = {}
    for name in checkpoint.names():
        raw = checkpoint.tensor(name)
        # Vectors are made on the CPU, as the engine makes them: then both have the same random numbers.
        raw = raw.on(device) if isinstance(raw, Deferred) and len(raw.shape) == 2 else raw
        state[name] = dequantize(raw, dtype).to(device)
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    reference.load_state_dict(state, assign=True)
    # Rotary tables are buffers that no checkpoint holds; build them again off the meta device.
    reference.model.rotary_emb = type(reference.model.rotary_emb)(config).to(device)
    return reference.eval()


def shared_model(setup: Setup) -> Any:
    """The model of a setup, which engines of one process share."""
    if setup.threads and setup.device == "cpu":
        torch.set_num_threads(setup.threads)
    key = (setup.model, setup.device)
    found = _models.get(key)
    if found is None:
        dtype = torch.float32 if setup.device == "cpu" else torch.bfloat16
        found = _models[key] = reference_model(setup.model, setup.device, dtype)
    return found


class Loop:
    """A bare greedy loop around the model and its growing cache: the least a script can do."""

    def __init__(self, setup: Setup) -> None:
        self.model = shared_model(setup)
        self.device = setup.device
        self.capacity: int | None = None

    def generate(self, prompts: Prompts, tokens: int | Sequence[int]) -> Timing:
        count = one_length(prompts, tokens, "The transformers loop")
        found: list[list[int]] = [[] for _ in prompts]
        with torch.inference_mode():
            ids = torch.tensor([list(p) for p in prompts], device=self.device)
            watch = Stopwatch()
            out = self.model(ids, use_cache=True, logits_to_keep=1)
            for step in range(count):
                best = out.logits[:, -1].argmax(-1)
                for row, token in zip(found, best.tolist()):
                    row.append(token)
                if step == 0:
                    watch.mark()
                if step < count - 1:
                    out = self.model(best[:, None], use_cache=True, **{cache_argument(self.model): cache_of(out)})
            watch.mark()
        return watch.timing(found)


class Generate:
    """`model.generate`, eager, greedy: what a user of transformers runs."""

    def __init__(self, setup: Setup) -> None:
        self.model = shared_model(setup)
        self.device = setup.device
        self.capacity: int | None = None

    def generate(self, prompts: Prompts, tokens: int | Sequence[int]) -> Timing:
        count = one_length(prompts, tokens, "transformers' generate")
        ids = torch.tensor([list(p) for p in prompts], device=self.device)
        settings = self.model.generation_config
        settings.eos_token_id = None
        settings.pad_token_id = 0
        begin = time.perf_counter()
        out = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, use_cache=True
        )
        found = out[:, ids.shape[1] :].tolist()
        return Timing(time.perf_counter() - begin, 0.0, found)  # it does not say when its first token came


class Compiled:
    """Static cache and a decode step compiled with `torch.compile(mode="reduce-overhead")`; the prefill is eager.

    Every batch size and cache length compiles anew, which takes up to a minute. settings: arguments of torch.compile
    instead of the mode.
    """

    def __init__(self, setup: Setup) -> None:
        """Raises NotInstalled where torch.compile finds no compiler."""
        if not setup.settings and not any(map(shutil.which, compilers(setup.device))):
            raise NotInstalled(
                f"torch.compile calls {' or '.join(compilers(setup.device))}, and there is none; install it, or take "
                "hf-generate alone."
            )
        self.model = shared_model(setup)
        self.device = setup.device
        self.capacity: int | None = None
        options = dict(setup.settings) or {"mode": "reduce-overhead"}
        self.step = torch.compile(self._step, fullgraph=True, dynamic=False, **options)
        self._caches: dict[tuple[int, int], Any] = {}
        self._longest = 0

    def _step(self, token: Tensor, position: Tensor, cache: Any) -> Tensor:
        """token [B, 1], position [1, 1] -> the next token [B, 1]."""
        out = self.model(token, position_ids=position, use_cache=True, **{cache_argument(self.model): cache})
        return out.logits[:, -1:].argmax(-1)

    def _cache(self, batch: int, tokens: int) -> Any:
        """An empty static cache; the one of the batch size before is used again while it is long enough."""
        from transformers import StaticCache

        room = -(-tokens // CACHE_STEP) * CACHE_STEP
        fitting = [size for size in self._caches if size[0] == batch and room <= size[1] <= 2 * room]
        if fitting:
            cache = self._caches[fitting[0]]
            cache.reset()
            return cache
        self._caches.clear()
        self._caches[batch, room] = StaticCache(config=self.model.config, max_cache_len=room)
        return self._caches[batch, room]

    def generate(self, prompts: Prompts, tokens: int | Sequence[int]) -> Timing:
        count, prompt = one_length(prompts, tokens, "The compiled transformers loop"), len(prompts[0])
        # Short runs come first, to warm up; the cache must do for the long ones, too, or each would compile anew.
        self._longest = max(self._longest, count)
        steps: list[Tensor] = []
        with torch.no_grad():
            ids = torch.tensor([list(p) for p in prompts], device=self.device)
            cache = self._cache(len(prompts), prompt + max(self._longest, CACHE_STEP + 1))
            watch = Stopwatch()
            out = self.model(ids, use_cache=True, logits_to_keep=1, **{cache_argument(self.model): cache})
            token = out.logits[:, -1:].argmax(-1)
            steps.append(token)
            token.tolist()  # the first token is there
            watch.mark()
            position = torch.full((1, 1), prompt, device=self.device)
            for _ in range(count - 1):
                if self.device != "cpu":
                    torch.compiler.cudagraph_mark_step_begin()
                token = self.step(token, position, cache).clone()
                steps.append(token)
                position += 1
            found = torch.cat(steps, dim=1).tolist()
            watch.mark()
        return watch.timing(found)


def compilers(device: str) -> list[str]:
    """Programs of which torch.compile needs one: C++ for kernels of a CPU, C for what launches a GPU's."""
    kind, usual = ("CXX", ["g++"]) if device == "cpu" else ("CC", ["gcc", "clang"])
    return shlex.split(os.environ.get(kind, ""))[:1] or usual


def cache_argument(model: Any) -> str:
    """The name under which a forward takes its cache, which transformers changed."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def cache_of(out: Any) -> Any:
    found = getattr(out, "cache", None)
    return out.past_key_values if found is None else found
