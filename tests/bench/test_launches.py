"""Counted launches and bytes: a block costs the difference of two models, and its bytes are those of its shapes."""

import ctypes
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from tenfold.bench import launches, report
from tenfold.ops.kernels import AttentionSpec
from tenfold.weights.find import resolve
from tenfold.weights.open import open_checkpoint

arms = pytest.importorskip("tenfold.ops.gpu.arms")
traced = pytest.importorskip("tenfold.engine.linears").traced
Layer = pytest.importorskip("tenfold.ops.gpu.attending").Layer
Use, Work = arms.Use, arms.Work
SPEC = AttentionSpec(8, 2, 64, 0.1)
TORCH = {"kernels": "torch"}


def test_bytes_of_operations() -> None:
    half = torch.bfloat16
    plain = launches.moved(Work(100, 50, "dense", Use(), 1), 3, 9, half)
    assert (plain.weights, plain.kv, plain.activations) == (10000, 0, 3 * 2 * 150)
    gated = launches.moved(Work(100, 50, "dense", Use(norm=True, act="silu"), 1), 1, 9, half)
    assert gated.activations == 2 * (50 + 50)
    residual = launches.moved(Work(100, 50, "dense", Use(residual=True), 1), 1, 9, half)
    assert residual.activations == 2 * (50 + 200)
    packed = launches.moved(Work(128, 128, "int4g128", Use(), 1), 1, 9, half)
    assert 128 * 128 // 2 < packed.weights < 128 * 128
    attention = launches.moved(Layer(SPEC), 4, 1000, half)
    assert attention.kv == 4 * 1000 * 2 * 2 * 64 * 2
    assert attention.activations == 4 * 2 * (8 + 2 * 2 + 8) * 64
    assert launches.moved(Layer(AttentionSpec(8, 2, 64, 0.1, window=100)), 4, 1000, half).kv == attention.kv // 10


def test_what_a_forward_asks_for_comes_in_its_order() -> None:
    calls = traced(open_checkpoint(resolve("shape:tiny")), torch.bfloat16).calls
    block = [(128, 64), SPEC, (64, 64), (256, 64), (64, 128)]
    assert len(calls) == 2 * len(block) + 1
    for call, kind in zip(calls, [*block, *block, (512, 64)]):
        assert isinstance(call, Layer) == (kind is SPEC)
        assert isinstance(call, Layer) or (call.rows, call.cols) == kind


@pytest.mark.parametrize(("model", "known"), [("shape:tiny", False), ("shape:qwen3-8b@layers=1", True)])
def test_a_maximum_that_norms_of_the_heads_prove_is_known(model: str, known: bool) -> None:
    (layer,) = traced(open_checkpoint(resolve(model)), torch.bfloat16).attentions
    assert layer.unified == known


def test_a_block_is_the_difference_of_two_models(tmp_path: Path) -> None:
    found = launches.measure("shape:tiny@layers=5", "cpu", [1, 3], [40], TORCH, lambda _: None, "count it")
    assert [(row.batch, row.context) for row in found.rows] == [(1, 40), (3, 40)]
    for row in found.rows:
        assert row.block["linear"] == 4
        assert row.block["softmax"] == 1
        assert row.rest == {"embedding": 1, "rms_norm": 1, "linear": 1}
        assert row.per_step(found.layers) == 5 * row.per_block + 3
        assert [m.op.partition(" ")[0] for m in row.moved][:2] == ["linear+norm", "attention"]
        assert len(row.moved) == 6
    assert launches.loaded(json.loads(json.dumps(found.plain()))) == found
    (tmp_path / "launches.json").write_text(json.dumps(found.plain()))
    table = report.tables(tmp_path)
    assert "### Launches and bytes, shape:tiny" in table
    assert f"| 1 | 40 | {found.rows[0].per_block} | 3 | {found.rows[0].per_step(5)} |" in table


def test_a_model_that_is_no_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="no shape"):
        launches.measure("default", "cpu", [1], [8])


NODES = {11: (0, b"decode"), 12: (0, b"_ZN2at6native13reduce_kernelILi512EEEvT_"), 13: (1, b""), 14: (2, b"")}


class Driver:
    """A CUDA driver with a graph of two kernels, a copy and a fill."""

    def cuGraphGetNodes(self, graph: Any, found: Any, count: Any) -> int:
        count._obj.value = len(NODES)
        for i, node in enumerate(NODES if found is not None else ()):
            found[i] = node
        return 0 if graph.value == 7 else 1

    def cuGraphNodeGetType(self, node: Any, kind: Any) -> int:
        kind._obj.value = NODES[node.value][0]
        return 0

    def cuGraphKernelNodeGetParams_v2(self, node: Any, launch: Any) -> int:
        launch._obj.function = node.value if node.value == 11 else None
        launch._obj.kernel = None if node.value == 11 else node.value
        return 0

    def cuFuncGetName(self, name: Any, function: ctypes.c_void_p) -> int:
        name._obj.value = NODES[function.value or 0][1]
        return 0

    cuKernelGetName = cuFuncGetName


def test_nodes_of_a_graph_by_name() -> None:
    expected = {"decode": 1, "reduce_kernel": 1, "copy": 1, "fill": 1}
    assert launches.read_graph(Driver(), 7) == Counter(expected)
    with pytest.raises(RuntimeError, match="error 1"):
        launches.read_graph(Driver(), 8)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_nodes_of_a_real_graph() -> None:
    x = torch.zeros(1000, device="cuda")
    found = launches.nodes(lambda: (x.add_(1), x.mul_(2), x.zero_()))
    assert found.total() == 3
