"""Choosing among arms of attention: rule, table, what a user fixed, other projects' kernels where they are there.

Timers and libraries are fake; nothing needs a GPU.
"""

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tenfold.base.config import EngineConfig
from tenfold.ops.choose import Table
from tenfold.ops.kernels import MERGE, AttentionSpec, Options
from tenfold.ops.oracle import Oracle

attending = pytest.importorskip("tenfold.ops.gpu.attending")
report = pytest.importorskip("tenfold.ops.gpu.report")
tuning = pytest.importorskip("tenfold.ops.gpu.tune_attention")
attend = pytest.importorskip("tenfold.ops.attention.attend")
third_party = pytest.importorskip("tenfold.ops.attention.third_party")
decode = pytest.importorskip("tenfold.ops.gpu.decode")
graphs = pytest.importorskip("tenfold.ops.gpu.graphs")

SMS = 132
CPU = torch.device("cpu")
SPEC = AttentionSpec(32, 8, 128, 128**-0.5, 0, 0.0, 128)
READING = attending.Reading(SPEC, 1, 8192, 16)
Reading = attending.Reading


@pytest.fixture
def table(tmp_path: Path) -> Table:
    return Table("gpu H100", "1", tmp_path / "gpu.json")


@given(
    st.sampled_from([(32, 32), (32, 8), (28, 4), (8, 8), (9, 3), (16, 2)]),
    st.sampled_from([64, 96, 128]),
    st.integers(1, 300),
    st.integers(1, 1 << 18),
    st.sampled_from([0, 100, 4096]),
)
def test_candidates_are_legal_hold_the_rule_and_find_room(
    heads: tuple[int, int], head_dim: int, requests: int, longest: int, window: int
) -> None:
    reading = Reading(AttentionSpec(*heads, head_dim, head_dim**-0.5, window, 0.0, head_dim), requests, longest, 16)
    found = attending.candidates(reading, SMS)
    assert found[0] == attending.rule(reading, SMS)
    assert attending.TRITON in found
    assert len(found) == len(set(found))
    for name in found:
        assert attending.legal(name, reading, SMS)
        if name.startswith("decode:"):
            plan = attending.parse(name)
            assert attending.name_of(plan) == name
            assert (
                requests * heads[1] * plan.splits <= decode.most_partial(heads[0] // heads[1], head_dim)
                or plan.splits == 1
                or plan.cluster
            )
            assert plan.cluster or plan.splits <= max(1, decode.most_splits(head_dim, plan.warps))


@pytest.mark.parametrize("name", ["decode:lazy:8x1:s4:cluster", "decode:8x1:s4", "triton", "", "decode:8x1:s4:both"])
def test_names_of_no_plan_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="allowed: decode:WARPS"):
        attending.parse(name)


@pytest.mark.parametrize(
    "name", ["gone", "decode:8x1:s0:global", "flashinfer", "flash-attn-3", "tiles", "decode:8x1:s3:cluster"]
)
def test_arms_that_cannot_run_here_are_not_legal(name: str) -> None:
    assert not attending.legal(name, READING, SMS)


def test_what_was_measured_runs_where_it_can(table: Table) -> None:
    best = "decode:4x3:s12:global"
    table.record(attending.key(READING, SMS), {attending.rule(READING, SMS): 30.0, best: 20.0, "gone": 1.0})
    assert attending.choice(READING, table, SMS).source == "rule"  # the fastest is not there any more
    table.record(attending.key(READING, SMS), {attending.rule(READING, SMS): 30.0, best: 20.0, "triton": 25.0})
    found = attending.choice(READING, table, SMS)
    assert (found.arm, found.source, found.runner_up) == (best, "measured", "triton")
    assert attending.choice(replace(READING, longest=5000), table, SMS).arm == best  # the next that was measured
    for near in (9000, 4096):
        found = attending.choice(replace(READING, longest=near), table, SMS)
        assert (found.arm, found.source, found.key.cols) == (best, "measured", 16384 if near > 8192 else 4096)
    for other in ({"longest": 17000}, {"longest": 2000}, {"requests": 2}, {"page_size": 32}, {"dtype": torch.float16}):
        assert attending.choice(replace(READING, **other), table, SMS).source == "rule"
    windowed = replace(READING, spec=replace(SPEC, window=100))
    assert attending.choice(windowed, table, SMS).source == "rule"


