"""vLLM, where it is installed: random weights of the same shape, its own CUDA graphs and compilation, no prefix cache.

It needs the GPU for itself, so it runs in a process of its own. Its offline interface gives the time of a whole batch.
"""

import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tenfold.bench.engines import Answer, Job, Prompts, Setup, Timing, lengths
from tenfold.bench.worker import Worker
from tenfold.engine.memory import GPU_BATCH
from tenfold.weights.find import resolve
from tenfold.weights.shapes import at_least_positions, is_shape, shape_config

# In one process, without the network, and with the sampler that needs no other package.
ENVIRONMENT = {
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
MEMORY_SHARE = 0.85
BESIDE = 0.45  # of the GPU's memory where our engine is there too
STEP_TOKENS = 8192  # what its server computes together at most


class VLLM:
    """settings: arguments of `vllm.LLM` instead of ours."""

    def __init__(self, setup: Setup) -> None:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        import vllm
        from vllm import LLM, SamplingParams

        self.params = SamplingParams
        self.version: str = getattr(vllm, "__version__", "")
        options: dict[str, Any] = {
            "skip_tokenizer_init": True,
            "max_model_len": setup.context,
            "gpu_memory_utilization": MEMORY_SHARE,
            "enable_prefix_caching": False,
        }
        options |= dict(setup.settings)
        if is_shape(setup.model):
            with tempfile.TemporaryDirectory() as folder:
                (Path(folder) / "config.json").write_text(json.dumps(shape_config(setup.model)))
                self.llm = LLM(model=folder, load_format="dummy", **options)
        else:
            self.llm = LLM(model=str(resolve(setup.model)), **options)
        self.capacity = cache_tokens(self.llm)
        self.served = 0  # runs of `serve`, for names of requests

    def wanted(self, tokens: int, **more: Any) -> Any:
        """Sampling of an answer of so many tokens."""
        plain = {"temperature": 0, "ignore_eos": True, "detokenize": False}
        return self.params(max_tokens=tokens, min_tokens=tokens, **plain, **more)

    def generate(self, prompts: Prompts, tokens: int | Sequence[int]) -> Timing:
        given = [{"prompt_token_ids": list(p)} for p in prompts]
        params = [self.wanted(n) for n in lengths(prompts, tokens)]
        begin = time.perf_counter()
        outputs = self.llm.generate(given, params, use_tqdm=False)
        seconds = time.perf_counter() - begin
        return Timing(seconds, 0.0, [list(output.outputs[0].token_ids) for output in outputs])

    def serve(self, jobs: Sequence[Job]) -> list[Answer]:
        """Requests at their moments."""
        from vllm.sampling_params import RequestOutputKind

        engine, answers = self.llm.llm_engine, [Answer(job.due) for job in jobs]
        begin, coming = time.perf_counter(), 0
        self.served += 1
        while coming < len(jobs) or engine.has_unfinished_requests():
            now = time.perf_counter() - begin
            while coming < len(jobs) and jobs[coming].due <= now:
                params = self.wanted(jobs[coming].tokens, output_kind=RequestOutputKind.DELTA)
                engine.add_request(f"{self.served}-{coming}", {"prompt_token_ids": list(jobs[coming].prompt)}, params)
                coming += 1
            if not engine.has_unfinished_requests():
                time.sleep(min(0.001, max(0.0, jobs[coming].due - now)))
                continue
            for output in engine.step():
                answer = answers[int(output.request_id.partition("-")[2])]
                if new := len(output.outputs[0].token_ids):
                    answer.times.append(time.perf_counter() - begin)
                    answer.sizes.append(new)
        return answers


def beside_ours(
    model: str, longest: int, packages: str, step_tokens: int = STEP_TOKENS, batch: int = GPU_BATCH
) -> Worker:
    """vLLM as its server is set up by default, in a process that leaves half the GPU to our engine, with `batch`
    requests at a time, as many as ours. longest: tokens of a sequence. packages: folder where it finds vLLM before
    others. Raises NotInstalled where there is none.
    """
    own = {"gpu_memory_utilization": BESIDE, "max_num_seqs": batch, "max_num_batched_tokens": step_tokens}
    model = at_least_positions(model, longest) if is_shape(model) else model
    return Worker("vllm", Setup(model, context=longest, device="cuda", settings=own), packages)


def cache_tokens(llm: Any) -> int | None:
    """Tokens its KV cache holds, None where it does not say."""
    config = getattr(getattr(llm.llm_engine, "vllm_config", None), "cache_config", None)
    blocks, size = getattr(config, "num_gpu_blocks", None), getattr(config, "block_size", None)
    return blocks * size if blocks and size else None
