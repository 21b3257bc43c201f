"""The same engine on a CUDA device, one step ahead: answers equal the CPU's in float32."""

import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tenfold.base.config import EngineConfig
from tenfold.engine.core import Engine
from tenfold.engine.pace import POLL, Pace
from tenfold.engine.plan import Entry
from tenfold.engine.request import Grammar, Request, SamplingParams
from tenfold.engine.sampler import Sampled, Sampler
from tenfold.engine.sequence import Sequence
from tenfold.engine.text import Text
from tenfold.models.table import build_model
from tenfold.ops.table import make_kernels
from tenfold.weights.load import Weights
from tenfold.weights.open import open_checkpoint
from tests.engine import fake

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

KINDS = [
    SamplingParams(temperature=0.0, max_tokens=12),
    SamplingParams(temperature=0.0, max_tokens=9, n=2, logprobs=2, prompt_logprobs=1),
    SamplingParams(temperature=0.0, max_tokens=12, frequency_penalty=0.5, repetition_penalty=1.3, logit_bias={5: 2.0}),
    SamplingParams(temperature=0.9, max_tokens=12, seed=1),
    SamplingParams(temperature=0.9, max_tokens=12, seed=2, top_k=20, top_p=0.9, min_p=0.01),
    SamplingParams(temperature=0.9, max_tokens=12, seed=3, top_p=0.7, min_tokens=3, stop_token_ids=(9,)),
    SamplingParams(temperature=0.0, max_tokens=12, grammar=Grammar("regex", "[a-m]{4}( [n-z]{2})*"), n=2),
    SamplingParams(temperature=0.0, max_tokens=12, grammar=Grammar("json_object"), logprob_token_ids=(9, 40)),
]


def run(
    path: Path, device: str, lookahead: int, speculate: str = ""
) -> tuple[dict[tuple[str, int], list[int]], list[float]]:
    """Tokens of all kinds of requests in one batch of a crowded engine, and an embedding."""
    kernels = make_kernels("torch", torch.device(device), torch.float32)
    checkpoint = open_checkpoint(path)
    model, draft = (build_model(checkpoint.config, Weights(checkpoint, kernels, device), 128) for _ in range(2))
    sizes = {"page_size": 8, "max_model_len": 128, "max_step_tokens": 24}
    config = fake.settings(device=device, lookahead=lookahead, speculate=speculate, **sizes)
    engine = Engine(model, kernels, config, Text(checkpoint), pages=14, eos_ids=checkpoint.eos_ids, draft=draft)
    if speculate:
        fake.speculating(engine)
    for i, params in enumerate(KINDS):
        engine.add(Request(str(i), tuple(range(10 + i, 30 + 2 * i)), params))
    engine.add(Request("pool", tuple(range(10, 60)), pool="mean"))
    outputs = fake.drain(engine)
    (embedding,) = [o.embedding for o in outputs if o.embedding]
    assert (engine.stats().accepted_tokens > 0) == bool(speculate)
    return fake.answers(outputs), list(embedding)


@pytest.mark.parametrize("speculate", ["", "draft"])
@pytest.mark.parametrize("lookahead", [0, 1])
def test_a_gpu_answers_as_the_cpu_does(tiny: Callable[[str], Path], lookahead: int, speculate: str) -> None:
    expected, state = run(tiny("llama"), "cpu", 0)
    got, embedding = run(tiny("llama"), "cuda", lookahead, speculate)
    assert got == expected
    assert embedding == pytest.approx(state, abs=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("wanted", [None, 0])
def test_prompts_longer_than_a_step(dtype: str, wanted: int | None) -> None:
    """Steps in the middle of a prompt want no logits, so that their last norm and head have no rows."""
    found = []
    for step in (64, 1024):
        config = EngineConfig(
            model="shape:llama-3.2-1b@layers=2",
            device="cuda",
            dtype=dtype,
            kernels="native",
            max_batch=4,
            max_model_len=1024,
            max_step_tokens=step,
            kv_memory=64 << 20,
        )
        engine = Engine.load(config, tokens_only=True)
        params = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True, prompt_logprobs=wanted)
        engine.add(Request("a", tuple(range(10, 410)), params))
        outputs = fake.drain(engine)
        assert len(fake.answers(outputs)["a", 0]) == 3
        found.append([p.logprob for o in outputs for p in o.prompt_logprobs or () if p is not None])
    assert len(found[0]) == (399 if wanted == 0 else 0)
    assert found[0] == pytest.approx(found[1], abs=0.1)


