"""Engines of the benchmark: one interface, the same greedy tokens, and a worker process that reports its end."""

import sys
import types
from types import SimpleNamespace

import pytest

from tenfold.bench import arms, cpu, launches, phases, soak
from tenfold.bench.engines import ENGINES, Job, NotInstalled, Setup, engine_config, make_engine
from tenfold.bench.floor import model_sizes
from tenfold.bench.lengths import Lengths
from tenfold.bench.one_model import OneModel
from tenfold.bench.peers.vllm import VLLM
from tenfold.bench.single import Row, brief, sample
from tenfold.bench.worker import Worker

PROMPTS = [[5, 9, 13, 17], [6, 10, 14, 18]]
SMALL = cpu.Case("decode, batch 1", 1, 4, 3, "decode")


@pytest.mark.parametrize("peer", ["hf", "hf-generate", "hf-compiled"])
def test_tenfold_and_transformers_continue_alike(tiny, peer):
    plain = {"backend": "eager"} if peer == "hf-compiled" else {}  # the graph is traced, not compiled
    ours = make_engine("tenfold", Setup(str(tiny("llama")), 1, 2, 256))
    theirs = make_engine(peer, Setup(str(tiny("llama")), 1, 2, 256, settings=plain))
    for tokens in (3, 6):
        found = [engine.generate(PROMPTS, tokens) for engine in (ours, theirs)]
        assert found[0].tokens == found[1].tokens
        assert [len(row) for row in found[0].tokens] == [tokens, tokens]
        assert all(t.total > 0 for t in found)
    assert found[0].decode > 0
    assert ours.capacity >= 2 * 256


def test_an_engine_that_does_not_say_when_its_first_token_came_has_none(tiny):
    engine, row = make_engine("hf-generate", Setup(str(tiny("llama")), 1, 1, 64)), Row("hf-generate", 1, 4, 3)
    sample(engine, row, 0, 100)
    assert engine.generate(PROMPTS, 3).decode == 0
    assert (row.first, row.inside) == ([], None)


def test_engines_of_one_process_share_a_model(tiny):
    engines = [make_engine(name, Setup(str(tiny("qwen2")), 1)) for name in ("hf", "hf-generate")]
    assert engines[0].model is engines[1].model


def test_answers_of_different_lengths(tiny):
    engine = make_engine("tenfold", Setup("shape:tiny", 1, 2, 256))
    assert [len(row) for row in engine.generate([[5], [6, 7]], [2, 5]).tokens] == [2, 5]
    with pytest.raises(ValueError, match="one length"):
        make_engine("hf", Setup("shape:tiny", 1)).generate([[5], [6, 7]], 2)


def test_random_weights_are_the_same_for_both():
    setup = Setup("shape:qwen3-0.6b@layers=1,vocab=400", 1, 1, 64, settings={"dtype": "float32"})
    assert (
        make_engine("tenfold", setup).generate([[5, 6, 7]], 6).tokens
        == make_engine("hf", setup).generate([[5, 6, 7]], 6).tokens
    )


def test_vllm_is_driven_by_token_ids(monkeypatch):
    """A stand-in that records how it was called and answers as vLLM does."""
    calls = {}

    class LLM:
        def __init__(self, **options):
            calls.update(options)
            cache = SimpleNamespace(num_gpu_blocks=10, block_size=16)
            self.llm_engine = SimpleNamespace(vllm_config=SimpleNamespace(cache_config=cache))

        def generate(self, prompts, params, use_tqdm):
            assert all(set(p) == {"prompt_token_ids"} for p in prompts)
            return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=[1] * p["max_tokens"])]) for p in params]

    module = types.ModuleType("vllm")
    module.LLM, module.SamplingParams = LLM, dict
    monkeypatch.setitem(sys.modules, "vllm", module)
    for name in ("VLLM_USE_FLASHINFER_SAMPLER", "HF_HUB_OFFLINE", "VLLM_ENABLE_V1_MULTIPROCESSING"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "WARNING")
    engine = make_engine("vllm", Setup("shape:tiny", 0, 2, 128, "cuda"))
    found = engine.generate(PROMPTS, [3, 5])
    assert [len(row) for row in found.tokens] == [3, 5]
    assert found.decode == 0
    assert engine.capacity == 160
    assert (calls["load_format"], calls["max_model_len"], calls["enable_prefix_caching"]) == ("dummy", 128, False)


