"""Attention over packed pages, against its definition on whole sequences, however prompts are cut into steps."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tenfold.cache.format import parse
from tenfold.cache.skvq.attend import Seen, attend, left_window
from tenfold.cache.skvq.calibrate import Sample
from tenfold.cache.store import KVSpec, KVStore
from tenfold.ops.kernels import AttentionSpec, Contexts, Heads, Norm
from tenfold.ops.kv import attend as packed_attend
from tenfold.ops.kv.layer import PackedLayer
from tenfold.ops.kv.quantize import Grouping, hadamard, rounded
from tenfold.ops.kv.spec import PackedSpec
from tenfold.ops.oracle import Oracle

KV_HEADS, HEADS, DIM, PAGE = 2, 4, 32, 8
SPEC = AttentionSpec(HEADS, KV_HEADS, DIM, DIM**-0.5, 0, 0.0, DIM)
FORMATS = ("k2v1.5g16w8s2", "k4v2g32h2w5s3-post", "k3v4g16w0s0", "k2v2g16w0s4", "k2v2g16w20s0-fp16", "fp8", "int4")


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def grouping(spec: PackedSpec, seed: int) -> Grouping:
    """A map inside spans, clip factors and offsets; nothing of it where channels are turned or whole numbers none."""
    channels, width = KV_HEADS * DIM, spec.span * DIM
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randperm(width, generator=generator) // spec.group + s * width // spec.group
             for s in range(channels // width)]  # fmt: skip
    groups = channels // spec.group
    shift = torch.zeros(channels) if spec.turned else random(channels, seed=seed) / 4
    clip = torch.rand(groups, generator=generator) / 4 + 0.75
    map_ = torch.arange(channels) // spec.group if spec.turned else torch.cat(parts)
    return Grouping(map_, clip, 2.0 ** torch.randint(-5, 1, (groups,), generator=generator), shift)


class Cache:
    """One layer over pages in disorder, run step by step."""

    def __init__(self, name: str, requests: int, softcap: float = 0.0) -> None:
        packed = parse(name, KV_HEADS, DIM)
        assert packed is not None
        self.packed = packed
        self.spec = AttentionSpec(HEADS, KV_HEADS, DIM, DIM**-0.5, 0, softcap, DIM)
        self.groupings = (grouping(packed, 1), grouping(packed, 2))
        kv = KVSpec(1, KV_HEADS, DIM, torch.float32, PAGE, packed)
        self.store = KVStore(kv, 16 * requests, torch.device("cpu"), 2 * requests + 1, [self.groupings])
        layer = self.store.layers[0]
        assert isinstance(layer, PackedLayer)
        self.layer = layer
        order = torch.randperm(16 * requests, generator=torch.Generator().manual_seed(3)).int()
        self.table = order.view(requests, 16)
        self.rooms = torch.arange(requests, dtype=torch.int32) * 2 + 1
        rope = torch.cat(
            [f(torch.arange(128)[:, None] / 10 ** (torch.arange(DIM // 2) / 8)) for f in (torch.cos, torch.sin)], 1
        )
        self.heads = Heads(
            self.spec, rope, Norm(1 + random(DIM, seed=4) / 9, 1e-5), Norm(1 + random(DIM, seed=5) / 9, 1e-5)
        )

    def run(self, qkv: list[Tensor], begin: list[int], idle: int = 0) -> Tensor:
        """New tokens of each request, from position begin on. idle: requests of nobody behind them, as padded steps of
        decodes have.
        """
        counts = [len(x) for x in qkv]
        lengths = torch.tensor([b + n for b, n in zip(begin, counts)], dtype=torch.int32)
        positions = torch.cat([torch.arange(b, b + n) for b, n in zip(begin, counts)])
        rows = torch.repeat_interleave(torch.arange(len(qkv)), torch.tensor(counts))
        slots = self.table[rows, positions // PAGE] * PAGE + positions % PAGE
        starts = torch.tensor([0, *counts, *[1] * idle]).cumsum(0).int()
        sizes = (max(counts), int(lengths.max()))
        lengths, positions, table, rooms = (
            torch.cat((x, x.new_zeros(idle, *x.shape[1:]))) for x in (lengths, positions, self.table, self.rooms)
        )
        slots = torch.cat((slots, slots.new_full((idle,), -1)))
        step = Contexts(positions.int(), slots.int(), table, starts, lengths, *sizes, rooms=rooms)
        return Oracle().attention_packed(torch.cat((*qkv, qkv[0][:1].expand(idle, -1))), self.heads, self.layer, step)

    def expected(self, qkv: Tensor) -> Tensor:
        """Of a whole sequence [S, ...], by the definition."""
        packed = self.packed
        sample = Sample.of(qkv, self.heads, torch.arange(len(qkv)))
        keys, values = sample.turn(sample.keys.transpose(0, 1)), sample.values.transpose(0, 1)
        pre = packed.rotary == "pre"
        seen_keys = self.stored(sample.keys.transpose(0, 1) if pre else keys, 0, packed.key_bits)
        seen_values = self.stored(values, 1, packed.value_bits)
        places = torch.arange(len(qkv))
        old = left_window(places, len(qkv), packed.window, packed.sinks)
        seen = Seen(sample.turn(seen_keys) if pre else seen_keys, seen_values, old, old)
        q = sample.q.unflatten(1, (KV_HEADS, -1)).permute(1, 2, 0, 3)
        return attend(q, places, keys, values, seen, self.spec).permute(2, 0, 1, 3).reshape(len(qkv), -1)

    def stored(self, x: Tensor, side: int, bits: float) -> Tensor:
        flat = x.transpose(0, 1).flatten(1)
        turn = hadamard(self.packed.group) if self.packed.turned else None
        if turn is not None:
            flat = (flat.unflatten(1, (-1, len(turn))) @ turn).flatten(1)
        flat = rounded(flat, self.groupings[side], bits, self.packed.parameters)
        if turn is not None:
            flat = (flat.unflatten(1, (-1, len(turn))) @ turn).flatten(1)
        return flat.unflatten(1, (KV_HEADS, DIM)).transpose(0, 1)


@pytest.mark.parametrize("name", ["fp8", "k8v8g32w0s0", "k8v8g32w0s0-post-fp16"])
@pytest.mark.parametrize("size", [0.01, 0.1, 1.0, 100.0])
def test_eight_bits_keep_numbers_of_any_usual_size_without_a_calibration(name: str, size: float) -> None:
    spec = KVSpec(1, KV_HEADS, DIM, torch.float32, PAGE, parse(name, KV_HEADS, DIM))
    layer = KVStore(spec, 2, torch.device("cpu")).layers[0]
    assert isinstance(layer, PackedLayer)
    x, slots = size * random(2 * PAGE, KV_HEADS * DIM, seed=6), torch.arange(2 * PAGE)
    for side in (layer.keys, layer.values):
        side.write(x, slots)
        assert (side.read(slots) - x).norm() < 0.05 * x.norm()


@pytest.mark.parametrize("name", FORMATS)
@settings(deadline=None, max_examples=12)
@given(cuts=st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=5), min_size=1, max_size=3))
def test_however_a_sequence_is_cut_it_sees_what_its_definition_says(name: str, cuts: list[list[int]]) -> None:
    cache = Cache(name, len(cuts))
    width = (HEADS + 2 * KV_HEADS) * DIM
    whole = [random(min(128, sum(own)), width, seed=10 + r) for r, own in enumerate(cuts)]
    expected = [cache.expected(x) for x in whole]
    begin = [0] * len(cuts)
    for turn in range(max(map(len, cuts))):
        chunks = [x[b : b + (own[turn] if turn < len(own) else 1)] for x, b, own in zip(whole, begin, cuts)]
        if not all(map(len, chunks)):
            return
        out = cache.run(chunks, begin).split([len(c) for c in chunks])
        for r, (got, chunk) in enumerate(zip(out, chunks)):
            torch.testing.assert_close(got, expected[r][begin[r] : begin[r] + len(chunk)], rtol=2e-4, atol=2e-4)
            begin[r] += len(chunk)


@pytest.mark.parametrize("name", FORMATS)
def test_requests_of_nobody_have_a_row_and_change_none(name: str) -> None:
    cache = Cache(name, 2)
    whole = [random(n, (HEADS + 2 * KV_HEADS) * DIM, seed=30 + n) for n in (60, 9)]
    expected = [cache.expected(x) for x in whole]
    cache.run([x[:-4] for x in whole], [0, 0])
    for back, idle in ((4, 2), (3, 0), (2, 1), (1, 2)):
        begin = [len(x) - back for x in whole]
        out = cache.run([x[b : b + 1] for x, b in zip(whole, begin)], begin, idle)
        assert len(out) == 2 + idle
        assert out.isfinite().all()
        for got, x, b in zip(out, expected, begin):
            torch.testing.assert_close(got, x[b], rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("most", [1, 3, 20, 64])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("name", FORMATS)
def test_old_tokens_in_bands_are_old_tokens_at_once(
    name: str, softcap: float, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests of ragged lengths with long and short chunks, some longer than a band; sums in another order."""
    monkeypatch.setattr(packed_attend, "OLD_TOKENS", most)
    cache = Cache(name, 4, softcap)
    width = (HEADS + 2 * KV_HEADS) * DIM
    whole = [random(n, width, seed=20 + n) for n in (120, 61, 9, 90)]
    expected = [cache.expected(x) for x in whole]
    begin = [0, 0, 0, 0]
    for ends in ((70, 1, 5, 20), (71, 31, 6, 21), (101, 60, 8, 89), (120, 61, 9, 90)):
        out = cache.run([x[b:e] for x, b, e in zip(whole, begin, ends)], begin)
        for got, x, b, e in zip(out.split([e - b for b, e in zip(begin, ends)]), expected, begin, ends):
            torch.testing.assert_close(got, x[b:e], rtol=2e-4, atol=2e-4)
        begin = list(ends)


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.tuples(st.integers(0, 128), st.integers(1, 40)), min_size=1, max_size=6),
    most=st.integers(1, 200),
)
def test_scratch_is_bounded(monkeypatch: pytest.MonkeyPatch, lengths: list[tuple[int, int]], most: int) -> None:
    """By old tokens at once, new tokens and a page each, whatever contexts there are; and one serves all layers."""
    monkeypatch.setattr(packed_attend, "OLD_TOKENS", most)
    cache = Cache("k2v1.5g16w8s2", len(lengths))
    counts = [min(n, max(1, length)) for length, n in lengths]
    context = torch.tensor([max(1, length) for length, _ in lengths], dtype=torch.int32)
    starts = torch.tensor([0, *counts]).cumsum(0).int()
    zeros = torch.zeros(sum(counts), dtype=torch.int32)
    sizes = (max(counts), int(context.max()))
    step = Contexts(zeros, zeros, cache.table, starts, context, *sizes, rooms=cache.rooms)
    layout = packed_attend.Layout(cache.packed, PAGE, step)
    for band in layout.old:
        assert band.scratch.count * PAGE <= max(most, len(lengths)) + sum(counts) + PAGE * len(lengths)
        assert len(band.positions) == len(band.stored.source) == len(band.stored.target)
    if layout.old:
        one, two = (layout.pages("old", 9, cache.spec, torch.float32) for _ in range(2))
        assert one[0] is two[0]


@pytest.mark.parametrize(
    ("lengths", "most", "bands"),
    [
        ([], 8, []),
        ([0, 0], 8, []),
        ([5], 8, [(0, 5)]),
        ([20], 8, [(0, 8), (8, 8), (16, 4)]),
        ([2, 20], 8, [(0, 6), (6, 8), (14, 6)]),
        ([4, 4], 8, [(0, 4)]),
        ([3, 3, 3], 2, [(0, 1), (1, 1), (2, 1)]),
    ],
)
def test_bands_are_as_wide_as_they_may_be(lengths: list[int], most: int, bands: list[tuple[int, int]]) -> None:
    assert list(packed_attend.cut(np.array(lengths, dtype=np.int64), most)) == bands


def test_soft_caps_hold_across_both_parts() -> None:
    cache = Cache("k2v2g16w8s2", 1, softcap=5.0)
    qkv = random(50, (HEADS + 2 * KV_HEADS) * DIM, seed=1)
    torch.testing.assert_close(cache.run([qkv], [0]), cache.expected(qkv), rtol=2e-4, atol=2e-4)
