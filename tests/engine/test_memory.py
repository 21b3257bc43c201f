"""The plan of memory: what is counted, what is derived, and that each advice of a refusal works."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tenfold.base.config import EngineConfig
from tenfold.engine.memory import (
    CPU_KV_LIMIT,
    GIB,
    DoesNotFit,
    Draft,
    MemoryPlan,
    _cgroup,
    fill,
    free_memory,
    kv_spec,
    logits_rows,
    plan_memory,
    resolve,
    size,
    unfused,
    weight_bytes,
    workspace_bytes,
)
from tenfold.engine.opened import Opened
from tenfold.models.table import model_config
from tenfold.ops.kernels import Contexts
from tenfold.ops.kv.attend import OLD_TOKENS, Layout
from tenfold.ops.matrix import RawTensor

CPU = torch.device("cpu")
LLAMA_8B = model_config(
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
SMALL = replace(LLAMA_8B, vocab_size=49152, hidden_size=576, intermediate_size=1536, layers=30, heads=9, kv_heads=3)
SMALL = replace(SMALL, head_dim=64, max_positions=8192)


def settle(**values: Any) -> EngineConfig:
    return resolve(EngineConfig(**values), CPU, "native", quantised=True)


def gpu(**values: Any) -> EngineConfig:
    return resolve(EngineConfig(**values), torch.device("cuda"), "torch", quantised=False)


@pytest.mark.parametrize(
    ("config", "kernels", "quantised", "expected"),
    [
        ({}, "native", True, ("float32", "float16")),
        ({}, "native", False, ("float32", "float32")),
        ({"dtype": "float32"}, "native", True, ("float32", "float32")),
        ({}, "torch", True, ("float32", "float32")),
        ({"dtype": "bfloat16"}, "torch", False, ("bfloat16", "bfloat16")),
        ({"kv_dtype": "float16"}, "torch", False, ("float32", "float16")),
    ],
)
def test_types_follow_the_kernels(
    config: dict[str, str], kernels: str, quantised: bool, expected: tuple[str, str]
) -> None:
    got = resolve(EngineConfig(**config), CPU, kernels, quantised)
    assert (got.dtype, got.kv_dtype) == expected


def test_sizes_follow_the_device_unless_they_are_given() -> None:
    assert (settle().max_batch, settle().max_step_tokens, settle().lookahead) == (64, 512, 0)
    assert (gpu().max_batch, gpu().max_step_tokens, gpu().lookahead, gpu().dtype) == (256, 2048 + 256, 1, "bfloat16")
    experts = resolve(EngineConfig(), torch.device("cuda"), "torch", quantised=False, experts=True)
    assert experts.max_step_tokens == 8192 + 256
    assert settle(max_batch=3, max_step_tokens=5, lookahead=1).max_batch == 3
    assert settle(lookahead=1).lookahead == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"page_size": 0}, "page_size is 0; allowed: 1 to 1024"),
        ({"speculate_tokens": 0}, "speculate_tokens is 0; allowed: 1 to 16"),
        ({"speculate_tokens": 17}, "speculate_tokens is 17; allowed: 1 to 16"),
        ({"max_batch": -1}, "max_batch is -1"),
        ({"max_model_len": -5}, "max_model_len is -5"),
        ({"max_model_len": 1}, "max_model_len is 1"),
        ({"lookahead": 2}, "lookahead is 2; allowed: 0, 1"),
        ({"dtype": "int8"}, "dtype is 'int8'; allowed: auto, float32"),
        ({"kv_dtype": "fp8"}, "kv_dtype is 'fp8'"),
    ],
)
def test_settings_out_of_range_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settle(**values)


def test_a_small_model_on_a_cpu_stays_modest() -> None:
    plan = plan_memory(SMALL, 100 << 20, settle(), 16 * GIB)
    assert plan.fits
    assert plan.bytes_per_token == 2 * 30 * 3 * 64 * 2
    assert plan.kv <= CPU_KV_LIMIT
    assert plan.max_model_len == 8192
    assert plan.total == plan.weights + plan.kv + plan.workspace


def test_a_cpu_gives_a_quarter_of_what_is_free() -> None:
    plan = plan_memory(SMALL, 100 << 20, settle(), 2 * GIB)
    assert plan.fits
    assert GIB // 2 - plan.bytes_per_token * 16 < plan.kv <= GIB // 2


def test_no_more_is_taken_than_can_be_used() -> None:
    plan = plan_memory(SMALL, 100 << 20, settle(max_batch=2, max_model_len=100), 16 * GIB)
    assert plan.tokens <= 2 * (100 + 16)
    assert plan.max_model_len == 100


def test_a_context_asked_for_is_given_beyond_the_usual_share() -> None:
    plan = plan_memory(LLAMA_8B, 5 * GIB, settle(max_model_len=65536), 16 * GIB)
    assert plan.fits
    assert plan.tokens >= 65536
    assert plan.kv > CPU_KV_LIMIT


def test_a_context_not_asked_for_is_what_memory_holds() -> None:
    plan = plan_memory(LLAMA_8B, 5 * GIB, settle(), 16 * GIB)
    assert plan.fits
    assert plan.max_model_len == plan.tokens == CPU_KV_LIMIT // (2 * 32 * 8 * 128 * 2)


def test_a_gpu_gives_what_is_left() -> None:
    plan = plan_memory(LLAMA_8B, 16 * GIB, gpu(), 80 * GIB)
    assert plan.fits
    assert 0.85 * 80 * GIB < plan.total <= 0.9 * 80 * GIB
    assert plan.max_model_len == 131072


def test_kv_memory_is_kept_to() -> None:
    plan = plan_memory(SMALL, 100 << 20, settle(kv_memory=1 << 28), 16 * GIB)
    assert (1 << 28) - 16 * plan.bytes_per_token < plan.kv <= 1 << 28


def test_a_plan_that_fits_says_so_and_can_be_printed() -> None:
    plan = plan_memory(SMALL, 100 << 20, settle(), 16 * GIB)
    plan.require()
    assert "weights    100.00 MiB" in str(plan)
    assert f"{plan.tokens} tokens in {plan.pages} pages of 16, 22.50 KiB a token in float16" in str(plan)
    assert "not fit" not in str(plan)
    config = fill(settle(), plan)
    assert (config.max_model_len, config.kv_memory) == (8192, plan.kv)
    again = plan_memory(SMALL, 100 << 20, config, 16 * GIB)
    assert (again.pages, again.fits) == (plan.pages, True)


def apply(config: EngineConfig, weights: int, change: str) -> tuple[EngineConfig, int]:
    name, _, value = change.split(" ")[0].partition("=")
    if name == "weights":
        return config, weights // 2 if config.dtype == "bfloat16" else weights // 4 + (weights >> 6)
    return replace(config, **{name: value if name in ("kv_dtype", "kv_cache") else int(value)}), weights


@pytest.mark.parametrize(
    ("model", "weights", "config", "free", "expected"),
    [
        (LLAMA_8B, 5 * GIB, settle(max_model_len=131072), 16 * GIB, {"max_model_len"}),
        (LLAMA_8B, 5 * GIB, settle(max_model_len=65536, kv_dtype="float32"), 16 * GIB, {"kv_dtype", "max_model_len"}),
        (SMALL, 540 << 20, settle(weights="dense"), 500 << 20, {"weights"}),
        (SMALL, 100 << 20, settle(max_batch=1024, max_step_tokens=2048), GIB, {"max_batch", "max_step_tokens"}),
        (LLAMA_8B, 16 * GIB, gpu(), 16 * GIB, {"weights"}),
    ],
)
def test_each_change_a_refusal_names_makes_it_fit(
    model: Any, weights: int, config: EngineConfig, free: int, expected: set[str]
) -> None:
    plan = plan_memory(model, weights, config, free)
    assert not plan.fits
    with pytest.raises(DoesNotFit, match="Any one of these would make it fit"):
        plan.require()
    settings = [c for c in plan.changes if "GGUF" not in c]
    assert expected <= {c.partition("=")[0] for c in settings}
    for change in settings:
        changed, lighter = apply(config, weights, change)
        assert plan_memory(model, lighter, changed, free).fits, change
        assert change in str(plan)


def test_a_model_far_too_large_is_refused_without_false_hope() -> None:
    plan = plan_memory(LLAMA_8B, 16 * GIB, settle(), GIB)
    assert not plan.fits
    assert plan.changes == ()
    with pytest.raises(DoesNotFit, match="Use a smaller model"):
        plan.require()


class Files:
    """A checkpoint of two matrices and a vector."""

    def __init__(self, storage: str) -> None:
        quantised = storage not in ("F16", "F32")
        data = torch.zeros(64, 40, dtype=torch.uint8) if quantised else torch.zeros(64, 64, dtype=torch.float16)
        self.tensors = {
            "a": RawTensor("a", storage, (64, 64), data),
            "b": RawTensor("b", "F16", (10, 64), torch.zeros(10, 64, dtype=torch.float16)),
            "norm": RawTensor("norm", "F32", (64,), torch.zeros(64)),
        }

    def names(self) -> list[str]:
        return list(self.tensors)

    def tensor(self, name: str) -> RawTensor:
        return self.tensors[name]


@pytest.mark.parametrize(
    ("storage", "mode", "kernels", "expected", "quantised"),
    [
        ("Q4_1", "auto", "native", 64 * 40 + 640 * 4 + 256, True),
        ("Q4_1", "dense", "native", (4096 + 640 + 64) * 4, False),
        ("Q4_1", "auto", "torch", (4096 + 640 + 64) * 4, False),
        ("F16", "auto", "native", (4096 + 640 + 64) * 4, False),
        ("F16", "q8_0", "native", 4096 * 34 // 32 + 640 * 34 // 32 + 256, True),
        ("F16", "q8_0", "gpu", (4096 + 640 + 64) * 4, False),
        ("Q4_1", "auto", "gpu", (4096 + 640 + 64) * 4, False),
        ("F16", "int4", "gpu", (4096 + 640) // 2 + 74 * 2 + 256, True),
        ("F16", "fp8", "gpu", 4096 + 640 + 74 * 4 + 256, True),
        ("F16", "int4", "native", (4096 + 640) * 18 // 32 + 256, True),
        ("F16", "fp8", "native", (4096 + 640 + 64) * 4, False),
    ],
)
def test_weights_are_counted_as_they_will_be_loaded(
    storage: str, mode: str, kernels: str, expected: int, quantised: bool
) -> None:
    checkpoint: Any = Files(storage)
    assert weight_bytes(checkpoint, mode, torch.float32, kernels) == (expected, quantised)


def test_a_plan_of_weights_in_a_mode_that_is_none_is_refused() -> None:
    checkpoint: Any = Files("F16")
    with pytest.raises(ValueError, match="weights is 'int5'; allowed: auto, dense, q8_0"):
        weight_bytes(checkpoint, "int5", torch.float32, "native")


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("auto", 4096 * 2), ("int4", 4096 * 3 + 64 * 2), ("int4-blocks", 4096 * 2), ("q8_0", 4096 * 2)],
)
def test_a_packed_head_beside_its_table_counts(mode: str, expected: int) -> None:
    checkpoint: Any = Files("F16")
    table = RawTensor("model.embed_tokens.weight", "F16", (64, 64), torch.zeros(64, 64, dtype=torch.float16))
    checkpoint.tensors = {table.name: table}
    assert weight_bytes(checkpoint, mode, torch.bfloat16, "gpu")[0] == expected


def test_free_memory_is_something() -> None:
    assert 1 << 20 < free_memory(CPU) < 1 << 50


def test_a_containers_limit_counts(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.stat").write_text("anon 400\nfile 500\n")
    assert _cgroup(tmp_path) == 600
    (tmp_path / "memory.max").write_text("max\n")
    assert _cgroup(tmp_path) is None
    assert _cgroup(tmp_path / "missing") is None


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (3 << 29, "1.50 GiB"), (5 << 20, "5.00 MiB")]
)
def test_bytes_are_said_in_binary_units(count: int, text: str) -> None:
    assert size(count) == text


def test_a_plan_is_frozen() -> None:
    plan = plan_memory(SMALL, 1 << 20, settle(), 16 * GIB)
    with pytest.raises(AttributeError):
        plan.pages = 1  # type: ignore[misc]
    assert isinstance(plan, MemoryPlan)


# Guessing ahead


def test_a_draft_model_has_its_weights_and_its_part_of_every_page() -> None:
    config = settle(speculate="small")
    alone = plan_memory(LLAMA_8B, 5 * GIB, config, 16 * GIB)
    both = plan_memory(LLAMA_8B, 5 * GIB, config, 16 * GIB, Draft(SMALL, 100 << 20))
    assert both.weights == alone.weights + (100 << 20)
    assert both.draft_weights == 100 << 20
    own = kv_spec(SMALL, config).bytes_per_token
    assert both.bytes_per_token == alone.bytes_per_token + own
    assert both.kv == both.pages * 16 * both.bytes_per_token <= alone.kv
    assert both.pages < alone.pages
    assert "of which the draft model 100.00 MiB" in str(both)
    assert "draft" not in str(alone)


def test_a_draft_model_that_does_not_fit_is_advised_against() -> None:
    plan = plan_memory(LLAMA_8B, 5 * GIB, settle(speculate="small"), 8 * GIB, Draft(LLAMA_8B, 5 * GIB))
    assert not plan.fits
    assert "speculate=ngram (drafts without a model)" in plan.changes
    assert plan_memory(LLAMA_8B, 5 * GIB, settle(speculate="ngram"), 8 * GIB).fits


def test_guesses_need_room_for_their_logits_only_in_small_batches() -> None:
    assert logits_rows(settle(max_batch=1)) == 1
    assert logits_rows(settle(max_batch=1, speculate="ngram")) == 5
    assert logits_rows(settle(max_batch=1, speculate="ngram", max_step_tokens=3)) == 3
    assert logits_rows(settle(max_batch=50, speculate="ngram")) == 64
    assert logits_rows(gpu(speculate="ngram")) == logits_rows(gpu()) == 256


GEMMA = replace(SMALL, layers=6, windows=(512, 512, 512, 512, 512, 0))
SKVQ = "k2v1.5g32"  # 13 + 16 bytes of codes a head and token, 4 groups a side of two bytes each: 37


def test_packed_tokens_take_their_bytes_and_running_sequences_their_rooms() -> None:
    config = settle(kv_cache=SKVQ, max_batch=8, max_model_len=2048, kv_memory=GIB)
    plan = plan_memory(SMALL, GIB // 8, config, 8 * GIB)
    spec = kv_spec(SMALL, config)
    assert spec.bytes_per_token == plan.bytes_per_token == 30 * 3 * 37
    assert spec.bytes_per_room == 30 * 2 * 3 * 64 * 2 * 16 * 12  # a ring of 11 pages for 128 tokens, one of sinks
    assert plan.rooms == 8 + 2
    assert plan.pages == 8 * (2048 + 16) // 16
    assert plan.kv == plan.pages * spec.bytes_per_page + 10 * spec.bytes_per_room
    assert "8 run at a time" in str(plan)
    alone = plan_memory(SMALL, GIB // 8, replace(config, prefix_cache=False), 8 * GIB)
    assert alone.rooms == 8


@pytest.mark.parametrize("name", ["fp8", "int4", "k2v1.5g64", "k2v2g32w8s2"])
@pytest.mark.parametrize("requests", [1, 7, 256])
def test_scratch_of_chunks_over_a_packed_cache_is_counted(name: str, requests: int) -> None:
    """No step takes more, however long contexts are."""
    config = gpu(kv_cache=name, max_batch=requests, max_step_tokens=512)
    packed = kv_spec(LLAMA_8B, config).packed
    assert packed is not None
    counted = workspace_bytes(LLAMA_8B, config) - workspace_bytes(LLAMA_8B, replace(config, kv_cache="dense"))
    lengths, new = torch.full((requests,), 100_000 // requests, dtype=torch.int32), 512 // requests
    starts = torch.arange(requests + 1, dtype=torch.int32) * new
    table = torch.zeros(requests, 100_000 // 16 + 1, dtype=torch.int32)
    slots = torch.zeros(requests * new, dtype=torch.int32)
    step = Contexts(slots, slots, table, starts, lengths, new, int(lengths.max()))
    layout = Layout(packed, 16, step)
    assert len(layout.old) > 1
    pages = layout.recent.count + max(band.scratch.count for band in layout.old)
    assert pages * 16 * 2 * LLAMA_8B.kv_size * 2 <= counted < 3 * 2 * LLAMA_8B.kv_size * 2 * OLD_TOKENS


@pytest.mark.parametrize(
    ("name", "shape", "changes", "says", "instead"),
    [
        ("k3v4g64", {}, {}, "keys of 3 bits; allowed: 2, 4, 8", "Take fp8 or int4 or k2v2g64"),
        ("k2v3g64", {}, {}, "values of 3 bits; allowed: 1.5, 2, 4, 8", "Take fp8 or int4 or k2v2g64"),
        ("k1.5v1.5g64", {}, {}, "keys of 1.5 bits", "Take fp8"),
        ("k2v2g32", {"head_dim": 96, "heads": 32}, {}, "heads of 96 channels; allowed: 64, 128", "Take auto"),
        ("k2v2g64h2", {"head_dim": 256, "heads": 16}, {}, "heads of 256 channels", "Take auto"),
        ("k2v2g64", {}, {"page_size": 24}, "pages of 24 tokens; allowed: multiples of 16", "Take auto"),
        ("k2v2g64", {}, {"kv_dtype": "float16"}, "kv_dtype float16 beside dtype bfloat16", "Take fp8 or int4"),
    ],
)
def test_formats_without_a_fused_kernel_are_named(
    name: str, shape: dict[str, Any], changes: dict[str, Any], says: str, instead: str
) -> None:
    told = unfused(replace(LLAMA_8B, **shape), replace(gpu(kv_cache=name), **changes))
    assert says in told
    assert "slower than with a cache as computed" in told
    assert instead in told


@pytest.mark.parametrize("name", ["auto", "fp8", "int4", "skvq", "k2v2g128", "k4v2g64"])
def test_formats_with_a_fused_kernel_need_no_word(name: str) -> None:
    assert unfused(LLAMA_8B, gpu(kv_cache=name)) == ""


def test_rooms_take_no_more_than_half_of_the_cache() -> None:
    config = settle(kv_cache=SKVQ, max_batch=64, kv_memory=64 << 20)
    plan = plan_memory(SMALL, GIB // 8, config, 8 * GIB)
    assert plan.fits
    assert 1 <= plan.max_batch < 64
    assert plan.rooms * plan.room_bytes <= plan.kv / 2
    assert fill(config, plan).max_batch == plan.max_batch


def test_layers_with_a_sliding_window_are_not_packed() -> None:
    spec = kv_spec(GEMMA, settle(kv_cache="fp8"))
    assert spec.bytes_per_token == 5 * spec.exact_bytes + 3 * 2 * (64 + 2)
    assert str(spec) == "1 layer as k8v8g64w0s0-post-fp16, 5 with a sliding window as computed in float16"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("int3", "kv_cache is 'int3'; allowed: auto, dense, fp8, int4, skvq"),
        ("k2v2g128", "groups of 128 channels; 1 heads of 64 channels"),
        ("k2v2g64h2", "shares groups between 2 heads, the model has 3 kv heads; allowed: 1, 3"),
        ("k2v2g32s20", "keeps 20 sinks, pages hold 16 tokens"),
    ],
)
def test_formats_that_cannot_be_are_refused_with_a_sentence(name: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        plan_memory(SMALL, GIB // 8, settle(kv_cache=name), 8 * GIB)


def test_a_format_of_fewer_bits_is_offered_where_it_makes_it_fit() -> None:
    config = gpu(max_model_len=32768, max_batch=1)
    plan = plan_memory(LLAMA_8B, 15 * GIB, config, 21 * GIB)
    assert not plan.fits
    assert any(change.startswith("kv_cache=fp8") for change in plan.changes)
    assert plan_memory(LLAMA_8B, 15 * GIB, replace(config, kv_cache="fp8"), 21 * GIB).fits


@pytest.mark.parametrize("share", [0.0, -0.1, 1.5])
def test_shares_of_gpu_memory_are_checked(share: float) -> None:
    with pytest.raises(ValueError, match="gpu_memory_utilization"):
        gpu(gpu_memory_utilization=share)


def test_less_of_a_gpu_is_used_where_that_is_asked_for() -> None:
    half, most = (plan_memory(LLAMA_8B, 8 * GIB, gpu(gpu_memory_utilization=s), 80 * GIB) for s in (0.5, 0.95))
    assert half.total <= 40 * GIB < most.total <= 76 * GIB


@pytest.mark.parametrize("name", ["fp8", "int4", "skvq"])
def test_heads_that_no_group_fits_are_refused_with_a_sentence(name: str) -> None:
    odd = replace(SMALL, head_dim=40)
    with pytest.raises(ValueError, match=f"kv_cache is '{name}', which has no groups for heads of 40 channels"):
        plan_memory(odd, GIB // 8, settle(kv_cache=name), 8 * GIB)


def test_a_context_that_the_model_does_not_allow_is_told(
    tiny: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    opened = Opened(EngineConfig(model=str(tiny("llama")), device="cpu", max_model_len=99_999_999))
    with caplog.at_level("WARNING", logger="tenfold"):
        opened.choose()
    most = opened.shape.max_positions
    assert f"max_model_len is 99999999; this model allows up to {most} tokens, which is what it gets" in caplog.text
    assert opened.config.max_model_len == most