class Steps:
    """vLLM's engine: a step gives every request its next token, and the last one says so."""

    def __init__(self):
        self.left = {}

    def add_request(self, name, prompt, params):
        assert set(prompt) == {"prompt_token_ids"}
        assert (params["min_tokens"], params["output_kind"]) == (params["max_tokens"], "delta")
        self.left[name] = params["max_tokens"]

    def has_unfinished_requests(self):
        return bool(self.left)

    def step(self):
        names = list(self.left)
        self.left = {name: left - 1 for name, left in self.left.items() if left > 1}
        return [SimpleNamespace(request_id=name, outputs=[SimpleNamespace(token_ids=[1])]) for name in names]


def test_vllm_takes_requests_at_their_moments(monkeypatch):
    module = types.ModuleType("vllm.sampling_params")
    module.RequestOutputKind = SimpleNamespace(DELTA="delta")
    monkeypatch.setitem(sys.modules, "vllm", types.ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", module)
    engine = VLLM.__new__(VLLM)
    engine.llm, engine.params, engine.served = SimpleNamespace(llm_engine=Steps()), dict, 0
    jobs = [Job(0.0, (1, 2), 3), Job(0.02, (3,), 2)]
    for _ in range(2):
        answers = engine.serve(jobs)
        assert [(answer.due, answer.sizes) for answer in answers] == [(0.0, [1, 1, 1]), (0.02, [1, 1])]
        assert all(answer.times == sorted(answer.times) and answer.times[0] >= answer.due for answer in answers)


def test_unknown_engine_names_the_known_ones():
    with pytest.raises(ValueError, match=r"llama\.cpp"):
        make_engine("vllm?", Setup("default"))
    assert set(ENGINES) == {"tenfold", "llama.cpp", "hf", "hf-generate", "hf-compiled", "vllm"}


def test_a_peer_that_is_not_installed_is_a_sentence_without_a_trace(monkeypatch):
    for name in ("vllm", "llama_cpp"):
        monkeypatch.setitem(sys.modules, name, None)
    for peer in ("vllm", "llama.cpp"):
        with pytest.raises(NotInstalled, match=f"{peer} is not installed here .*--peer-path"):
            make_engine(peer, Setup("shape:tiny", device="cuda"))


@pytest.mark.parametrize(("device", "program"), [("cpu", r"g\+\+"), ("cuda", "gcc or clang")])
def test_without_a_compiler_the_compiled_peer_says_what_it_lacks(monkeypatch, tmp_path, device, program):
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(NotInstalled, match=f"torch.compile calls {program}, .*hf-generate alone"):
        make_engine("hf-compiled", Setup("shape:tiny", device=device))


def test_a_worker_says_what_is_not_installed(tmp_path):
    (tmp_path / "vllm.py").write_text("import nothing_of_this_name\n")
    with pytest.raises(NotInstalled, match=r"vllm is not installed here .*nothing_of_this_name") as found:
        Worker("vllm", Setup("shape:tiny"), str(tmp_path))
    assert not hasattr(found.value, "__notes__")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"foo": 1}, r"'foo' is no setting of the engine; allowed: .*max_batch"),
        ({"max_batch": "foo"}, "max_batch is 'foo'; allowed: a whole number, such as max_batch=0"),
        ({"max_batch": 1.5}, "allowed: a whole number"),
        ({"max_batch": True}, "allowed: a whole number"),
        ({"prefix_cache": 0}, "allowed: true or false, such as prefix_cache=true"),
        ({"dtype": "float7"}, "dtype is 'float7'; allowed: auto, float32"),
        ({"speculate": None}, "allowed: a text"),
        ({"model": "another"}, "'model' is no setting"),
    ],
)
def test_settings_that_there_are_not(settings, said):
    with pytest.raises(ValueError, match=said):
        engine_config(settings, model="m")
    with pytest.raises(ValueError, match=said):
        model_sizes("shape:tiny", settings=settings)


