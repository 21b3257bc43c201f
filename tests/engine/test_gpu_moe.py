"""Models with experts on a CUDA device: logits near those in float32, steps recorded, answers the same in lanes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tenfold.base.config import EngineConfig
from tenfold.engine.core import Engine
from tenfold.engine.request import Request, SamplingParams
from tenfold.models.table import build_model
from tenfold.ops.oracle import Oracle
from tenfold.weights.load import Weights
from tenfold.weights.open import open_checkpoint
from tests.engine import fake
from tests.steps import Sequences, make_store
from tests.tiny import EXPERTS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PROMPTS = {0: [5, 9, 31, 7], 1: [8], 2: list(range(20, 75))}


@pytest.mark.parametrize("mode", ["auto", "q8_0", "int4", "int8"])
@pytest.mark.parametrize("name", EXPERTS)
def test_logits_are_near_those_in_float32(name: str, mode: str, tiny: Callable[[str], Path]) -> None:
    """Of prompts, then of decodes after them; a random model turns roundings of bfloat16 into a few per cent."""
    from tenfold.ops.gpu.native import Gpu

    checkpoint, device = open_checkpoint(tiny(name)), torch.device("cuda")
    half, exact = Gpu(device, torch.bfloat16), Oracle("cuda", torch.float32)
    found = []
    for kernels, dtype in ((half, torch.bfloat16), (exact, torch.float32)):
        model = build_model(checkpoint.config, Weights(checkpoint, kernels, device, dtype, mode), 128)
        store = make_store(model.config, dtype=dtype, device=device)
        store.fill(0.0)
        sequences = Sequences(store)
        with torch.inference_mode():
            first = model.forward(sequences.step(PROMPTS, "all")).float()
            found.append(torch.cat([first, model.forward(sequences.step({0: [3], 1: [4], 2: [5]})).float()]))
    ours, theirs = found
    assert torch.isfinite(ours).all()
    far = (ours - theirs).norm(dim=1) / theirs.norm(dim=1)
    assert far.median() < 0.05
    assert (far > 0.15).float().mean() < 0.15  # where rounding sends a token to another expert


@pytest.mark.parametrize("shape", ["tiny-moe", "qwen3-30b-a3b@layers=2", "deepseek-v2-lite@layers=3"])
def test_recorded_steps_answer_as_plain_ones(shape: str) -> None:
    def answers(graphs: bool) -> dict[tuple[str, int], list[int]]:
        sizes = {"max_batch": 8, "max_model_len": 512, "kv_memory": 1 << 28}
        engine = Engine.load(
            EngineConfig(f"shape:{shape}", device="cuda", graphs=graphs, **sizes),  # type: ignore[arg-type]
            tokens_only=True,
        )
        for i in range(8):
            params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
            engine.add(Request(str(i), tuple(range(5 + i, 40 + 9 * i)), params))
        return fake.answers(fake.drain(engine))

    recorded, plain = answers(True), answers(False)
    assert set(recorded) == set(plain)
    same = sum(a == plain[key] for key, a in recorded.items())
    assert same >= 0.75 * len(plain)  # rounding decides where two tokens are nearly alike


def test_idle_requests_of_a_padded_step_write_nothing() -> None:
    """Five requests run as eight; a page that nobody owns stays as it was."""
    config = EngineConfig("shape:deepseek-v2-lite@layers=3", "cuda", max_batch=8, max_model_len=512, kv_memory=1 << 28)
    engine = Engine.load(config, tokens_only=True)
    engine.kv.fill(0.5)
    for i in range(5):
        params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
        engine.add(Request(str(i), (5 + i, 9, 31), params))
    fake.drain(engine)
    assert engine.pool.idle + engine.pool.used < engine.pool.total
    for keys in engine.kv.keys:
        assert (keys[-1] == 0.5).all()