def test_the_rule_that_was_best_nearby_is_this_readings_own_rule(table: Table) -> None:
    long, short = (replace(READING, longest=n) for n in (1024, 512))
    assert attending.rule(long, SMS) != attending.rule(short, SMS)
    table.record_steps(attending.key(long, SMS), {attending.rule(long, SMS): 1.0, "triton": 2.0})
    assert attending.choice(long, table, SMS).source == "step"
    found = attending.choice(short, table, SMS)
    assert (found.arm, found.source) == (attending.rule(short, SMS), "rule")
    table.record_steps(attending.key(short, SMS), {attending.rule(short, SMS): 3.0, "triton": 2.0})
    assert attending.choice(short, table, SMS).arm == "triton"  # its own comes first


def test_splits_that_a_shorter_context_cannot_fill_give_way(table: Table) -> None:
    at = replace(READING, longest=256)
    table.record(attending.key(at, SMS), {"decode:4x3:s4:global": 1.0})
    assert attending.choice(at, table, SMS).source == "measured"
    assert attending.choice(replace(at, longest=128), table, SMS).source == "rule"


def test_plans_of_chunks_have_names_that_lead_back() -> None:
    chunk = Reading(SPEC, 1, 1024, 16, tokens=1024)
    plans = [name for name in attending.candidates(chunk, SMS) if name.startswith("wgmma:")]
    assert len(plans) > 5
    assert all(attending.legal(name, chunk, SMS) for name in plans)
    assert [str(attending.bound(name, "online")) for name in plans] == [
        name.replace("wgmma:", "wgmma:lazy:") for name in plans
    ]
    assert not attending.legal(plans[0], replace(chunk, page_size=8), SMS)
    assert not attending.legal("wgmma:2x999x2:apart", chunk, SMS)
    assert not attending.legal(plans[0], READING, SMS)