@pytest.mark.parametrize("graphs", [True, False])
def test_a_long_context_beside_short_ones(graphs: bool) -> None:
    """Steps whose contexts are shared out by their lengths, which grow from one replay of a graph to the next: every
    token is as likely as the best when the request is computed alone.
    """
    attending = pytest.importorskip("tenfold.ops.gpu.attending")
    config = EngineConfig(
        model="shape:llama-3.2-1b@layers=2",
        device="cuda",
        dtype="bfloat16",
        kernels="native",
        graphs=graphs,
        max_batch=16,
        max_model_len=4096,
        kv_memory=256 << 20,
        prefix_cache=False,
    )
    engine = Engine.load(config, tokens_only=True)
    lengths = [3000, 1500, *range(20, 120, 10)]
    prompts = [tuple((7 * i + 11 * j) % 1000 + 10 for j in range(length)) for i, length in enumerate(lengths)]
    for i, prompt in enumerate(prompts):
        engine.add(Request(str(i), prompt, SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)))
    together = fake.answers(fake.drain(engine))
    asked = engine.kernels.attending.asked()  # type: ignore[attr-defined]
    assert any(attending.rule(reading, 132).endswith(":even") for reading in asked)  # else this tests nothing
    for i, prompt in enumerate(prompts):
        answer = tuple(together[str(i), 0])
        assert len(answer) == 40
        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1)
        engine.add(Request(f"judge {i}", prompt + answer, params))
        logs = [p for o in fake.drain(engine) for p in o.prompt_logprobs or ()]
        for token, log in zip(answer, logs[-len(answer) :]):
            assert log is not None
            assert log.logprob > max(p for _, p in log.top) - 0.15, (i, token)


class Patient(Pace):
    """Waits for the end of the step under way, whatever steps took before."""

    rests = 0

    def rest(self, ended: Callable[[], bool]) -> float:
        self.rests += 1
        while not ended():
            time.sleep(POLL)
        return super().rest(ended)


def test_steps_that_are_planned_late_are_the_same() -> None:
    """As late as can be, when the step before has ended: answers do not change."""
    config = EngineConfig(
        model="shape:llama-3.2-1b",
        device="cuda",
        dtype="bfloat16",
        kernels="native",
        max_batch=8,
        max_model_len=2048,
        kv_memory=256 << 20,
        prefix_cache=False,
    )
    engine = Engine.load(config, tokens_only=True)
    assert engine.pace is not None
    engine.pace = patient = Patient()
    found = []
    for late in (False, False, True):  # the first captures graphs
        for i in range(8):
            prompt = tuple((7 * i + 11 * j) % 1000 + 10 for j in range(500))
            engine.add(Request(str(i), prompt, SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)))
        outputs = []
        while engine.has_work:
            if late:
                engine.rest()
            outputs += engine.step()
        found.append(fake.answers(outputs))
    assert found[1] == found[2]
    assert patient.rests > 0


@pytest.mark.parametrize("params", KINDS[:6], ids=range(6))
def test_sampling_waits_for_nothing(params: SamplingParams) -> None:
    """Neither what a batch needs nor a step of it makes the host wait for the device."""
    device, vocab = torch.device("cuda"), 1000
    sampler = Sampler(4, vocab, device)
    sequences = [
        Sequence(Request(str(row), (5, 6, 7), params), 0, row, 30, 8, row, frozenset(params.stop_token_ids))
        for row in range(4)
    ]
    for row, sequence in enumerate(sequences):
        sequence.row = row
    entries = [Entry(row, sequence, 2, 1, True) for row, sequence in enumerate(sequences)]
    logits = torch.randn(4, vocab, device=device)

    def step() -> Sampled:
        for sequence in sequences:
            sampler.admit(sequence)
        plan = sampler.plan(sequences)
        return sampler.run(logits.clone(), plan, entries)

    step()  # what is compiled is compiled
    with warnings.catch_warnings(action="ignore"):  # the mode warns that it is a prototype, after it is set
        torch.cuda.set_sync_debug_mode("error")
    try:
        drawn = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert drawn.tokens.shape == (4,)
