"""Decode steps over packed pages: the compiled kernels against the operations that say what they mean."""

from dataclasses import dataclass, field, fields, replace

import pytest
import torch
from torch import Tensor

from tenfold.cache.format import parse
from tenfold.cache.store import KVSpec, KVStore
from tenfold.ops.cpu import packed_kv
from tenfold.ops.kernels import AttentionSpec, Contexts, Heads, Norm
from tenfold.ops.kv.layer import PackedLayer
from tenfold.ops.kv.quantize import Grouping
from tenfold.ops.kv.spec import PackedSpec
from tenfold.ops.oracle import Oracle

ENDS = (1, 2, 5, 8, 9, 31, 64, 65, 70, 128, 131, 150)  # lengths after a step: around pages, windows and tiles
LONGEST = 192  # tokens of a table


@dataclass(frozen=True)
class Shape:
    heads: int = 4
    kv_heads: int = 2
    dim: int = 32
    rotary: int = 32
    page: int = 8
    softcap: float = 0.0
    norms: bool = True
    dtype: torch.dtype = torch.float32  # of what is kept exact


CASES = {
    "k2v1.5g16w8s2": Shape(),
    "k4v2g32h2w5s3-post": Shape(softcap=5.0),
    "k3v4g16w0s0": Shape(norms=False),
    "k2v2g16w0s4": Shape(rotary=16),
    "k2v2g16w20s0-fp16": Shape(dtype=torch.float16),
    "fp8": Shape(dim=64, rotary=64),
    "int4": Shape(dim=128, rotary=128, heads=6),
    "k1.5v3g64w16": Shape(dim=64, rotary=64, heads=9, kv_heads=3, page=16, dtype=torch.bfloat16),
    "k3v1.5g80w33s7-post": Shape(dim=80, rotary=80, heads=5, kv_heads=5, page=16),
    "k4v3g48h3w9s1": Shape(dim=80, rotary=32, heads=6, kv_heads=3),
    "k8v8g32h2w4s1": Shape(dim=80, rotary=80, dtype=torch.float16),
    "k8v2g16w130s8-fp16": Shape(dim=128, rotary=128),
    "k4v4g16w12s3-post-turned": Shape(dim=48, rotary=48, heads=6),
    "k2v4g128w64s5-post-turned": Shape(dim=128, rotary=64, heads=52, kv_heads=1, dtype=torch.bfloat16),
    "k2v3g16h2w3s2": Shape(dim=168, rotary=160, kv_heads=4, heads=4),  # 21 groups of two heads
    "k1.5v1.5g16h3w3s2": Shape(dim=40 * 2, rotary=40, kv_heads=3, heads=42),
    "k2v2g16h2w3s1": Shape(dim=8, rotary=8, heads=4, kv_heads=4),
}


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def grouping(spec: PackedSpec, shape: Shape, seed: int) -> Grouping:
    """A map inside spans, clip factors, units and offsets; channels that are turned keep their neighbours."""
    channels, width = shape.kv_heads * shape.dim, spec.span * shape.dim
    generator = torch.Generator().manual_seed(seed)
    order = torch.arange(width) if spec.turned else torch.randperm(width, generator=generator)
    spans = [order // spec.group + s * width // spec.group for s in range(channels // width)]
    groups = channels // spec.group
    clip = torch.rand(groups, generator=generator) / 4 + 0.75
    unit = 2.0 ** torch.randint(-5, 1, (groups,), generator=generator)
    return Grouping(torch.cat(spans), clip, unit, random(channels, seed=seed) / 4)


class Cache:
    """One layer for several sequences over pages in disorder; sequence r has row r of the table, and a room."""

    def __init__(self, name: str, shape: Shape, sequences: int) -> None:
        spec = parse(name, shape.kv_heads, shape.dim)
        assert spec is not None
        self.shape = shape
        store = KVSpec(1, shape.kv_heads, shape.dim, shape.dtype, shape.page, spec)
        pages = LONGEST // shape.page
        self.groupings = (grouping(spec, shape, 1), grouping(spec, shape, 2))
        self.store = KVStore(store, pages * sequences, torch.device("cpu"), 2 * sequences + 1, [self.groupings])
        self.store.fill(float("nan"))  # reading what was never written shows
        layer = self.store.layers[0]
        assert isinstance(layer, PackedLayer)
        self.layer = layer
        order = torch.randperm(pages * sequences, generator=torch.Generator().manual_seed(3)).int()
        self.table = order.view(sequences, pages)
        angles = torch.arange(LONGEST)[:, None] / 10 ** (torch.arange(shape.rotary // 2) * 3 / shape.rotary)
        q_norm, k_norm = (Norm(1 + random(shape.dim, seed=s) / 9, 1e-5) if shape.norms else None for s in (4, 5))
        heads = (shape.heads, shape.kv_heads, shape.dim)
        attention = AttentionSpec(*heads, shape.dim**-0.5, 0, shape.softcap, shape.rotary)
        self.heads = Heads(attention, torch.cat((angles.cos(), angles.sin()), 1), q_norm, k_norm)

    @property
    def width(self) -> int:
        return (self.shape.heads + 2 * self.shape.kv_heads) * self.shape.dim

    @property
    def sides(self) -> dict[str, Tensor]:
        """All that is stored, as whole numbers where it is packed."""
        keys, values, layer = self.layer.keys, self.layer.values, self.layer
        sides = {"key codes": keys.codes, "value codes": values.codes}
        sides |= {"key numbers": keys._raw, "value numbers": values._raw}
        exact = {"keys": layer.exact_keys, "values": layer.exact_values}
        return sides | {name: side for name, side in exact.items() if side is not None}

    def copy(self, other: "Cache") -> None:
        for name, side in self.sides.items():
            side.copy_(other.sides[name])

    def step(self, counts: list[int], ends: list[int], sequences: list[int], shared: bool = False) -> Contexts:
        """counts: new tokens of each request, the last of `ends` of a sequence."""
        positions = torch.cat([torch.arange(e - n, e) for e, n in zip(ends, counts)])
        own = torch.tensor(sequences)
        rows = torch.repeat_interleave(own, torch.tensor(counts))
        slots = self.table[rows, positions // self.shape.page] * self.shape.page + positions % self.shape.page
        lengths = torch.tensor(ends, dtype=torch.int32)
        starts = torch.tensor([0, *counts]).cumsum(0).int()
        sizes = (max(counts), max(ends))
        rooms = (2 * own + 1).int()
        places = (positions.int(), slots.int(), self.table[own], starts, lengths)
        return Contexts(*places, *sizes, shared=shared, rooms=rooms)

    def run(self, kernels, qkv: list[Tensor], step: Contexts) -> Tensor:
        return kernels.attention_packed(torch.cat(qkv), self.heads, self.layer, step)


def tokens(cache: Cache, sequence: int, end: int) -> Tensor:
    """[end, ...] of a sequence."""
    return random(LONGEST, cache.width, seed=100 + sequence)[:end]


def begun(name: str, ends: tuple[int, ...] = ENDS) -> tuple[Cache, Cache]:
    """Two equal caches of sequences that lack one token to their ends."""
    caches = [Cache(name, CASES[name], len(ends)) for _ in range(2)]
    known = [(r, end - 1) for r, end in enumerate(ends) if end > 1]
    if known:
        step = caches[0].step([n for _, n in known], [n for _, n in known], [r for r, _ in known])
        caches[0].run(Oracle(), [tokens(caches[0], r, n) for r, n in known], step)
    caches[1].copy(caches[0])
    return caches[0], caches[1]


def last(cache: Cache, ends: tuple[int, ...] = ENDS) -> list[Tensor]:
    return [tokens(cache, r, end)[-1:] for r, end in enumerate(ends)]


def decode(cache: Cache, ends: tuple[int, ...] = ENDS) -> Contexts:
    return cache.step([1] * len(ends), list(ends), list(range(len(ends))))


@pytest.fixture
def fast(native, monkeypatch):
    """The kernels, where nothing else may run instead."""
    served = packed_kv.served

    def must(*given) -> bool:
        assert served(*given)
        return True

    monkeypatch.setattr(packed_kv, "served", must)
    return native


@pytest.mark.parametrize("name", CASES)
def test_a_decode_step_gives_and_stores_what_its_definition_says(isa, fast, name: str) -> None:
    usual, cache = begun(name)
    for further in range(2):
        ends = tuple(end + further for end in ENDS)
        want = usual.run(Oracle(), last(usual, ends), decode(usual, ends))
        got = cache.run(fast, last(cache, ends), decode(cache, ends))
        torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-4)
        for part, stored in cache.sides.items():
            expected = usual.sides[part]
            if stored.is_floating_point():  # a sum in another order may round to the number beside
                torch.testing.assert_close(
                    stored, expected, rtol=1e-5 if stored.dtype == torch.float32 else 1e-2, atol=1e-5, equal_nan=True
                )
            else:
                assert (stored != expected).float().mean() < 1e-3, part
        cache.copy(usual)


PLAIN = [name for name in CASES if "turned" not in name and name != "int4"]


@pytest.mark.parametrize("name", PLAIN)
def test_codes_are_those_of_the_definition_to_the_bit(isa, fast, name: str) -> None:
    """Without norms and positions nothing is rounded on the way: then prompts and answers cannot differ."""
    cache, usual = (Cache(name, CASES[name], len(ENDS)) for _ in range(2))
    heads = replace(cache.heads, spec=replace(cache.heads.spec, rotary_dim=0), q_norm=None, k_norm=None)
    step, qkv = decode(cache, (1,) * len(ENDS)), torch.cat(last(cache))
    qkv[0, :] = 0.0  # groups of equal numbers
    qkv[1] *= 1e4
    qkv[2] *= 1e-4
    fast.attention_packed(qkv, heads, cache.layer, step)
    kept = qkv.view(len(ENDS), -1, CASES[name].dim)[:, CASES[name].heads :]
    kept = kept.to(CASES[name].dtype) if cache.layer.exact_keys is not None else kept
    for side, x in zip((usual.layer.keys, usual.layer.values), kept.chunk(2, 1)):
        side.write(x.flatten(1), step.slots.long())
    assert_same_pages(cache, usual)


def assert_same_pages(cache: Cache, other: Cache) -> None:
    for part in ("key codes", "value codes", "key numbers", "value numbers"):
        assert torch.equal(cache.sides[part], other.sides[part]), part


@pytest.mark.parametrize("name", ["k2v1.5g16w8s2", "k3v4g16w0s0", "k8v8g32h2w4s1"])
def test_halves_go_to_the_even_code_and_nothing_to_nothing(isa, fast, name: str) -> None:
    cache, usual = (Cache(name, CASES[name], 1) for _ in range(2))
    for grouping in (g for c in (cache, usual) for side in (c.layer.keys, c.layer.values) for g in [side.grouping]):
        grouping.shift.zero_()
        grouping.clip.fill_(1.0)
        grouping.unit.fill_(1.0)
    heads = replace(cache.heads, spec=replace(cache.heads.spec, rotary_dim=0), q_norm=None, k_norm=None)
    for end, largest in enumerate((0, 4, 6, 14, 30), start=1):  # twice the largest code: the scale is 1
        qkv = torch.randint(0, largest + 1, (1, cache.width), generator=torch.Generator().manual_seed(end)) / 2
        step = cache.step([1], [end], [0])
        fast.attention_packed(qkv, heads, cache.layer, step)
        kept = qkv.view(1, -1, CASES[name].dim)[:, CASES[name].heads :]
        for side, x in zip((usual.layer.keys, usual.layer.values), kept.chunk(2, 1)):
            side.write(x.flatten(1), step.slots.long())
            assert side.read(step.slots.long()).isfinite().all()
    assert_same_pages(cache, usual)


@pytest.mark.parametrize("name", ["k2v1.5g16w8s2", "int4", "k8v8g32h2w4s1", "k2v4g128w64s5-post-turned"])
def test_a_request_has_the_same_bits_alone_in_a_batch_and_again(isa, fast, name: str) -> None:
    cache, other = begun(name)
    whole = cache.run(fast, last(cache), decode(cache))
    assert torch.equal(cache.run(fast, last(cache), decode(cache)), whole)
    for r, end in enumerate(ENDS):
        alone = other.run(fast, [tokens(other, r, end)[-1:]], other.step([1], [end], [r]))
        assert torch.equal(alone[0], whole[r]), end
    for part, stored in cache.sides.items():
        expected = other.sides[part]
        assert torch.equal(stored.nan_to_num(7.0), expected.nan_to_num(7.0)), part


@pytest.mark.parametrize("name", ["k2v1.5g16w8s2", "fp8", "k3v1.5g80w33s7-post"])
@pytest.mark.parametrize("end", [3, 40, 150])
def test_guesses_and_short_chunks_have_the_bits_of_one_token_after_the_other(isa, fast, name: str, end: int) -> None:
    """As many tokens at once as are served, of one request, and of a request each that see one another."""
    after = range(end, end + packed_kv.MOST_QUERIES)
    apart, guessed, chunk = begun(name, (end,))[0], *begun(name, (end,))
    x = tokens(apart, 0, after.stop)
    want = torch.cat([apart.run(fast, [x[e - 1 : e]], apart.step([1], [e], [0])) for e in after])
    step = guessed.step([1] * len(after), list(after), [0] * len(after), shared=True)
    assert torch.equal(guessed.run(fast, [x[end - 1 : after.stop - 1]], step), want)
    step = chunk.step([len(after)], [after.stop - 1], [0])
    assert torch.equal(chunk.run(fast, [x[end - 1 : after.stop - 1]], step), want)
    for part, stored in apart.sides.items():
        for other in (guessed, chunk):
            assert torch.equal(stored.nan_to_num(7.0), other.sides[part].nan_to_num(7.0)), part


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_do_not_change_the_bits(fast, threads: int) -> None:
    from tenfold.ops.cpu import lib

    cache, other = begun("k1.5v3g64w16")
    want = cache.run(fast, last(cache), decode(cache))
    lib.set_threads(3 - threads)
    assert torch.equal(other.run(fast, last(other), decode(other)), want)


def test_an_idle_request_writes_nothing_and_gets_zeros(isa, fast) -> None:
    cache, other = begun("k2v1.5g16w8s2", (40, 9))
    other.copy(cache)
    step = decode(cache, (40, 9))
    idle = replace(step, kv_lengths=torch.tensor([0, 9], dtype=torch.int32))
    got = cache.run(fast, last(cache, (40, 9)), idle)
    assert torch.equal(got[0], torch.zeros_like(got[0]))
    assert torch.equal(got[1], other.run(fast, last(other, (40, 9)), step)[1])
    mine = [int(p) for p in cache.table[0]]
    assert torch.equal(cache.layer.keys.codes[mine], begun("k2v1.5g16w8s2", (40, 9))[0].layer.keys.codes[mine])


def test_long_chunks_are_put_together_of_operations(native, monkeypatch) -> None:
    cache, _ = begun("k2v1.5g16w8s2", (30,))
    seen = []
    monkeypatch.setattr("tenfold.ops.cpu.native.packed.attention", lambda *given: seen.append(given))
    count = packed_kv.MOST_QUERIES + 1
    cache.run(native, [tokens(cache, 0, count)], cache.step([count], [30 + count], [0]))
    assert len(seen) == 1


@pytest.mark.parametrize("name", ["k2v1.5g16w8s2", "fp8"])
def test_decodes_have_the_same_bits_beside_a_long_chunk(isa, native, name: str) -> None:
    """And the chunk gets what it gets alone."""
    ends, count = (40, 9, 70, 65), packed_kv.MOST_QUERIES + 9
    mixed, apart = begun(name, ends)
    chunk = tokens(mixed, 3, 64 + count)[64:]
    step = mixed.step([1, 1, 1, count], [40, 9, 70, 64 + count], [0, 1, 2, 3])
    got = mixed.run(native, [*last(mixed, ends)[:3], chunk], replace(step, decodes=3))
    assert replace(step, decodes=3, shared=True).parted() is None  # who may read what is written beside it
    want = [apart.run(native, last(apart, ends)[:3], apart.step([1] * 3, [40, 9, 70], [0, 1, 2]))]
    want.append(apart.run(native, [chunk], apart.step([count], [64 + count], [3])))
    assert torch.equal(got, torch.cat(want))
    for part, stored in mixed.sides.items():
        assert torch.equal(stored.nan_to_num(7.0), apart.sides[part].nan_to_num(7.0)), part


@dataclass(frozen=True, slots=True, eq=False)
class Replayed(Contexts):
    """A decode step as it is replayed."""

    token_ids: Tensor = field(kw_only=True)
    logits_rows: Tensor = field(kw_only=True)
    qkv: Tensor = field(kw_only=True)
    kv: KVStore = field(kw_only=True)


def test_steps_over_packed_pages_are_replayed(fast) -> None:
    """Also the first one of a cache that another one has shown the shape of."""
    run, heads = fast.replay(), Cache("k2v1.5g16w8s2", CASES["k2v1.5g16w8s2"], 1).heads
    for _ in range(2):
        cache, other = begun("k2v1.5g16w8s2", (40, 9))
        for further in range(4):
            ends = (40 + further, 9 + further)
            step, qkv = decode(cache, ends), torch.cat(last(cache, ends))
            given = {f.name: getattr(step, f.name) for f in fields(step)}
            none = torch.zeros(2, dtype=torch.int64)
            more = Replayed(**given, token_ids=none, logits_rows=none, qkv=qkv, kv=cache.store)
            got = run(lambda s: fast.attention_packed(s.qkv, heads, s.kv.layers[0], s), more)
            assert torch.equal(got, fast.attention_packed(qkv, other.heads, other.layer, step))
            assert run.foreign == ""


def test_a_layer_that_is_gone_is_forgotten(fast) -> None:
    cache, _ = begun("int4", (4,))
    cache.run(fast, last(cache, (4,)), decode(cache, (4,)))
    assert len(fast._prepared) == 1
    del cache
    assert len(fast._prepared) == 0
