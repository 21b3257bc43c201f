"""Arms chosen by what whole steps take: which are tried, what the descent finds, and a GPU's steps with each."""

import math
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch

from tenfold.base.config import EngineConfig
from tenfold.engine import tune_steps
from tenfold.engine.rehearsal import chunks, decodes
from tenfold.engine.tune_steps import NEAR, TRIED, Place, descend, place
from tenfold.ops.choose import Key, Table

QKV, OUT = (Key("linear", n, 4096, "bfloat16", 1, 132) for n in (6144, 4096))


def test_tried_are_the_rule_the_best_of_each_kind_and_what_is_near():
    times = {"a:1": 10.0, "a:2": 10.5, "b:1": 11.0, "b:2": 11.5, "c:1": 10 * NEAR + 1, "rule": 90.0, "a:3": 10.6}
    found = place(QKV, "rule", times)
    assert found == Place(QKV, ("rule", "a:1", "b:1", "a:2", "a:3"), "a:1")
    assert len(found.names) == TRIED
    assert place(QKV, "rule", {}, ["x", "rule", "y"]) == Place(QKV, ("rule", "x", "y"), "rule")
    assert place(QKV, "rule", {}).names == ("rule",)


def took(picks: dict[Key, str]) -> float:
    """The one kind and the other are in each other's way."""
    alone = {"bulk": 9.0, "stream": 10.0}
    return sum(alone[name] for name in picks.values()) + (8.0 if len(set(picks.values())) > 1 else 0.0)


def test_arms_that_get_in_each_others_way_are_not_mixed():
    places = [Place(QKV, ("stream", "bulk"), "bulk"), Place(OUT, ("stream",), "stream")]
    found = descend(places, lambda tried: [took(dict(picks)) for picks in tried])
    assert found == {QKV: {"stream": 20.0, "bulk": 27.0}, OUT: {"stream": 20.0}}


def test_one_kind_everywhere_is_a_beginning_too():
    places = [Place(key, ("stream", "bulk"), "stream") for key in (QKV, OUT)]
    found = descend(places, lambda tried: [took(dict(picks)) for picks in tried])
    assert all(min(times, key=times.get) == "bulk" for times in found.values())


def test_descent_never_ends_worse_than_rules_and_winners():
    for costs in product((0.0, 5.0, math.inf), repeat=2):
        extra = dict(zip(("x", "y"), costs))
        measure = lambda tried, extra=extra: [10.0 + sum(extra.get(n, 1.0) for n in p.values()) for p in tried]  # noqa: E731
        found = descend([Place(QKV, ("rule", "x"), "x"), Place(OUT, ("rule", "y"), "y")], measure)
        best = sum(min(1.0, cost) for cost in costs) + 10.0
        assert min(found[OUT].values()) == best
        assert all(math.isfinite(took) for times in found.values() for took in times.values())


def test_steps_decide_over_times_alone(tmp_path: Path):
    table = Table("gpu", "1", tmp_path / "t.json")
    table.record(QKV, {"stream": 10.0, "bulk": 9.0})
    assert table.pick(QKV, "stream").arm == "bulk"
    table.record_steps(QKV, {"stream": 3900.0, "bulk": 5200.0})
    table.save()
    choice = Table("gpu", "1", tmp_path / "t.json").pick(QKV, "stream")
    assert (choice.arm, choice.source, choice.microseconds, choice.step) == ("stream", "step", 10.0, 3900.0)
    assert (choice.runner_up, choice.runner_up_microseconds) == ("bulk", 5200.0)
    assert "alone 10.0 us; steps 3900.0 us; next bulk 5200.0 us" in str(choice)
    assert table.but({QKV: "bulk"}).pick(QKV, "stream").arm == "bulk"
    assert table.pick(QKV, "stream").arm == "stream"