def test_a_plan_of_chunks_reaches_the_kernel(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(attend.tensor_prefill, "runs_on", lambda device: True)

    def run(plan: Any, *rest: Any, out: Tensor, **named: Any) -> Tensor:
        given.append(plan)
        return out

    monkeypatch.setattr(attend.tensor_prefill, "run", run)
    spec = AttentionSpec(4, 2, 64, 0.125, 0, 0.0, 64)
    found = tuning.Inputs(Reading(spec, 1, 48, 16, torch.float16, 48), 1, CPU)
    for arm in ("wgmma", "wgmma:2x96x3:turns"):
        for softmax in ("lazy", "online"):
            found.bind(arm, attending.Attending(CPU, SMS, table), softmax)(0)
    rule = [attend.tensor_prefill.rule(softmax, 48) for softmax in ("lazy", "online")]
    assert given == [*rule, *(attend.tensor_prefill.ChunkPlan(2, 96, 3, "turns", s) for s in ("lazy", "online"))]


def test_chunks_are_chosen_by_their_tokens(table: Table) -> None:
    chunk = Reading(SPEC, 3, 9000, 16, tokens=700)
    first = attending.rule(chunk, SMS)
    assert attending.candidates(chunk, SMS)[0] == first
    other = next(iter(set(attending.CHUNKS) - {first}), first)
    table.record(attending.key(attending.at(chunk), SMS), {first: 9.0, other: 5.0})
    assert attending.choice(chunk, table, SMS).arm == other
    assert attending.choice(replace(chunk, tokens=65), table, SMS).source == "rule"
    assert attending.choice(replace(chunk, tokens=1 << 20), table, SMS).source == "rule"


@pytest.mark.parametrize(
    ("merge", "requests", "longest", "arm"),
    [
        ("global", 1, 1024, "decode:8x1:s8:global"),
        ("cluster", 1, 1024, "decode:8x1:s8:cluster"),
        ("launch", 1, 1024, "triton:two"),
        ("cluster", 1, 32768, "decode:8x1:s8:cluster"),  # as many as a cluster has
        ("global", 1, 32768, "decode:4x3:s49:global"),
        ("cluster", 64, 1024, "decode:4x1x3:s1:global"),  # nothing to merge
    ],
)
def test_what_a_user_fixed_runs(table: Table, merge: str, requests: int, longest: int, arm: str) -> None:
    reading = Reading(SPEC, requests, longest, 16)
    table.record(attending.key(reading, SMS), {"triton": 1.0})
    found = attending.choice(reading, table, SMS, merge)
    assert (found.arm, found.source) == (arm, "fixed")
    assert attending.choice(replace(reading, tokens=99), table, SMS, merge).source == "rule"


def test_the_settings_of_an_engine_are_what_kernels_take() -> None:
    choices = {field.name: field.metadata["choices"] for field in fields(EngineConfig) if "choices" in field.metadata}
    assert choices["merge"] == ("auto", *MERGE)
    assert all(Options(merge=merge).merge == merge for merge in choices["merge"])
    with pytest.raises(ValueError, match="cluster"):
        Options(merge="both")


# Running


SMALL = AttentionSpec(4, 2, 16, 0.25, 0, 0.0, 16)


def inputs(tokens: int = 0, spec: AttentionSpec = SMALL, page: int = 16) -> Any:
    return tuning.Inputs(Reading(spec, 2, 64, page, torch.float32, tokens), 1, CPU)


def oracle(found: Any) -> Tensor:
    """What the same step gives in plain PyTorch."""
    keys, values, table = found.stores[0]
    return Oracle("cpu", torch.float32).attention(found.qkv, found.heads, keys, values, found.contexts(table))


@pytest.mark.parametrize(("arm", "tokens"), [("triton", 0), ("triton:two", 0), ("tiles", 48)])
def test_arms_compute_attention(table: Table, arm: str, tokens: int) -> None:
    found = inputs(tokens) if not tokens else tuning.Inputs(Reading(SMALL, 1, 48, 16, torch.float32, 48), 1, CPU)
    result = found.bind(arm, attending.Attending(CPU, SMS, table), "lazy")(0)
    torch.testing.assert_close(result, oracle(found), rtol=1e-4, atol=1e-4)


def test_decodes_go_to_our_kernel_with_what_it_takes(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    found = inputs()
    given = inspect.signature(decode.run)
    seen: list[dict[str, Any]] = []

    def run(*args: Any, **named: Any) -> Tensor:
        seen.append(given.bind(*args, **named).arguments)
        return args[2][:, :64]

    monkeypatch.setattr(decode, "run", run)
    running = attending.Attending(CPU, SMS, table)
    found.bind("decode:8x1:s2:cluster", running, "online")(0)
    (call,) = seen
    keys, values, pages = found.stores[0]
    assert call["plan"] == decode.DecodePlan(8, 1, 2, "online", True)
    assert [call["workspace"]] == running.decoding
    names = ("qkv", "positions", "keys", "values", "page_table", "kv_lengths")
    wanted = (found.qkv, found.positions, keys, values, pages, found.lengths)
    assert all(call[name] is value for name, value in zip(names, wanted))
    heads = call["heads"]
    assert (heads.spec, heads.rope, heads.phi) == (SMALL, found.rope, None)


@pytest.mark.parametrize("tokens", [0, 48])
def test_kernels_of_a_gpu_run_what_was_picked(table: Table, monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    native = pytest.importorskip("tenfold.ops.gpu.native")
    gpu = native.Gpu.__new__(native.Gpu)
    Oracle.__init__(gpu, CPU, torch.float32)
    gpu.options, gpu.attending = Options(), attending.Attending(CPU, SMS, table)
    gpu._recomputed = native.Recomputed(gpu.attending.recomputed)
    picked: list[Any] = []
    original = gpu.attending.pick

    def pick(*given: Any) -> Any:
        picked.append(given)
        return original(*given)

    monkeypatch.setattr(gpu.attending, "pick", pick)
    sizes = (1, 48) if tokens else (2, 64)
    found = tuning.Inputs(Reading(SMALL, *sizes, 16, torch.float32, tokens, whole=tokens > 0), 1, CPU)
    keys, values, pages = found.stores[0]
    step = replace(found.contexts(pages), max_kv=48)  # of decodes, the page table has room for more than that
    result = gpu.attention(found.qkv, found.heads, keys, values, step)
    torch.testing.assert_close(result, oracle(found), rtol=1e-4, atol=1e-4)
    ((reading,),) = picked
    assert reading == found.reading


def test_lanes_count_recomputed_rows_together(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels of some of the SMs have workspaces of their own, and one counter with those of all; a workspace that is
    outgrown takes no count along.
    """
    native = pytest.importorskip("tenfold.ops.gpu.native")
    monkeypatch.setattr(native, "Packing", lambda *given: None)
    gpu = native.Gpu.__new__(native.Gpu)
    Oracle.__init__(gpu, CPU, torch.bfloat16)
    gpu.options, gpu.attending = Options(), attending.Attending(CPU, SMS, table)
    gpu.arms, gpu._recomputed = SimpleNamespace(table=table), native.Recomputed(gpu.attending.recomputed)
    lanes = [gpu, gpu.on(32), gpu.on(100)]
    assert len({id(lane.attending.splits) for lane in lanes}) == 3
    for count, lane in enumerate(lanes, 1):
        lane.attending.splits.recomputed += count
        lane.attending._workspace(1, 8).recomputed += 10 * count
        lane.attending._workspace(2 * graphs.LARGEST, 8).recomputed += 100 * count
    assert gpu.recomputed == 0  # no layer was seen that has a unified maximum
    lanes[1]._recomputed.used = True
    assert {lane.recomputed for lane in lanes} == {666}


def test_plans_are_remembered_and_carry_the_softmax_in_use(table: Table) -> None:
    for softmax in ("lazy", "unified"):
        one = attending.Attending(CPU, SMS, table, softmax=softmax)
        found = one.pick(READING)
        assert found == (decode.plan(SPEC, 1, 8192, SMS, softmax), softmax)
        assert one.pick(READING) is found
    for tokens in range(9000, 9400):
        one.pick(replace(READING, tokens=tokens))
    assert len(one._known) == 2
    attention = ("attention 32/8 heads of 128", "prefill attention 32/8 heads of 128")
    ops = {choice.key.op for choice in one.explain(16, torch.bfloat16, 8192)}
    assert ops == {*attention, *(f"softmax of {op}" for op in attention)}


# PyTorch's attention


WHOLE = Reading(SPEC, 1, 1024, 16, tokens=1024, whole=True)


def test_pytorchs_attention_is_an_arm_of_whole_prompts_only(table: Table) -> None:
    assert attending.candidates(WHOLE, SMS)[-1] == "sdpa"
    for other in (
        {"whole": False},
        {"dtype": torch.float32},
        {"spec": replace(SPEC, window=100)},
        {"spec": replace(SPEC, softcap=9.0)},
    ):
        reading = replace(WHOLE, **other)  # type: ignore[arg-type]
        assert "sdpa" not in attending.candidates(reading, SMS)
        assert not attending.legal("sdpa", reading, SMS)
    assert "sdpa" not in attending.candidates(READING, SMS)
    assert attending.choice(WHOLE, table, SMS).arm != "sdpa"  # never by rule


def test_where_pytorchs_attention_is_fastest_chunks_behind_a_context_take_the_next(table: Table) -> None:
    first = attending.rule(WHOLE, SMS)
    table.record(attending.key(WHOLE, SMS), {first: 9.0, "sdpa": 5.0, "tiles": 7.0})
    found = attending.choice(WHOLE, table, SMS)
    assert (found.arm, found.source, found.runner_up) == ("sdpa", "measured", "tiles")
    behind = attending.choice(replace(WHOLE, whole=False), table, SMS)
    assert (behind.arm, behind.source, behind.runner_up) == ("tiles", "measured", first)
    running, timer = attending.Attending(CPU, SMS, table), FakeTimer()
    assert running.pick(WHOLE)[0] == "sdpa"
    assert running.pick(replace(WHOLE, longest=3000, whole=False))[0] == "tiles"
    assert list(tuning.measure_softmax(WHOLE, running, timer)) == ["lazy", "online"]  # of chunks in "tiles"
    rows = report.attention([WHOLE], table, SMS)
    assert [(row.reading.whole, row.choice.arm) for row in rows] == [(True, "sdpa"), (False, "tiles"), (True, "lazy")]


@pytest.mark.parametrize(("old", "whole"), [(0, True), (5, False)])
def test_kernels_know_a_prompt_that_is_all_of_its_context(table: Table, old: int, whole: bool) -> None:
    native = pytest.importorskip("tenfold.ops.gpu.native")
    gpu = native.Gpu.__new__(native.Gpu)
    Oracle.__init__(gpu, CPU, torch.float16)
    gpu.options, gpu.attending = Options(), attending.Attending(CPU, SMS, table)
    gpu._recomputed = native.Recomputed(gpu.attending.recomputed)
    found = tuning.Inputs(Reading(SMALL, 1, 48, 16, torch.float16, 48, whole=True), 1, CPU)
    table.record(attending.key(attending.at(found.reading), SMS), {"tiles": 9.0, "sdpa": 1.0})
    keys, values, pages = found.stores[0]
    step, new = found.contexts(pages), 48 - old
    step = replace(step, **{name: getattr(step, name)[old:] for name in ("positions", "slots")}, max_query=new)
    step = replace(step, query_start=torch.tensor([0, new], dtype=torch.int32))
    result = gpu.attention(found.qkv[old:], found.heads, keys, values, step)
    (reading,) = gpu.attending.asked()
    assert reading.whole == whole
    assert [arm for arm, _ in step.memo.values()] == ["sdpa" if whole else "tiles"]
    expected = Oracle("cpu", torch.float16).attention(found.qkv[old:], found.heads, keys, values, step)
    torch.testing.assert_close(result, expected, rtol=1e-2, atol=1e-2)


# Other projects' kernels, which are not installed here: modules that say what they were given


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], dict[str, Any]]]:
    """`fake(module, function)` installs a library that computes nothing but zeros, and returns what it was given."""
    third_party.installed.cache_clear()

    def install(module: str, function: str) -> dict[str, Any]:
        given: dict[str, Any] = {}

        def run(q: Tensor, *rest: Any, **named: Any) -> Tensor:
            given.update(named, q=q, rest=rest)
            return torch.zeros_like(q)

        for part in (module.partition(".")[0], module):
            made = ModuleType(part)
            made.__spec__ = object()  # type: ignore[assignment]
            setattr(made, function, run)
            monkeypatch.setitem(sys.modules, part, made)
        return given

    yield install
    third_party.installed.cache_clear()
    third_party.workspace.cache_clear()


def test_flashinfer_is_an_arm_of_decodes_where_it_is_installed(table: Table, fake: Any) -> None:
    given = fake("flashinfer.decode", "trtllm_batch_decode_with_kv_cache")
    assert "flashinfer" in attending.candidates(READING, SMS)
    assert "flashinfer" not in attending.candidates(replace(READING, tokens=64), SMS)
    assert "flashinfer" not in attending.candidates(replace(READING, spec=replace(SPEC, softcap=9.0)), SMS)
    table.record(attending.key(READING, SMS), {attending.rule(READING, SMS): 9.0, "flashinfer": 5.0})
    assert attending.choice(READING, table, SMS).arm == "flashinfer"
    found = inputs(spec=replace(SMALL, window=20))
    result = found.bind("flashinfer", attending.Attending(CPU, SMS, table), "lazy")(0)
    keys, values, pages = found.stores[0]
    assert result.shape == (2, 64)
    assert given["q"].shape == (2, 4, 16)
    assert given["rest"][0] == (keys, values)
    assert given["rest"][2] is pages
    assert given["rest"][3] is found.lengths
    assert (given["bmm1_scale"], given["window_left"], given["kv_layout"]) == (0.25, 19, "HND")


def test_flash_attn_3_takes_chunks_too(table: Table, fake: Any) -> None:
    given = fake("flash_attn_interface", "flash_attn_with_kvcache")
    assert "flash-attn-3" in attending.candidates(READING, SMS)
    assert "flash-attn-3" in attending.candidates(replace(READING, tokens=64), SMS)
    found = tuning.Inputs(Reading(replace(SMALL, window=20), 1, 48, 16, torch.float32, 48), 1, CPU)
    assert found.bind("flash-attn-3", attending.Attending(CPU, SMS, table), "lazy")(0).shape == (48, 64)
    keys, _, pages = found.stores[0]
    assert given["rest"][0].shape == (3, 16, 2, 16)
    assert given["rest"][0].data_ptr() == keys.data_ptr()
    assert given["page_table"] is pages
    assert given["cu_seqlens_q"].tolist() == [0, 48]
    assert (given["max_seqlen_q"], given["window_size"], given["causal"]) == (48, (19, 0), True)


def test_flash_attn_2_wants_large_pages(table: Table, fake: Any) -> None:
    given = fake("flash_attn", "flash_attn_with_kvcache")
    assert "flash-attn-2" not in attending.candidates(READING, SMS)
    assert "flash-attn-2" in attending.candidates(replace(READING, page_size=256), SMS)
    found = inputs(page=64)
    assert found.bind("flash-attn-2", attending.Attending(CPU, SMS, table), "lazy")(0).shape == (2, 64)
    assert given["q"].shape == (2, 1, 4, 16)
    assert given["block_table"] is found.stores[0][2]


# Tuning


class FakeTimer:
    """Calls nothing but the reference; the time of an arm is its place."""

    def __init__(self, times: Mapping[str, float] | None = None) -> None:
        self.times, self.asked = times, []  # type: ignore[var-annotated]

    def copies(self, nbytes: int) -> int:
        return 1

    def measure(self, arms: Any, copies: int, reference: Any = None, farthest: float = 0.0) -> dict[str, float]:
        self.asked.append(list(arms))
        return dict(self.times) if self.times is not None else {name: 1.0 + i for i, name in enumerate(arms)}

    def memory_microseconds(self) -> dict[str, float]:
        return {"copy": 700.0}


def test_tuning_goes_on_where_it_was(table: Table) -> None:
    running, timer = attending.Attending(CPU, SMS, table), FakeTimer()
    every = attending.readings([attending.Layer(SMALL)], 16, torch.float32, 300)
    assert {(r.requests, r.longest) for r in every if not r.tokens} == {(n, 256) for n in attending.REQUESTS}
    assert [r.tokens for r in every if r.tokens] == [64, 256]
    said: list[str] = []
    assert tuning.tune(every[:2], running, timer, progress=lambda done, total, what: said.append(what)) == 4
    each = ["attention 4/2 heads of 16, 1 x 256 tokens", "attention 4/2 heads of 16, 2 x 256 tokens"]
    assert said == [*each, *(f"softmax of {one}" for one in each)]
    assert timer.asked == [["triton"]] * 2 + [["lazy", "online"]] * 2
    again = attending.Attending(CPU, SMS, Table(table.device, "1", table.path))
    assert tuning.tune(every[:3], again, timer) == 2
    assert tuning.tune(every[:3], again, timer, force=True) == 6


def test_a_softmax_is_measured_in_the_arm_that_runs(table: Table, fake: Any) -> None:
    fake("flashinfer.decode", "trtllm_batch_decode_with_kv_cache")
    known = Reading(SMALL, 2, 256, 16, torch.float32, unified=True)
    layers = [known, replace(known, unified=False)]
    running, timer = attending.Attending(CPU, SMS, table), FakeTimer()
    assert tuning.tune(layers, running, timer) == 3  # both are read alike
    assert timer.asked[1:] == [["lazy", "online", "unified", "paper"], ["lazy", "online"]]
    reading = replace(known, dtype=torch.float16)
    table.record(attending.key(reading, SMS), {"triton": 9.0, "flashinfer": 5.0})
    assert tuning.measure_softmax(reading, running, timer) == {}
    assert len(timer.asked) == 3


@pytest.mark.parametrize("tokens", [0, 48])
def test_each_softmax_computes_attention(table: Table, tokens: int) -> None:
    reading = Reading(SMALL, 1 if tokens else 2, 48, 16, torch.float32, tokens, unified=True)
    found, running = tuning.Inputs(reading, 1, CPU), attending.Attending(CPU, SMS, table)
    for name in attending.softmaxes(reading):
        result = found.bind("tiles" if tokens else "triton", running, name)(0)
        torch.testing.assert_close(result, oracle(found), rtol=1e-4, atol=1e-4)
    assert running.splits.recomputed.item() < found.reading.spec.heads * len(result)  # the maximum serves most rows


def test_nothing_that_runs_is_an_error(table: Table) -> None:
    with pytest.raises(ValueError, match="None of 1 arms could run attention 4/2"):
        tuning.measure(Reading(SMALL, 1, 64, 16, torch.float32), attending.Attending(CPU, SMS, table), FakeTimer({}))


def test_readings_that_would_take_too_much_memory_are_left_out() -> None:
    every = attending.readings([attending.Layer(SPEC)], 16, torch.bfloat16, 1 << 20, 1 << 30)
    assert max(r.nbytes for r in every) == 1 << 30
    assert Reading(SPEC, 2, 131072, 16) in every
    assert Reading(SPEC, 4, 131072, 16) not in every


def test_the_floor_counts_what_a_query_sees() -> None:
    token = 2 * 8 * 128 * 2
    own = 2 * 128 * 2 * (32 + 8)
    assert attending.floor_bytes(READING) == 6144 * token + own
    assert attending.floor_bytes(replace(READING, spec=replace(SPEC, window=100))) == 100 * token + own


# Softmax


CHUNK = replace(READING, requests=1, longest=1024, tokens=1024)


@pytest.mark.parametrize(
    ("fixed", "known", "reading", "taken"),
    [
        *(("auto", False, CHUNK, "lazy"), ("auto", True, CHUNK, "unified"), ("auto", True, READING, "lazy")),
        *(("unified", True, READING, "unified"), ("online", True, CHUNK, "online"), ("paper", True, READING, "paper")),
    ],
)
def test_a_unified_maximum_is_for_chunks_unless_it_was_asked_for(
    table: Table, fixed: str, known: bool, reading: Any, taken: str
) -> None:
    found = attending.softmax_choice(replace(reading, unified=known), table, SMS, fixed)
    assert (found.arm, found.source) == (taken, "rule" if fixed == "auto" else "fixed")


def test_a_softmax_that_was_measured_to_be_faster_runs(table: Table) -> None:
    known = replace(READING, unified=True)
    table.record(attending.softmax_key(known, SMS), {"lazy": 30.0, "online": 32.0, "unified": 20.0, "paper": 25.0})
    found = attending.softmax_choice(known, table, SMS)
    assert (found.arm, found.source, found.microseconds, found.runner_up) == ("unified", "measured", 20.0, "paper")
    arm, softmax = attending.Attending(CPU, SMS, table).pick(known)
    assert (arm, softmax) == (decode.plan(SPEC, 1, 8192, SMS, "unified"), "unified")
    assert attending.softmax_choice(replace(known, longest=5000), table, SMS).arm == "unified"
    assert attending.softmax_choice(known, table, SMS, "online").source == "fixed"
    for other in ({"unified": False}, {"requests": 2}, {"tokens": 64}, {"dtype": torch.float16}, {"longest": 2000}):
        assert attending.softmax_choice(replace(known, **other), table, SMS).source == "rule"
    table.record_steps(attending.softmax_key(known, SMS), {"lazy": 3000.0, "unified": 3100.0})
    assert attending.softmax_choice(known, table, SMS).source == "step"
    assert attending.Attending(CPU, SMS, table).pick(known)[1] == "lazy"


def test_a_softmax_that_nothing_is_known_for_never_comes_from_a_table(table: Table) -> None:
    table.record(attending.softmax_key(READING, SMS), {"lazy": 30.0, "unified": 1.0})
    found = attending.softmax_choice(READING, table, SMS)
    assert (found.arm, found.source) == ("lazy", "rule")


@given(st.booleans(), st.booleans())
def test_softmaxes_are_legal_and_begin_with_the_rule(chunk: bool, known: bool) -> None:
    reading = replace(CHUNK if chunk else READING, unified=known)
    found = attending.softmaxes(reading)
    assert found[0] == attending.softmax_rule(reading)
    assert len(found) == len(set(found))
    assert ("unified" in found) == known
    assert ("paper" in found) == (known and not chunk)  # the paper's guard is not in the kernel of chunks


def test_kernels_run_with_what_is_known_of_a_layer(table: Table) -> None:
    native = pytest.importorskip("tenfold.ops.gpu.native")
    gpu = native.Gpu.__new__(native.Gpu)
    Oracle.__init__(gpu, CPU, torch.float32)
    gpu.options, gpu.attending = Options(), attending.Attending(CPU, SMS, table)
    gpu._recomputed = native.Recomputed(gpu.attending.recomputed)
    for known in (False, True):
        found = tuning.Inputs(Reading(SMALL, 1, 48, 16, torch.float32, 48, known), 1, CPU)
        keys, values, pages = found.stores[0]
        step = found.contexts(pages)
        gpu.attention(found.qkv, found.heads, keys, values, step)
        assert [softmax for _, softmax in step.memo.values()] == ["unified" if known else "lazy"]
        assert gpu._recomputed.used == known


def test_memory_of_splits_that_was_outgrown_is_kept_for_graphs() -> None:
    running = attending.Attending(CPU, SMS, Table("some GPU", "v", Path("nowhere")))
    first = running._workspace(1, 8)
    assert running._workspace(graphs.LARGEST, 8) is first
    second = running._workspace(2 * graphs.LARGEST, 8)
    assert second.pairs == 2 * graphs.LARGEST * 8
    assert running.decoding == [first, second]
    assert running._workspace(1, 8) is second
