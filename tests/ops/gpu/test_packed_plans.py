"""Kernels of packed KV caches without a GPU: plans, what compiles, and what the kernels compute thread by thread."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tenfold.cache.format import parse
from tenfold.ops.gpu import even, hopper, nvrtc, packed
from tenfold.ops.gpu.decode import EVEN, SUMS
from tenfold.ops.kernels import AttentionSpec
from tenfold.ops.kv import attend
from tenfold.ops.kv.spec import PackedSpec
from tests.ops.gpu import elf
from tests.ops.gpu.emulated import Emulator
from tests.ops.gpu.emulated_cases import NEEDS_COMPILER
from tests.ops.gpu.packed_cases import NOTHING, SMS, ChunkStep, Contexts, Shape, Written, distance

NAMES = ("fp8", "int4", "k2v1.5g64", "k2v1.5g128", "k2v2g32", "k4v2g64", "k2v2g64-post", "k2v2g64h2", "k8v8g64")
HALF = torch.float16


@pytest.fixture
def emulator(folder: Path) -> Emulator:
    return Emulator(folder)


DECODES = {
    "two groups, turned keys": Shape("k2v1.5g64w32s5", lengths=(300, 1, 0, 36)),
    "one group, own heads": Shape("k2v1.5g128w16s3", 2, 2, lengths=(150,), dtype=HALF),
    "heads of 64": Shape("k2v1.5g32w16s2", 4, 2, 64, (100, 200), page=48, shift=True),
    "several parts": Shape("k4v2g64w0s7", 14, 2, lengths=(200,), softcap=20.0),
    "a span of two": Shape("k2v4g64h2w16s4", 2, 2, lengths=(120, 20)),
    "int4": Shape("int4", 4, 2, lengths=(170, 33), rotary=64),
    "fp8": Shape("fp8", 4, 2, lengths=(100, 33), dtype=HALF),
    "offsets": Shape("k8v1.5g32w16s2", 4, 2, lengths=(100,), shift=True, page=32),
    "offsets after rotary": Shape("k2v2g16w16s2-post", 4, 2, lengths=(100,), shift=True),
}


@NEEDS_COMPILER
@pytest.mark.parametrize("shape", DECODES.values(), ids=DECODES.keys())
def test_decode_attention_is_what_its_definition_says(
    monkeypatch: pytest.MonkeyPatch, emulator: Emulator, shape: Shape
) -> None:
    monkeypatch.setattr(nvrtc, "load", emulator)
    contexts = Contexts(shape)
    prepared = contexts.prepared()
    expected, expected_sums = contexts.expected()
    out, sums = contexts.run(prepared, contexts.plan(prepared, warps=2, splits=2))
    assert distance(out, expected) < (4e-3 if shape.dtype == torch.bfloat16 else 2.5e-3)
    live = [r for r, length in enumerate(shape.lengths) if length]
    assert (sums.double() - expected_sums)[live].abs().max() < 5e-3
    for r, length in enumerate(shape.lengths):
        assert length or (not out[r].any() and (sums[r] == -torch.inf).all())


@NEEDS_COMPILER
@pytest.mark.parametrize("shape", DECODES.values(), ids=DECODES.keys())
def test_contexts_that_are_shared_out_evenly(monkeypatch: pytest.MonkeyPatch, emulator: Emulator, shape: Shape) -> None:
    monkeypatch.setattr(nvrtc, "load", emulator)
    contexts = Contexts(replace(shape, lengths=(600, 1, 0, 36)))
    prepared = contexts.prepared()
    expected, expected_sums = contexts.expected()
    out, sums = contexts.run(prepared, contexts.plan(prepared, warps=2, splits=EVEN))
    assert distance(out, expected) < (4e-3 if shape.dtype == torch.bfloat16 else 2.5e-3)
    assert (sums.double() - expected_sums)[[0, 1, 3]].abs().max() < 5e-3
    same, same_sums = contexts.run(prepared, contexts.plan(prepared, warps=2, splits=2))
    assert distance(out, same) < 2.5e-3
    torch.testing.assert_close(sums, same_sums, rtol=0.0, atol=1e-5)
    assert not out[2].any()


WRITES = {
    "before rotary": (Shape("k2v1.5g64", shift=True), True),
    "a span of two": (Shape("k4v2g64h2-post-fp16", head_dim=64, dtype=HALF), False),
    "int4": (Shape("int4", 4, 2), False),
    "fp8": (Shape("fp8", 4, 2, rotary=32), False),
    "three levels of keys": (Shape("k1.5v4g32w16s2", 4, 2, 64), True),
}


@NEEDS_COMPILER
@pytest.mark.parametrize(("shape", "norms"), WRITES.values(), ids=WRITES.keys())
def test_what_is_written_is_what_others_write(
    monkeypatch: pytest.MonkeyPatch, emulator: Emulator, shape: Shape, norms: bool
) -> None:
    monkeypatch.setattr(nvrtc, "load", emulator)
    for in_rooms in (False, True):
        written = Written(shape, 17, norms, seed=int(in_rooms))
        queries = written.run(in_rooms)
        assert torch.equal(queries, written.expected())
        # Sums of a norm or a Hadamard matrix in another order may move a number across the middle of two codes.
        assert not [what for what, share in written.differences().items() if share > 2e-4]
        live = written.slots[written.slots >= 0].long()
        stored = written.layer.keys.codes[live // shape.page, :, live % shape.page]
        assert (stored != NOTHING).any(-1).all()


CHUNKS = {
    "before rotary": Shape("k2v1.5g64w32s5", lengths=(150, 40, 90)),
    "one group, own heads": Shape("k2v1.5g128w16s3", 2, 2, lengths=(100,), dtype=HALF, shift=True),
    "heads of 64": Shape("k4v2g32w16s2", 4, 2, 64, (60, 100), shift=True),
    "a span of two": Shape("k2v4g64h2w16s4-post", 2, 2, lengths=(120, 20)),
    "nothing exact, turned": Shape("int4", 4, 2, lengths=(70, 33)),
    "float8": Shape("fp8", 4, 2, lengths=(60,), dtype=HALF),
    "three levels of keys": Shape("k1.5v8g32w16s0-post", 4, 2, 64, (50, 30)),
}


@NEEDS_COMPILER
@pytest.mark.parametrize("shape", CHUNKS.values(), ids=CHUNKS.keys())
def test_chunks_are_stored_read_and_merged_as_in_plain_operations(
    monkeypatch: pytest.MonkeyPatch, emulator: Emulator, shape: Shape
) -> None:
    monkeypatch.setattr(nvrtc, "load", emulator)
    one, two = ChunkStep(shape), ChunkStep(shape)
    plain = one.run(attend.Means())
    packing = packed.Packing(torch.device("cpu"), SMS)
    means = packing.chunks(two.qkv, shape.spec, two.contexts.layer)
    assert isinstance(means, packed.Chunks) != ("k1.5" in shape.name)  # three levels of keys are left to others
    if "k1.5" in shape.name:
        means = packed.Chunks(packed.prepare(two.contexts.layer, shape.spec))
    assert distance(two.run(means), plain) < 2e-3
    assert not [what for what, share in two.differences(one).items() if share > 2e-4]


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(NAMES),
    group=st.sampled_from((1, 2, 4, 7, 8)),
    head_dim=st.sampled_from((64, 128)),
    requests=st.integers(1, 256),
    longest=st.integers(1, 1 << 20),
)
def test_plans_fit(name: str, group: int, head_dim: int, requests: int, longest: int) -> None:
    kv_heads = 8
    spec = AttentionSpec(kv_heads * group, kv_heads, head_dim, 1.0, 0, 0.0, head_dim)
    stored = (
        PackedSpec.parse("k2v1.5g64") if (name, head_dim) == ("k2v1.5g128", 64) else parse(name, kv_heads, head_dim)
    )
    assert stored is not None
    assert packed.legal(spec, stored, torch.bfloat16, 16)
    exact = bool(stored.window or stored.sinks)
    shape = packed.Shape(stored, head_dim, stored.rotary == "pre", exact, False)
    plan = packed.plan(spec, shape, requests, longest, SMS)
    assert 1 <= plan.heads * shape.groups <= packed.COLUMNS
    shared = packed.shared_bytes(shape, plan.heads, plan.tokens, plan.stages, plan.warps)
    assert hopper.fits(shared, plan.blocks)
    pairs = requests * kv_heads * -(-group // plan.heads)
    dynamic = packed.dynamic_bytes(shape, plan.tokens, plan.stages, plan.warps)
    parts, most = pairs * plan.splits, plan.splits
    if plan.splits == EVEN:
        own = packed.kind(plan, spec, shape, SMS)
        parts, most = own.pairs * own.capacity(requests), even.SPLITS
        assert own.pairs == pairs // requests
    assert parts == pairs or parts * (plan.heads * (head_dim + 2) + 3) <= SUMS
    assert 8 * most * plan.heads <= dynamic
    assert plan.stages * packed.stage_bytes(shape, plan.tokens) >= 32 * head_dim  # where sums of a warp lie at its end


@given(pairs=st.integers(1, 5000), most=st.integers(1, 300))
def test_splits_fill_rounds(pairs: int, most: int) -> None:
    room = 2 * SMS
    found = packed.splits(pairs, most, room)
    assert 1 <= found <= most
    taken = -(-pairs * found // room) / found
    assert all(taken <= 1.05 * -(-pairs * n // room) / n for n in range(1, min(most, 2 * room) + 1))


@pytest.mark.parametrize(
    ("change", "spec"),
    [
        ({"dtype": torch.float32}, {}),
        ({"page_size": 8}, {}),
        ({"name": "k3v4g64"}, {}),
        ({"name": "k2v2g128h3"}, {"kv_heads": 3, "heads": 3}),
        ({"name": "k4v4g64-post-turned"}, {}),
        ({}, {"head_dim": 80}),
        ({}, {"window": 64}),
        ({}, {"rotary_dim": 64}),
    ],
)
def test_what_kernels_cannot_do_is_left_to_others(change: dict[str, object], spec: dict[str, int]) -> None:
    layers = AttentionSpec(8, 2, 128, 1.0, 0, 0.0, 128)
    known = {"name": "k2v1.5g64", "dtype": torch.bfloat16, "page_size": 16}

    def legal(layers: AttentionSpec, name: str, dtype: torch.dtype, page_size: int) -> bool:
        return packed.legal(layers, PackedSpec.parse(name), dtype, page_size)

    assert legal(layers, **known)  # type: ignore[arg-type]
    assert not legal(replace(layers, **spec), **(known | change))  # type: ignore[arg-type]


def test_turns_compose() -> None:
    """A base turned by a place of the table is the position's own row of the rotary table."""
    rope = torch.randn(3, 64)
    rope = torch.cat(((rope[:1] * torch.arange(200)[:, None]).cos(), (rope[:1] * torch.arange(200)[:, None]).sin()), 1)
    made = packed.turns(1.5 * rope, 4)
    which = packed.channels(4, 128)
    rows = (torch.arange(4)[:, None] * 16 + packed.rows()).flatten()
    table, bases = made.table.float() / 2**15, made.bases.float()
    table = table * packed.levels(4, 8).view(4, 1, 1, 1, 2, 1, 1)
    for position in (0, 17, 100, 191):
        row = int((rows == position % 64).nonzero())
        c, s = table[:, :, row // 16, row % 8, :, :, row // 8 % 2].permute(0, 2, 1, 3, 4).reshape(2, 4, 8, 2)
        base_c, base_s = bases[position // 64].view(2, 2, 4, 4, 2).permute(0, 2, 1, 3, 4).reshape(2, 4, 8, 2)
        both = (base_c * c - base_s * s, base_s * c + base_c * s)
        for got, expected in zip(both, (1.5 * rope).chunk(2, 1)):
            torch.testing.assert_close(got, expected[position][which], rtol=0, atol=3e-3)


@pytest.mark.parametrize(("name", "group", "head_dim"), [("k2v1.5g64", 4, 128), ("k2v2g32", 2, 64), ("fp8", 1, 128)])
def test_compiles_and_needs_as_much_shared_memory_as_plans_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, group: int, head_dim: int
) -> None:
    pytest.importorskip("cuda.bindings.nvrtc")
    monkeypatch.setenv("TENFOLD_HOME", str(tmp_path))
    spec = AttentionSpec(8 * group, 8, head_dim, 1.0, 0, 0.0, head_dim)
    stored = parse(name, 8, head_dim)
    assert stored is not None
    shape = packed.Shape(stored, head_dim, stored.rotary == "pre", bool(stored.window), False)
    plan = packed.plan(spec, shape, 8, 8192, SMS)
    image = nvrtc.compiled("packed_decode.cu", "sm_90a", packed.defines(plan, shape, torch.bfloat16, False))
    sizes = (plan.tokens, plan.stages, plan.warps)
    planned = packed.shared_bytes(shape, plan.heads, *sizes) - packed.dynamic_bytes(shape, *sizes)
    own = elf.static_bytes(image, "packed_decode") - hopper.RESERVED
    assert planned - 256 <= own <= planned
    writing = (("HALF", 0), ("SPAN", 1), ("WARPS", packed.WRITERS), *shape.defines)
    assert nvrtc.compiled("packed_write.cu", "sm_90a", writing).startswith(b"\x7fELF")
    assert nvrtc.compiled("packed_read.cu", "sm_90a", writing).startswith(b"\x7fELF")
    merging = (("HALF", 1), ("D", head_dim), ("WARPS", packed.READERS))
    assert nvrtc.compiled("merge.cu", "sm_90a", merging).startswith(b"\x7fELF")