def test_what_a_user_fixed_is_open_while_steps_are_measured(monkeypatch: pytest.MonkeyPatch):
    loaded = []

    def load(config, tokens_only):
        loaded.append(config)
        raise ValueError("that will do")

    monkeypatch.setattr(tune_steps.Engine, "load", load)
    given = EngineConfig("shape:tiny", softmax="paper", gemm="library", merge="global", schedule="phases", max_batch=3)
    with pytest.raises(ValueError, match="that will do"):
        tune_steps.tune(given)
    (config,) = loaded
    assert (config.softmax, config.gemm, config.merge) == ("auto", "auto", "auto")
    assert (config.schedule, config.max_batch) == ("chunked", 3)  # lanes of its own would be in the way


def test_steps_are_of_requests_that_a_model_can_have_and_the_cache_holds():
    assert tune_steps.sizes_of(2048, 4096, [1, 2, 4], [1536, 192, 12288, 49152]) == [
        *((1, 1536), (1, 192), (1, 2048)),
        *((2, 1536), (2, 192), (2, 2048)),
        (4, 192),
    ]
    assert len(tune_steps.sizes_of(1 << 20, math.inf)) == len(tune_steps.REQUESTS) * len(tune_steps.CONTEXTS)


def test_sizes_of_a_rehearsal():
    assert list(decodes(3, 100, 10_000)) == [(1, 1, 100), (2, 1, 100), (4, 1, 100)]
    assert {n for n, _, _ in decodes(256, 8192, 1 << 30)} >= {1, 2, 4, 8, 64, 80, 256}
    assert {context for _, _, context in decodes(1, 2000, 10_000)} == {128, 1024, 2000}
    assert [n for n, _, context in decodes(8, 4096, 4096) if context == 1024] == [1, 2, 4]  # as many as are held
    assert list(chunks(40)) == [(1, 16, 16), (1, 32, 32), (1, 40, 40)]
    assert list(chunks(8192))[-2:] == [(1, 1024, 1024), (1, 8192, 8192)]
    assert list(chunks(1)) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_steps_of_a_gpu_with_each_arm(tmp_path: Path):
    from tenfold.engine.linears import traced
    from tenfold.ops.gpu import attending, green, tune
    from tenfold.ops.gpu.timing import GpuTimer
    from tenfold.ops.kernels import AttentionSpec
    from tenfold.weights.find import resolve
    from tenfold.weights.open import open_checkpoint

    model, device = "shape:llama-3.2-1b@layers=2", torch.device("cuda")
    table = Table("gpu", "1", tmp_path / "t.json")
    running = tune.open_arms(device, torch.bfloat16, table)
    works = traced(open_checkpoint(resolve(model)), torch.bfloat16).works
    tune.tune(works, running, GpuTimer(device), [1], ["stream", "ring"])
    config = EngineConfig(model=model, device="cuda", kv_memory=1 << 30, max_model_len=2048, rehearse=False)
    assert tune_steps.tune(config, table, [1]) == 2  # contexts of 1536 and 192 tokens, of 2048 chooses the same
    again = Table("gpu", "1", tmp_path / "t.json")
    steps = [again.steps(tune.arms.key(replace(work, tokens=1), running.sms)) for work in tune.distinct(works)]
    assert all(steps)
    assert all(20 < took < 5000 for times in steps for took in times.values())
    reading = attending.Reading(AttentionSpec(32, 8, 64, 0.125, rotary_dim=64), 1, 2048, 16)
    attention = again.steps(attending.key(reading, running.sms))
    assert len(attention) > 4
    assert max(attention.values()) > 1.03 * min(attention.values())  # one block for a KV head, or many
    assert again.steps(attending.softmax_key(reading, running.sms)).keys() == {"lazy", "online"}
    assert tune_steps.tune(config, again, [1]) == 0
    _, lane = green.split(device, 112)
    assert tune_steps.tune(config, again, [1], [1536], parts=[lane]) == 1
    own = again.steps(attending.key(reading, lane.sms))
    assert min(own.values()) > 1.1 * min(attention.values())  # 20 multiprocessors are slower than 132
