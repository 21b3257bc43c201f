"""Short steps with chunks through recorded graphs on a GPU: what they give, alone and beside decodes."""

import pytest
import torch

from tenfold.base.config import EngineConfig
from tenfold.engine.core import Engine
from tenfold.engine.rehearsal import made_up
from tenfold.engine.request import Request, SamplingParams
from tests.engine import fake

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
MODEL = "shape:llama-3.2-1b@layers=4"


def engine(model: str = MODEL, **changes: object) -> Engine:
    """One that records what comes, not at its start."""
    settings = {"max_batch": 16, "max_model_len": 2048, "kv_memory": 1 << 30, "prefix_cache": False} | changes
    config = EngineConfig(model, "cuda", kernels="native", rehearse=False, **settings)  # type: ignore[arg-type]
    return Engine.load(config, tokens_only=True)


@pytest.mark.parametrize("tokens", [3, 100, 700])
@pytest.mark.parametrize("format", ["dense", "k2v2g64"])
def test_states_are_those_of_a_plain_step(tokens: int, format: str) -> None:
    own = engine(kv_cache=format)
    step = made_up(own.runner, 1, tokens, tokens)
    pieces = own.model._replay  # type: ignore[attr-defined]
    with torch.inference_mode():
        plain = own.model.hidden(step).float().clone()
        others = [own.model.hidden(step).float().clone() for _ in range(3)]
    assert (pieces.recordings, pieces.replays, pieces.failure) == (1, 3, "")
    for states in others:
        assert torch.nn.functional.cosine_similarity(states, plain).min() > 0.999
    assert torch.equal(others[0], others[2])


@pytest.mark.parametrize("format", ["dense", "k2v2g64"])
def test_mixed_steps_answer_as_without_graphs(format: str) -> None:
    def answers(own: Engine) -> dict[tuple[str, int], list[int]]:
        outputs = []
        for i in range(24):
            prompt = tuple((7 * i + j) % 20_000 + 100 for j in range((i * 37) % 300 + 2))
            own.add(Request(str(i), prompt, SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)))
            for _ in range(3):
                outputs += own.step()
        return fake.answers([*outputs, *fake.drain(own)])

    own, other = engine(kv_cache=format), engine(kv_cache=format, graphs=False)
    first, second = answers(own), answers(other)
    pieces = own.model._replay  # type: ignore[attr-defined]
    assert pieces.recordings > 2
    assert pieces.replays > 10
    assert pieces.failure == ""
    assert first.keys() == second.keys()
    assert sum(first[k][:2] == second[k][:2] for k in first) >= 0.8 * len(first)


@pytest.mark.parametrize("model", [MODEL, "shape:deepseek-v2-lite@layers=3"])
def test_states_are_those_of_the_positions_of_a_step(model: str) -> None:
    """Latent attention rotates what it caches before attention is asked for, in what is recorded."""
    own = engine(model)
    own.kv.fill(0.5)
    first, behind = made_up(own.runner, 1, 60, 60), made_up(own.runner, 1, 60, 500)
    pieces = own.model._replay  # type: ignore[attr-defined]
    with torch.inference_mode():
        for _ in range(2):
            own.model.hidden(first)
        replayed = own.model.hidden(behind).float().clone()
        assert (pieces.recordings, pieces.replays, pieces.failure) == (1, 2, "")
        pieces.failure = "the test wants a plain step"
        plain = own.model.hidden(behind).float()
    alike = torch.nn.functional.cosine_similarity(replayed, plain)
    assert (alike > 0.99).float().mean() > 0.8  # rounding may send a token to another expert
