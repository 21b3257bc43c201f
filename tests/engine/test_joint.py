"""One plan for several models: shares of the KV cache, refusals, and that each advice of a refusal works."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tenfold.base.config import EngineConfig
from tenfold.engine.joint import JointPlan, Tenant, plan_together
from tenfold.engine.memory import CPU_KV_LIMIT, GIB, DoesNotFit, resolve
from tenfold.engine.opened import Opened
from tenfold.models.config import ModelConfig
from tenfold.models.table import model_config

BIG = model_config(
    {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
    }
)
SMALL = replace(BIG, vocab_size=49152, hidden_size=576, intermediate_size=1536, layers=30, heads=9, kv_heads=3)
SMALL = replace(SMALL, head_dim=64, max_positions=8192)


def tenant(name: str, shape: ModelConfig, weights: int, device: str = "cpu", **values: Any) -> Tenant:
    asked = EngineConfig(**values)
    return Tenant(name, shape, weights, resolve(asked, torch.device(device), "native", quantised=True))


def big(**values: Any) -> Tenant:
    return tenant("big", BIG, 5 * GIB, **values)


def small(**values: Any) -> Tenant:
    return tenant("small", SMALL, GIB // 8, **values)


def used(plan: JointPlan) -> int:
    return sum(p.total for p in plan.plans.values())


def test_caches_hold_the_same_number_of_tokens():
    plan = plan_together([big(device="cuda"), small(device="cuda")], {"cuda": 20 * GIB})
    assert plan.fits
    b, s = plan.plans["big"], plan.plans["small"]
    assert abs(b.tokens - s.tokens) <= b.page_size
    assert b.kv > s.kv
    assert used(plan) <= 20 * GIB * 0.9
    assert used(plan) > 20 * GIB * 0.9 - (1 << 22)  # and nothing is left lying about
    assert plan.configs["big"].kv_memory == b.kv
    assert plan.configs["small"].max_model_len == s.max_model_len


def test_no_cache_is_larger_than_alone():
    plan = plan_together([big(device="cuda"), small(device="cuda", max_batch=1)], {"cuda": 60 * GIB})
    alone = small(device="cuda", max_batch=1).plan(60 * GIB)
    assert plan.plans["small"].kv == alone.kv
    assert plan.plans["big"].tokens > plan.plans["small"].tokens


def test_on_a_cpu_all_caches_take_what_one_would():
    plan = plan_together([big(), small()], {"cpu": 64 * GIB})
    assert sum(p.kv for p in plan.plans.values()) <= CPU_KV_LIMIT
    assert plan_together([small()], {"cpu": 64 * GIB}).plans["small"] == replace(small().plan(64 * GIB))


def test_what_was_asked_for_is_kept():
    plan = plan_together([big(max_model_len=32768), small(kv_memory=GIB // 4)], {"cpu": 32 * GIB})
    assert plan.fits
    assert plan.plans["big"].max_model_len == 32768
    assert GIB // 4 - (1 << 20) < plan.plans["small"].kv <= GIB // 4


def test_devices_do_not_share():
    tenants = [tenant("a", BIG, 5 * GIB, "cuda:0"), tenant("b", BIG, 5 * GIB, "cuda:1")]
    plan = plan_together(tenants, {"cuda:0": 9 * GIB, "cuda:1": 9 * GIB})
    assert plan.fits
    assert plan.total("cuda:0") == plan.plans["a"].total
    both = [replace(t, config=replace(t.config, device="cuda:0")) for t in tenants]
    assert not plan_together(both, {"cuda:0": 9 * GIB}).fits


def test_a_refusal_has_numbers_and_every_advice_works():
    tenants = [big(max_model_len=65536, kv_dtype="float32"), small()]
    free = {"cpu": 7 * GIB}
    plan = plan_together(tenants, free)
    assert not plan.fits
    with pytest.raises(DoesNotFit, match=r"big .* GiB, small .* MiB; free: 7\.00 GiB on cpu") as refused:
        plan.require()
    assert plan.changes
    for change in plan.changes:
        assert change in str(refused.value)
        assert plan_together(changed(tenants, change), free).fits, change


def changed(tenants: list[Tenant], change: str) -> list[Tenant]:
    if change.startswith("leaving out "):
        return [t for t in tenants if t.name != change.removeprefix("leaving out ")]
    found = re.match(r"(\w+)=(\w+)", change)
    assert found is not None
    name, text = found.groups()

    def value(config: EngineConfig) -> Any:
        return text if not text.isdigit() else min(getattr(config, name), int(text))

    return [replace(t, config=replace(t.config, **{name: value(t.config)})) for t in tenants]


def test_models_that_can_never_fit():
    plan = plan_together([big(), big()], {"cpu": GIB})
    assert not plan.fits
    assert plan.changes == ()
    with pytest.raises(DoesNotFit, match="smaller models"):
        plan.require()


@given(
    free=st.integers(0, 40 * GIB),
    weights=st.lists(st.integers(0, 8 * GIB), min_size=1, max_size=4),
    lengths=st.lists(st.sampled_from([0, 512, 4096, 131072]), min_size=4, max_size=4),
    device=st.sampled_from(["cpu", "cuda"]),
)
def test_a_plan_that_fits_does(free, weights, lengths, device):
    tenants = [tenant(f"m{i}", BIG, w, device, max_model_len=n) for i, (w, n) in enumerate(zip(weights, lengths))]
    plan = plan_together(tenants, {device: free})
    assert not plan.fits or used(plan) <= free
    for name, p in plan.plans.items():
        asked = next(t for t in tenants if t.name == name).config.max_model_len
        assert p.pages >= 1
        assert not (plan.fits and asked) or p.max_model_len == asked


def test_the_engine_that_follows_agrees(tiny):
    """What `Engine.load` does with the settings of a plan: the same sizes, and it fits."""
    tenants = []
    for name in ("llama", "qwen3"):
        asked = EngineConfig(model=str(tiny(name)), kernels="torch")
        opened = Opened(asked)
        opened.choose()
        tenants.append(Tenant.of(name, asked, opened))
    plan = plan_together(tenants, {"cpu": GIB})
    for name, config in plan.configs.items():
        again = Opened(config)
        again.choose()
        assert again.memory.fits
        assert again.memory.pages == plan.plans[name].pages
        assert again.memory.max_model_len == plan.plans[name].max_model_len
