"""The kernel that routes tokens and sorts their picks, against what both mean: emulated on a CPU, and run on a GPU."""

import shutil
from typing import Any

import pytest
import torch

from tenfold.ops.gpu import nvrtc
from tenfold.ops.route import Routing, route
from tests.ops.gpu.emulated_decode import DecodeEmulator

experts = pytest.importorskip("tenfold.ops.gpu.experts")
grouped = pytest.importorskip("tenfold.ops.gemm.grouped")

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [
    pytest.mark.gpu
    if ON_GPU
    else pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler to emulate the kernel")
]
RULES: dict[str, dict[str, Any]] = {
    "olmoe": {"experts": 64, "top": 8},
    "mixtral": {"experts": 8, "top": 2, "normed": True},
    "qwen1.5": {"experts": 60, "top": 4},
    "deepseek-v2": {"experts": 40, "top": 6, "groups": 8, "kept": 3, "scale": 16.0},
    "deepseek-v3": {
        **{"experts": 64, "top": 8, "score": "sigmoid", "normed": True},
        **{"groups": 8, "kept": 4, "best": 2, "scale": 2.5},
    },
}


@pytest.fixture(autouse=True)
def kernel(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    if not ON_GPU:
        monkeypatch.setattr(nvrtc, "load", DecodeEmulator(tmp_path_factory.getbasetemp()))


@pytest.mark.parametrize(
    ("tokens", "width", "turned"), [(1, 8, False), (12, 8, True), (37, 16, True), (70, 8, False), (70, 8, True)]
)
@pytest.mark.parametrize("name", RULES)
def test_picks_weights_and_tiles(name: str, tokens: int, width: int, turned: bool) -> None:
    draw = torch.Generator().manual_seed(tokens)
    rule = RULES[name]
    count = rule["experts"]
    bias = torch.randn(count, generator=draw).to(DEVICE) * 0.2 if name == "deepseek-v3" else None
    routing = Routing(**rule, bias=bias)
    assert experts.routes(tokens, routing)
    logits = (torch.randn(tokens, count, generator=draw) * 2).to(DEVICE)
    want_ids, want = route(logits, routing)
    turns = torch.randperm(count, generator=draw).to(torch.int32)
    turn = turns.argsort().tolist() if turned else list(range(count))
    weights, by = experts.routed(logits, routing, width, turns.to(DEVICE) if turned else None)
    order, tiles = by.order.tolist(), by.tiles[: int(by.count)].tolist()
    assert sorted(order) == list(range(tokens * routing.top))
    own: dict[int, int] = {}  # the expert of each pick
    end_before = 0
    for expert, first, end, _ in tiles:
        assert first == end_before
        assert 1 <= end - first <= width
        assert not own or turn[expert] >= turn[own[order[first - 1]]]
        assert expert != own.get(order[first - 1]) or (first - start_of(tiles, expert)) % width == 0
        own |= dict.fromkeys(order[first:end], expert)
        end_before = end
    assert end_before == len(order)
    for expert in set(own.values()):
        picks = [pick for pick in order if own[pick] == expert]
        assert picks == sorted(picks)
    for token in range(tokens):
        found = {own[token * routing.top + k]: float(weights[token, k]) for k in range(routing.top)}
        expected = dict(zip(want_ids[token].tolist(), want[token].tolist()))
        assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("width", [16, 64, 128, 192, 256])
def test_tiles_are_those_of_sort(width: int, turned: bool) -> None:
    """Experts with none, few, and more picks than a tile holds."""
    draw = torch.Generator().manual_seed(width)
    bias = torch.tensor([9.0, -20.0, 3.0, 1.0, 0.0, -1.0, -1.5, -3.0])
    logits = (torch.randn(330, 8, generator=draw) * 2 + bias).to(DEVICE)
    routing = Routing(8, 2, normed=True)
    turns = torch.randperm(8, generator=draw).to(torch.int32).to(DEVICE) if turned else None
    _, by = experts.routed(logits, routing, width, turns)
    want = grouped.sort(route(logits, routing)[0], 8, width, turns)
    count = int(by.count)
    assert count == int(want.count)
    assert torch.equal(by.tiles[:count], want.tiles[:count])
    sizes = (by.tiles[:count, 2] - by.tiles[:count, 1]).tolist()
    assert len(set(by.tiles[:count, 0].tolist())) == 7
    assert max(sizes) <= width


def start_of(tiles: list[list[int]], expert: int) -> int:
    return min(first for own, first, _, _ in tiles if own == expert)


def test_what_does_not_fit_into_one_block_is_left_to_others() -> None:
    assert experts.routes(64, Routing(256, 8))
    assert not experts.routes(1024, Routing(128, 8))
    assert not experts.routes(1, Routing(2048, 8))
    assert not experts.routes(1, Routing(512, 33))