WORD = Lengths("uniform", 4, 4)
BUILT = {
    "phases": lambda own: phases.load("shape:tiny", "cpu", 64, own),
    "arms": lambda own: arms.calibrated("shape:tiny", "cpu", own),
    "one model": lambda own: OneModel("shape:tiny", "cpu", 64, own),
    "launches": lambda own: launches.measure("shape:tiny", "cpu", [1], [8], own),
    "soak": lambda own: soak.Plan("shape:tiny", "cpu", 1.0, 1.0, WORD, WORD, settings=own).config(),
}


@pytest.mark.parametrize("build", BUILT.values(), ids=BUILT)
def test_whatever_builds_an_engine_refuses_settings_that_there_are_not(build):
    for wrong, said in (({"foo": 1}, "'foo' is no setting"), ({"max_batch": "foo"}, "max_batch is 'foo'; allowed")):
        with pytest.raises(ValueError, match=said):
            build(wrong)


def test_settings_come_before_our_own():
    found = engine_config({"max_batch": 3, "border": 96, "tpot": 1, "graphs": False}, model="m", max_batch=8)
    assert (found.model, found.max_batch, found.border, found.tpot, found.graphs) == ("m", 3, "96", 1, False)


def test_worker_answers_and_says_why_it_stopped(tiny, tmp_path):
    worker = Worker("tenfold", Setup(str(tiny("llama")), 1, 2, 256))
    try:
        assert [len(row) for row in worker.generate(PROMPTS, 3).tokens] == [3, 3]
        with pytest.raises(RuntimeError, match="prompt is 300 tokens long"):
            worker.generate([[5] * 300], 3)
        assert worker.generate(PROMPTS, 2).total > 0
        assert worker.capacity >= 512
    finally:
        worker.close()
    with pytest.raises(RuntimeError, match="nothing-here"):
        Worker("tenfold", Setup(str(tmp_path / "nothing-here"), 1, 1, 256))


REFUSED = """1 validation error for ModelConfig
  Value error, model type `nothing` is not known. [type=value_error]
    For further information visit https://errors.pydantic.dev/2.13/v/value_error"""


def test_a_peer_that_refuses_a_model_is_quoted_with_its_reason(tmp_path):
    """A stand-in for vLLM whose constructor raises what pydantic does: its last line says nothing."""
    package = f"SamplingParams = dict\ndef LLM(**options):\n    print('loading')\n    raise ValueError({REFUSED!r})\n"
    (tmp_path / "vllm.py").write_text(package)
    with pytest.raises(RuntimeError) as found:
        Worker("vllm", Setup("shape:tiny"), str(tmp_path))
    assert str(found.value) == f"vllm: ValueError: {REFUSED}"
    assert "model type `nothing` is not known" in brief(found.value)
    assert "\n" not in brief(found.value)
    (note,) = found.value.__notes__
    assert "loading" in note
    assert "Traceback" in note


def test_a_peer_that_dies_is_quoted_with_the_end_of_its_log(tmp_path):
    (tmp_path / "vllm.py").write_text(
        "import os, sys\nprint('x' * 5000 + ' no kernel image', file=sys.stderr, flush=True)\nos.abort()\n"
    )
    with pytest.raises(RuntimeError, match="vllm stopped") as found:
        Worker("vllm", Setup("shape:tiny"), str(tmp_path))
    assert brief(found.value).endswith("no kernel image")
    assert len(brief(found.value)) < 450


def test_a_round_measures_every_case_and_becomes_claims(tiny):
    case = cpu.Case("decode, batch 1", 1, 4, 3, "decode")
    lines: list[str] = []
    # Prompts of the suite are ids of a large vocabulary; the tiny model's is small.
    speeds = cpu.measure(str(tiny("llama")), ["tenfold"], 1, 2, [case], lines.append, vocabulary=250)
    assert len(speeds[case.name]["tenfold"]) == 2
    assert min(speeds[case.name]["tenfold"]) > 0
    speeds[case.name]["llama.cpp"] = [s / 2 for s in speeds[case.name]["tenfold"]]
    made = cpu.claims_of(speeds, "tiny", "command", cpu.TARGETS)
    assert [(c.id, c.value, c.met) for c in made] == [("A1", 2.0, True)]


def test_prompts_differ_between_rounds_and_fit_the_case():
    first, second = cpu.prompts_of(SMALL, 1), cpu.prompts_of(SMALL, 2)
    assert first != second
    assert [len(p) for p in first] == [4]
    assert SMALL.work == 2
