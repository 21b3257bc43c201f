"""Engines of the benchmark: one interface, the same greedy tokens, and a worker process that reports its end."""

import pytest

from tenfold.bench import cpu
from tenfold.bench.engines import ENGINES, make_engine
from tenfold.bench.worker import Worker

PROMPTS = [[5, 9, 13, 17], [6, 10, 14, 18]]
SMALL = cpu.Case("decode, batch 1", 1, 4, 3, "decode")


def test_tenfold_and_transformers_continue_alike(tiny):
    found = [make_engine(name, tiny("llama"), 1, 2, 256).generate(PROMPTS, 6) for name in ("tenfold", "hf")]
    assert found[0].tokens == found[1].tokens
    assert [len(row) for row in found[0].tokens] == [6, 6]
    assert all(t.prefill > 0 and t.decode > 0 for t in found)


def test_unknown_engine_names_the_known_ones():
    with pytest.raises(ValueError, match=r"llama\.cpp"):
        make_engine("vllm?", "default", 1, 1, 256)
    assert set(ENGINES) == {"tenfold", "llama.cpp", "hf"}


def test_worker_answers_and_says_why_it_stopped(tiny, tmp_path):
    worker = Worker("tenfold", str(tiny("llama")), 1, 2, 256)
    try:
        assert [len(row) for row in worker.generate(PROMPTS, 3).tokens] == [3, 3]
    finally:
        worker.close()
    with pytest.raises(RuntimeError, match="nothing-here"):
        Worker("tenfold", str(tmp_path / "nothing-here"), 1, 1, 256)


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
