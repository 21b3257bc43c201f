"""Contexts in packed pages and rooms, and what decode attention over them is by its definition, in float64."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tenfold.cache.format import parse
from tenfold.ops.gpu import packed
from tenfold.ops.gpu.decode import Workspace
from tenfold.ops.kernels import AttentionSpec, Heads, Kernels, Norm
from tenfold.ops.kernels import Contexts as Step
from tenfold.ops.kv import attend
from tenfold.ops.kv.layer import MOST_GUESSES, PackedLayer, Side, room_page, room_pages
from tenfold.ops.kv.packing import packed_bytes
from tenfold.ops.kv.quantize import STORED, Grouping, hadamard
from tenfold.ops.kv.spec import PackedSpec, parameters_of
from tenfold.ops.oracle import Oracle, rotate

SMS = 132
NOTHING = 0xFF  # in codes and numbers of tokens that nobody wrote: the latter are no numbers


@dataclass(frozen=True, slots=True)
class Shape:
    """A format by name, heads, contexts."""

    name: str
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 128
    lengths: tuple[int, ...] = (300,)
    page: int = 16
    softcap: float = 0.0
    shift: bool = False
    dtype: torch.dtype = torch.bfloat16
    rotary: int | None = None  # None: whole heads

    @property
    def spec(self) -> AttentionSpec:
        rotary = self.head_dim if self.rotary is None else self.rotary
        return AttentionSpec(self.heads, self.kv_heads, self.head_dim, self.head_dim**-0.5, 0, self.softcap, rotary)


def grouping(shape: Shape, spec: PackedSpec, seed: int, shift: bool) -> Grouping:
    """A map inside spans in disorder, clip factors and units."""
    generator = torch.Generator().manual_seed(seed)
    count, width = shape.kv_heads * shape.head_dim, spec.span * shape.head_dim
    maps = [torch.randperm(width, generator=generator) // spec.group + s * width // spec.group
            for s in range(count // width)]  # fmt: skip
    groups = count // spec.group
    offset = torch.randn(count, generator=generator) if shift else torch.zeros(count)
    clip = torch.rand(groups, generator=generator) / 4 + 0.75
    own = torch.arange(count) // spec.group if spec.turned else torch.cat(maps)
    return Grouping(own, clip, 2.0 ** torch.randint(-5, 1, (groups,), generator=generator), offset)


def empty_layer(shape: Shape, pages: int, rooms: int, device: torch.device) -> PackedLayer:
    spec = parse(shape.name, shape.kv_heads, shape.head_dim)
    assert spec is not None
    groups = spec.span * shape.head_dim // spec.group
    turn = hadamard(spec.group).to(device) if spec.turned else None

    def side(bits: float, seed: int, shift: bool) -> Side:
        codes = (pages, shape.kv_heads, shape.page, packed_bytes(shape.head_dim, bits))
        numbers = (
            pages,
            shape.kv_heads // spec.span,
            shape.page,
            groups,
            parameters_of(bits) * STORED[spec.parameters].itemsize,
        )
        made = (torch.full(size, NOTHING, dtype=torch.uint8, device=device) for size in (codes, numbers))
        first, second = made
        return Side(
            first, second.view(STORED[spec.parameters]), bits, grouping(shape, spec, seed, shift).to(device), turn
        )

    exact: tuple[Tensor | None, Tensor | None] = (None, None)
    own = room_pages(spec, shape.page)
    if own:
        size = (rooms * own, shape.kv_heads, shape.page, shape.head_dim)
        one, two = (torch.full(size, float("nan"), dtype=shape.dtype, device=device) for _ in range(2))
        exact = one, two
    keys = side(spec.key_bits, 1, shape.shift and not spec.turned)
    return PackedLayer(spec, keys, side(spec.value_bits, 2, shape.shift and not spec.turned), *exact)


def rope_table(positions: int, rotary: int, device: torch.device) -> Tensor:
    """As families with a factor on cosines and sines have it."""
    angles = torch.arange(positions)[:, None] / 10000 ** (torch.arange(rotary // 2) * 2 / max(1, rotary))
    return 1.25 * torch.cat((angles.cos(), angles.sin()), 1).to(device)


class Contexts:
    """All tokens of some requests, written by `Side.write` and into rooms."""

    def __init__(self, shape: Shape, device: torch.device | str = "cpu", seed: int = 0) -> None:
        self.shape, self.device = shape, torch.device(device)
        generator = torch.Generator(self.device).manual_seed(seed)

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, device=self.device)

        requests, longest = len(shape.lengths), max(shape.lengths)
        columns = max(1, -(-longest // shape.page))
        self.layer = empty_layer(shape, requests * columns + 2, 2 * requests, self.device)
        order = torch.randperm(requests * columns, generator=torch.Generator().manual_seed(seed)) + 1
        self.table = order.view(requests, columns).int().to(self.device)
        self.rooms = (2 * torch.arange(requests, device=self.device) + 1).flip(0).int()
        self.lengths = torch.tensor(shape.lengths, dtype=torch.int32, device=self.device)
        self.rope = rope_table(longest + 1, shape.spec.rotary_dim, self.device)
        width = shape.kv_heads * shape.head_dim
        scale = 1 + 3 * (normal(width) > 1.5)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        for r, length in enumerate(shape.lengths):
            keys = ((normal(length, width) + normal(width)) * scale).to(shape.dtype)
            values = (normal(length, width) * scale.flip(0)).to(shape.dtype)
            self.write(r, keys, values)
        self.queries = normal(requests, shape.heads * shape.head_dim).to(shape.dtype)

    def slots(self, request: int, positions: Tensor) -> Tensor:
        page = self.shape.page
        return self.table[request, positions // page].long() * page + positions % page

    def turn(self, x: Tensor, positions: Tensor) -> Tensor:
        """x [N, heads * head_dim] rotated."""
        if not self.shape.spec.rotary_dim:
            return x
        heads = x.unflatten(1, (-1, self.shape.head_dim))
        cosines, sines = self.rope[positions][:, None].to(torch.promote_types(x.dtype, torch.float32)).chunk(2, -1)
        return rotate(heads, cosines, sines).flatten(1)

    def write(self, request: int, keys: Tensor, values: Tensor) -> None:
        layer, positions = self.layer, torch.arange(len(keys), device=self.device)
        turned = self.turn(keys, positions)
        slots = self.slots(request, positions)
        layer.keys.write(keys if layer.spec.rotary == "pre" else turned, slots)
        layer.values.write(values, slots)
        if layer.exact_keys is not None and layer.exact_values is not None:
            first = len(keys) - layer.spec.window - MOST_GUESSES  # what the first of some guesses sees
            kept = positions[(positions < layer.spec.sinks) | (positions >= first)]
            at = self.room_slots(request, kept)
            for store, x in ((layer.exact_keys, turned), (layer.exact_values, values)):
                store[at // self.shape.page, :, at % self.shape.page] = x[kept].unflatten(1, (self.shape.kv_heads, -1))
        self.keys.append(turned)
        self.values.append(values)

    def room_slots(self, request: int, positions: Tensor) -> Tensor:
        spec, page = self.layer.spec, self.shape.page
        first = self.rooms[request].long() * room_pages(spec, page)
        return (first + room_page(spec, page, positions)) * page + positions % page

    def expected(self) -> tuple[Tensor, Tensor]:
        """Results [R, heads * head_dim] and log-sum-exp [R, heads], float64."""
        shape, layer = self.shape, self.layer
        outs, sums = [], []
        for r, length in enumerate(shape.lengths):
            if not length:
                outs.append(torch.zeros(shape.heads * shape.head_dim, dtype=torch.float64, device=self.device))
                sums.append(torch.full((shape.heads,), float("-inf"), dtype=torch.float64, device=self.device))
                continue
            positions = torch.arange(length, device=self.device)
            slots = self.slots(r, positions)
            keys, values = layer.keys.read(slots).double(), layer.values.read(slots).double()
            if layer.spec.rotary == "pre":
                keys = self.turn(keys, positions)
            if layer.exact_keys is not None:
                old = (positions >= layer.spec.sinks) & (positions < length - layer.spec.window)
                keys = torch.where(old[:, None], keys, self.keys[r].double())
                values = torch.where(old[:, None], values, self.values[r].double())
            each = (shape.kv_heads, shape.heads // shape.kv_heads, shape.head_dim)
            q = self.queries[r].double().view(each)
            k, v = (x.view(length, shape.kv_heads, shape.head_dim) for x in (keys, values))
            scores = torch.einsum("kgd,tkd->kgt", q, k) * shape.spec.scale
            if shape.softcap:
                scores = shape.softcap * (scores / shape.softcap).tanh()
            outs.append(torch.einsum("kgt,tkd->kgd", scores.softmax(-1), v).flatten())
            sums.append(scores.logsumexp(-1).flatten())
        return torch.stack(outs), torch.stack(sums)

    def prepared(self) -> packed.Prepared:
        return packed.prepare(self.layer, self.shape.spec)

    def plan(self, prepared: packed.Prepared, **changes: int) -> packed.PackedPlan:
        made = packed.plan(self.shape.spec, prepared.shape, len(self.lengths), max(self.shape.lengths), SMS)
        return replace(made, **changes)

    def run(
        self, prepared: packed.Prepared, plan: packed.PackedPlan, workspace: Workspace | None = None
    ) -> list[Tensor]:
        """Results and log-sum-exp of the kernel."""
        shape = self.shape
        if workspace is None:
            workspace = Workspace(self.device, len(self.lengths) * shape.heads)
        lse = torch.full((len(self.lengths), shape.heads), float("nan"), device=self.device)
        turned = packed.turns(self.rope, self.layer.keys.bits) if prepared.shape.pre else None
        shared = packed.share(plan, shape.spec, prepared.shape, self.lengths, SMS, {}, 0)
        read = (self.queries, self.table, self.lengths, shape.spec, self.rooms, turned, lse, shared)
        out = packed.run(plan, workspace, prepared, self.layer, *read)
        assert not workspace.counters.any()
        return [out, lse]


def distance(got: Tensor, expected: Tensor) -> float:
    """Relative to the norm of what is expected."""
    return float((got.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))


class Written:
    """New tokens, one a request or many of one, as the kernel writes them and as `Side.write` and the oracle do."""

    def __init__(
        self, shape: Shape, tokens: int, norms: bool, device: torch.device | str = "cpu", seed: int = 0
    ) -> None:
        self.shape, self.device = shape, torch.device(device)
        generator = torch.Generator(self.device).manual_seed(seed)
        spec, page = shape.spec, shape.page
        pages = -(-tokens // page) + 1
        self.layer, self.other = (empty_layer(shape, pages, tokens, self.device) for _ in range(2))
        width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
        self.qkv = (2 * torch.randn(tokens, width, generator=generator, device=self.device)).to(shape.dtype)
        self.positions = torch.randint(0, 200, (tokens,), generator=generator, device=self.device).int()
        self.positions[0] = 0
        self.slots = (torch.randperm(pages * page, generator=generator, device=self.device)[:tokens]).int()
        self.slots[tokens // 2] = -1
        self.rooms = torch.randperm(tokens, generator=generator, device=self.device).int()
        self.rope = rope_table(200, spec.rotary_dim, self.device)
        weight = torch.rand(shape.head_dim, generator=generator, device=self.device) + 0.5
        self.norm = Norm(weight, 1e-6) if norms else None

    def room_slots(self) -> Tensor:
        """Where in the exact pages each token goes, negative: nowhere."""
        spec, page = self.layer.spec, self.shape.page
        first = self.rooms.long() * room_pages(spec, page)
        at = (first + room_page(spec, page, self.positions)) * page + self.positions % page
        return torch.where(self.slots < 0, -1, at).int()

    def run(self, in_rooms: bool) -> Tensor:
        """Queries by the kernel; keys and values go to `layer`. in_rooms: places in rooms are given."""
        shape, exact = self.shape, self.layer.exact_keys is not None
        prepared = packed.prepare(self.layer, shape.spec)
        rooms = self.rooms if exact and not in_rooms else None
        places = self.room_slots() if exact and in_rooms else None
        heads = Heads(shape.spec, self.rope, self.norm, self.norm)
        return packed.write(prepared, self.layer, self.qkv, heads, self.positions, self.slots, rooms, places)

    def expected(self) -> Tensor:
        """The same by other means, to `other`."""
        shape, layer, spec = self.shape, self.other, self.shape.spec
        oracle, heads = Oracle(self.device, shape.dtype), Heads(spec, self.rope, self.norm, self.norm)
        count = len(self.qkv)
        own = torch.arange(count, device=self.device).int()
        size = (count, shape.kv_heads, 1, shape.head_dim)
        keys, values, still = (torch.empty(size, dtype=shape.dtype, device=self.device) for _ in range(3))
        unturned = replace(heads, spec=replace(spec, rotary_dim=0))
        oracle.rope_write(self.qkv, unturned, self.positions, own, still, values)
        q = oracle.rope_write(self.qkv, heads, self.positions, own, keys, values)
        live = self.slots >= 0
        source = still if layer.spec.rotary == "pre" else keys
        layer.keys.write(source.flatten(1)[live], self.slots[live].long())
        layer.values.write(values.flatten(1)[live], self.slots[live].long())
        if layer.exact_keys is not None and layer.exact_values is not None:
            at = self.room_slots()[live].long()
            layer.exact_keys[at // shape.page, :, at % shape.page] = keys[live, :, 0]
            layer.exact_values[at // shape.page, :, at % shape.page] = values[live, :, 0]
        return q

    def differences(self) -> dict[str, float]:
        return differences(self.layer, self.other)


class ChunkStep:
    """The last tokens of some contexts as chunks of one step, no more than rooms hold beside a window."""

    def __init__(self, shape: Shape, device: torch.device | str = "cpu") -> None:
        self.shape, self.contexts = shape, Contexts(shape, device)
        counts = [min(8 + 3 * i, MOST_GUESSES, length) for i, length in enumerate(shape.lengths)]
        generator = torch.Generator(device).manual_seed(7)
        width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
        self.qkv = torch.randn(sum(counts), width, generator=generator, device=device).to(shape.dtype)
        places = [torch.arange(n - count, n, device=device) for n, count in zip(shape.lengths, counts)]
        slots = [self.contexts.slots(r, at) for r, at in enumerate(places)]
        starts = torch.tensor([0, *counts], device=device).cumsum(0).int()
        self.step = Step(
            *(torch.cat(places).int(), torch.cat(slots).int(), self.contexts.table, starts, self.contexts.lengths),
            *(max(counts), max(shape.lengths)),
            rooms=self.contexts.rooms,
        )

    def run(self, means: attend.Means, kernels: Kernels | None = None) -> Tensor:
        kernels = kernels or Oracle(self.contexts.device, self.shape.dtype)
        heads = Heads(self.shape.spec, self.contexts.rope)
        return attend.attention(kernels, self.qkv, heads, self.contexts.layer, self.step, means)

    def differences(self, other: "ChunkStep") -> dict[str, float]:
        return differences(self.contexts.layer, other.contexts.layer)


def differences(first: PackedLayer, second: PackedLayer) -> dict[str, float]:
    """Shares of bytes of codes and numbers, and of exact numbers, that are not the same."""
    found = {}
    for name in ("keys", "values"):
        one, two = getattr(first, name), getattr(second, name)
        found[f"{name} codes"] = float((one.codes != two.codes).float().mean())
        pair = (side.parameters.contiguous().view(torch.uint8) for side in (one, two))
        found[f"{name} numbers"] = float(torch.ne(*pair).float().mean())
        rooms = (getattr(side, f"exact_{name}") for side in (first, second))
        bits = [room.view(torch.int16) for room in rooms if room is not None]
        found[f"{name} exact"] = float(torch.ne(*bits).float().mean()) if bits else 0.0
    return found
