"""The CUDA C++ compiles for Hopper on any machine that has NVRTC, a GPU or not."""

import ctypes
import itertools
import re
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from tenfold.ops.gpu import nvrtc
from tests.ops.gpu import elf

pytest.importorskip("cuda.bindings.nvrtc")

COMMON = {"HALF": 0, "GATE": 0, "NORM": 1, "WARPS": 8, "CHUNKS": 2, "BLOCKS": 1}
BULK = COMMON | {"STAGES": 3, "TALL": 1, "DIGITS": 0}
FOUR = {"BITS": 4, "SCALES": 1, "ZEROS": 1, "GROUP": 128}
NIBBLES = FOUR | {"E4M3": 0, "ZEROS": 0, "GROUP": 1 << 30, "ROWS": 128}
EIGHT = {"BITS": 8, "E4M3": 0, "SCALES": 2, "ZEROS": 0, "GROUP": 128}
DECODE = {"HALF": 0, "GATE": 0, "D": 64, "GROUP": 3, "WARPS": 4, "BLOCKS": 3, "DEPTH": 1}
RING = {"BITS": 16, "STAGES": 4, "X_STAGES": 4, "BLOCKS": 1, "GATE": 1, "ROWS": 64, "SPLIT": 0, "CLUSTER": 1}
PREFILL = {"HALF": 0, "D": 128, "PAGE": 16, "BOX": 16, "TILE": 128, "WGS": 2, "STAGES": 2, "WINDOW": 0, "CAP": 0}
EXPERTS = {"FLOAT32": 0, "STAGES": 4, "BLOCKS": 1, "CLUSTER": 1}
KINDS = {
    f"K{i}": name + 7 * (name == 2) + 14 * scales
    for i, (name, scales) in enumerate(zip((0, 1, 2, 3, 4, 5, 1, 3), (0, 1, 2, 0, 1, 2, 2, 1)))
}
TILES = {"SPAN": 1, "X_BOXES": 2, "LIMIT": 17408, "ROOM": 17408, "ROWS": 128, "DOWN": 0} | KINDS
WHOLES = {f"K{i}": name + 7 + 14 * (name % 3) for i, name in enumerate((1, 2, 3, 4))}  # int2, int3, int4, int8
DIGITS = TILES | WHOLES | {"KINDS": 4, "ACTS8S": 0, "DIGITS": 1, "WITH_BYTES": 1, "PAIRS": 3, "THIRDS": 2}
SPREAD = {"TOP": 8, "WITH_BYTES": 1, "WITH_PAIRS": 1, "WITH_THIRDS": 1}
ROUTE = {"TOP": 8, "NORMED": 1, "WIDTH": 16, "WARPS": 8, "CLUSTER": 1}
RULES = {"HALF": 1, "D": 64, "WGS": 3, "WINDOW": 1, "CAP": 1}
SOURCES = [
    ("smid.cu", {}),
    ("stream.cu", COMMON | {"NT": 1, "BITS": 16, "FLOAT32": 0}),
    ("stream.cu", COMMON | {"NT": 2, "BITS": 16, "FLOAT32": 1, "HALF": 1}),
    ("stream.cu", COMMON | {"NT": 2, "HALF": 1, "GATE": 1} | FOUR),
    ("stream.cu", COMMON | {"NT": 1} | EIGHT | {"ZEROS": 1}),
    ("stream.cu", COMMON | {"NT": 1, "GATE": 1} | FOUR | {"BITS": 3}),
    ("stream.cu", COMMON | {"NT": 2, "HALF": 1} | FOUR | {"BITS": 2, "ZEROS": 0}),
    ("stream.cu", COMMON | {"NT": 2, "HALF": 1} | EIGHT | {"GROUP": 1 << 30}),
    ("stream.cu", COMMON | {"NT": 1, "GATE": 2} | EIGHT | {"E4M3": 1, "GROUP": 1 << 30}),
    ("stream.cu", COMMON | {"NT": 2, "HALF": 1} | EIGHT | {"E4M3": 1}),
    ("bulk.cu", BULK | {"NT": 1, "BITS": 16, "TALL": 2}),
    ("bulk.cu", BULK | FOUR | {"NT": 2, "HALF": 1, "GATE": 1}),
    ("bulk.cu", BULK | FOUR | {"NT": 1, "BITS": 3, "TALL": 2}),
    ("bulk.cu", BULK | EIGHT | {"NT": 1, "E4M3": 1, "GROUP": 1 << 30}),
    ("bulk.cu", BULK | FOUR | {"NT": 1, "BITS": 3, "DIGITS": 1}),
    ("bulk.cu", BULK | FOUR | {"NT": 2, "BITS": 2, "ZEROS": 0, "DIGITS": 1, "HALF": 1, "GATE": 2}),
    ("bulk.cu", BULK | EIGHT | {"NT": 1, "ZEROS": 1, "DIGITS": 1, "TALL": 2}),
    ("bulk.cu", BULK | {"NT": 2, "BITS": 16, "HALF": 1, "CLUSTER": 4}),
    ("bulk.cu", BULK | FOUR | {"NT": 1, "BITS": 3, "DIGITS": 1, "CLUSTER": 2}),
    ("bulk.cu", BULK | EIGHT | {"NT": 1, "GATE": 1, "GROUP": 1 << 30, "TALL": 2, "CLUSTER": 2}),
    ("ring.cu", RING | {"N": 8, "HALF": 0}),
    ("ring.cu", RING | {"N": 64, "HALF": 1, "ROWS": 128, "SPLIT": 1}),
    ("ring.cu", RING | {"N": 64, "HALF": 0, "ROWS": 256, "SPLIT": 1, "STAGES": 4}),
    ("ring.cu", RING | {"N": 64, "HALF": 1, "ROWS": 256, "CLUSTER": 8, "STAGES": 5, "X_STAGES": 5, "GATE": 0}),
    ("ring.cu", RING | {"N": 64, "HALF": 0, "SPLIT": 1, "X_STAGES": 2}),
    ("ring.cu", RING | {"BITS": 8, "N": 16, "HALF": 0, "ROWS": 128, "CLUSTER": 2, "GROUPED": 1}),
    ("ring.cu", RING | {"BITS": 8, "N": 64, "HALF": 0, "ROWS": 256, "STAGES": 4, "GROUPED": 1}),
    ("ring.cu", RING | {"BITS": 8, "N": 32, "HALF": 0, "SPLIT": 1, "GROUPED": 1}),
    ("ring.cu", RING | {"BITS": 8, "N": 32, "HALF": 0, "SPLIT": 1, "GROUPED": 0}),
    ("ring_packed.cu", RING | FOUR | {"N": 64, "HALF": 0, "ROWS": 192, "SPLIT": 1, "E4M3": 0}),
    ("ring_packed.cu", RING | EIGHT | {"N": 32, "HALF": 1, "ROWS": 256, "GATE": 0}),
    ("ring_packed.cu", RING | EIGHT | {"N": 8, "HALF": 0, "E4M3": 1, "GROUP": 1 << 30}),
    ("quantize.cu", {"HALF": 0, "NORM": 1, "VECTORS": 7, "TILES": 0, "TOP": 1}),
    ("quantize.cu", {"HALF": 1, "NORM": 1, "VECTORS": 2, "TILES": 2, "TOP": 1}),
    ("w4a8.cu", NIBBLES | {"HALF": 0, "GATE": 0, "N": 192, "STAGES": 6}),
    ("w4a8.cu", NIBBLES | {"HALF": 1, "GATE": 1, "N": 64, "STAGES": 8, "SCALES": 2}),
    ("decode.cu", DECODE | {"SOFTMAX": 3, "CLUSTER": 1}),
    ("decode.cu", DECODE | {"SOFTMAX": 2, "CLUSTER": 0, "HALF": 1, "D": 128}),
    ("decode.cu", DECODE | {"SOFTMAX": 1, "CLUSTER": 0, "D": 128, "WARPS": 8, "BLOCKS": 1, "DEPTH": 2}),
    ("decode.cu", DECODE | {"SOFTMAX": 1, "CLUSTER": 0, "D": 128, "GROUP": 8, "BLOCKS": 2, "DEPTH": 3}),
    ("decode.cu", DECODE | {"SOFTMAX": 2, "CLUSTER": 0, "HALF": 1, "WARPS": 8, "BLOCKS": 1, "DEPTH": 6}),
    ("decode.cu", DECODE | {"SOFTMAX": 1, "CLUSTER": 0, "D": 128, "EVEN": 1}),
    ("decode.cu", DECODE | {"SOFTMAX": 2, "CLUSTER": 0, "HALF": 1, "WARPS": 8, "BLOCKS": 1, "DEPTH": 6, "EVEN": 1}),
    ("even.cu", {"WARPS": 32}),
    ("prefill.cu", PREFILL | {"SOFTMAX": 2, "OVERLAP": 1, "PING": 1}),
    ("prefill.cu", PREFILL | RULES | {"SOFTMAX": 1, "OVERLAP": 0, "PING": 0}),
    ("experts.cu", EXPERTS | {"HALF": 0, "GATE": 1, "N": 8, "ROWS": 64, "BOXES": 2, "DOWN": 0}),
    ("experts.cu", EXPERTS | {"HALF": 1, "GATE": 0, "N": 256, "ROWS": 128, "BOXES": 1, "DOWN": 1, "CLUSTER": 2}),
    ("experts.cu", EXPERTS | {"HALF": 0, "GATE": 1, "N": 192, "ROWS": 192, "BOXES": 1, "DOWN": 0}),
    ("experts_packed.cu", EXPERTS | TILES | {"HALF": 0, "GATE": 1, "N": 16, "KINDS": 8, "ACTS8S": 0}),
    (
        "experts_packed.cu",
        EXPERTS | TILES | {"HALF": 1, "GATE": 0, "N": 128, "KINDS": 2, "ACTS8S": 3, "K0": 48, "K1": 75},
    ),
    (
        "experts_packed.cu",
        EXPERTS | TILES | {"HALF": 0, "GATE": 1, "N": 192, "X_BOXES": 1, "KINDS": 2, "ACTS8S": 3, "K0": 62, "K1": 75},
    ),
    (
        "experts_packed.cu",
        EXPERTS | TILES | {"HALF": 0, "GATE": 1, "N": 64, "ROWS": 256, "X_BOXES": 1, "KINDS": 1, "ACTS8S": 1, "K0": 62},
    ),
    ("experts_packed.cu", EXPERTS | DIGITS | {"HALF": 0, "GATE": 1, "N": 8, "ROWS": 64, "BLOCKS": 2, "SPAN": 4}),
    ("experts_packed.cu", EXPERTS | DIGITS | {"HALF": 1, "GATE": 2, "N": 16, "BLOCKS": 2}),
    ("experts_packed.cu", EXPERTS | DIGITS | {"HALF": 1, "GATE": 0, "DOWN": 1, "N": 32, "SPAN": 2}),
    ("spread.cu", SPREAD | {"HALF": 0}),
    ("spread.cu", SPREAD | {"HALF": 1, "TOP": 0, "WITH_BYTES": 0}),
    ("spread.cu", SPREAD | {"HALF": 1, "TOP": 0, "WITH_PAIRS": 0, "WITH_THIRDS": 0}),
    ("route.cu", ROUTE | {"EXPERTS": 60, "SIGMOID": 0, "GROUPS": 1, "KEPT": 1, "BEST": 1, "CLUSTER": 0}),
    ("route.cu", ROUTE | {"EXPERTS": 256, "SIGMOID": 1, "GROUPS": 8, "KEPT": 4, "BEST": 2}),
    ("picks.cu", {"HALF": 1, "TOP": 8}),
    ("argmax.cu", {}),
    ("rope.cu", {"HALF": 0, "D": 128}),
    ("rope.cu", {"HALF": 1, "D": 64}),
    ("rope.cu", {"HALF": 0, "D": 256}),
    ("norm.cu", {"HALF": 0, "VECTORS": 2}),
]


@pytest.mark.parametrize(("source", "defines"), SOURCES)
def test_compiles_and_is_found_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, defines: dict[str, int]
) -> None:
    monkeypatch.setenv("TENFOLD_HOME", str(tmp_path))
    image = nvrtc.compiled(source, "sm_90a", defines)
    assert image.startswith(b"\x7fELF")
    (kept,) = (tmp_path / "kernels").iterdir()
    assert kept.read_bytes() == image
    kept.write_bytes(b"cached")
    assert nvrtc.compiled(source, "sm_90a", defines) == b"cached"


def test_a_cache_that_cannot_be_written_costs_time_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("TENFOLD_HOME", str(blocked))
    assert nvrtc.compiled("argmax.cu", "sm_90a", {}).startswith(b"\x7fELF")


def test_a_kernel_that_cannot_be_stored_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: str, target: Path) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(nvrtc.os, "replace", full)
    nvrtc._store(tmp_path / "kernels" / "image", b"image")
    assert not list((tmp_path / "kernels").iterdir())


def test_the_compilers_complaint_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENFOLD_HOME", str(tmp_path))
    with pytest.raises(nvrtc.CompileError, match=r"ring\.cu.*ROWS"):
        nvrtc.compiled("ring.cu", "sm_90a", {"N": 8, "BITS": 16, "HALF": 0})


@pytest.mark.parametrize(
    ("dtype", "kind", "columns"),
    [(torch.bfloat16, 9, 64), (torch.float16, 6, 64), (torch.float8_e4m3fn, 0, 128)],
    ids=str,
)
def test_maps_of_matrices_describe_their_numbers(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, kind: int, columns: int
) -> None:
    told = []

    class Driver:
        def cuTensorMapEncodeTiled(self, block: Any, kind: int, rank: int, at: Any, *sizes: Any) -> int:
            told.append((kind, rank, *(list(size) for size in sizes[:3])))
            return 0

    monkeypatch.setattr(nvrtc, "_driver", Driver)
    matrix = torch.zeros(96, 512, dtype=torch.uint8).view(dtype)
    nvrtc.TensorMap(matrix, 64)
    assert told == [(kind, 2, [matrix.shape[1], 96], [512], [columns, 64])]


PACKED = {"HALF": 0, "N": 64, "STAGES": 2, "BLOCKS": 1, "GATE": 0}


@pytest.mark.parametrize(
    ("source", "macros", "rows"),
    [
        *(
            ("experts_packed.cu", EXPERTS | TILES | PACKED | {"KINDS": 8, "ACTS8S": 0}, rows)
            for rows in (128, 192, 256)
        ),
        *(("ring_packed.cu", RING | FOUR | PACKED | {"E4M3": 0, "N": n}, rows) for n, rows in ((64, 192), (32, 256))),
    ],
)
def test_warps_take_no_more_registers_than_others_give(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, macros: dict[str, int], rows: int
) -> None:
    """Else they would wait for them for ever."""
    monkeypatch.setenv("TENFOLD_HOME", str(tmp_path))
    text = (nvrtc.SOURCES / source).read_text()
    taken = re.search(
        r"setmaxnreg\.inc\S+ %0;\" ::\"n\"\((?:ROWS <= 128 \? (\d+) : )?ROWS == 192 \? (\d+) : (\d+)", text
    )
    assert taken
    assert "setmaxnreg.dec.sync.aligned.u32 24" in text
    own = int(taken[{128: 1, 192: 2, 256: 3}[rows]])
    image = nvrtc.compiled(source, "sm_90a", macros | {"ROWS": rows})
    assert 128 * 24 + 2 * rows * own <= (2 * rows + 128) * elf.registers(image)


def test_a_map_of_slabs_brings_gate_and_up_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers that the engine would fetch, by what it is told: 8 rows of gate, then the same 8 of up."""
    experts = pytest.importorskip("tenfold.ops.gpu.experts")
    told: list[list[int]] = []

    class Driver:
        def cuTensorMapEncodeTiled(self, block: Any, kind: int, rank: int, at: Any, *sizes: Any) -> int:
            told.extend(list(size) for size in sizes[:4])
            assert rank == 5
            return 0

    monkeypatch.setattr(nvrtc, "_driver", Driver)
    count, outputs, cols, height = 3, 40, 72, 64
    w = torch.arange(count * 2 * outputs * cols, dtype=torch.int16).view(torch.bfloat16).view(count, 2 * outputs, cols)
    nvrtc.TensorMap(experts.slabs(w), experts.slab_box(height))
    sizes, strides, box, steps = told
    assert (sizes, box, steps) == ([cols, 8, 2, outputs // 8, count], [64, 8, 2, height // 16, 1], [1] * 5)
    assert strides == [2 * cols, 2 * outputs * cols, 16 * cols, 4 * outputs * cols]
    assert all(stride % 16 == 0 for stride in strides)
    flat, (expert, row, col) = w.view(torch.int16).flatten().tolist(), (1, 32, 64)
    found = []
    for slab, side, r in itertools.product(range(height // 16), range(2), range(8)):
        at = (col, r, side, row // 8 + slab, expert)
        inside = all(place < size for place, size in zip(at, sizes))
        found.append(flat[at[0] + sum(p * s // 2 for p, s in zip(at[1:], strides))] if inside else 0)
    numbers = w.view(torch.int16)[expert, :, col].tolist()
    want = [numbers[side * outputs + row + r] for side in range(2) for r in range(8)]  # the last slab, and then none
    assert found == want + [0] * 48


class Launched:
    """A driver that keeps what it is told of launches."""

    def __init__(self) -> None:
        self.parameters: list[list[bytes]] = []
        self.configs: list[tuple[Any, ...]] = []
        self.asked: list[int] = []

    def cuFuncGetAttribute(self, value: Any, which: int, function: Any) -> int:
        value._obj.value = 1024
        return 0

    def cuFuncSetAttribute(self, function: Any, which: int, value: int) -> int:
        self.asked.append(value)
        return 0

    def cuLaunchKernelEx(self, config: Any, function: Any, pointers: Any, extra: Any) -> int:
        assert extra is None
        assert pointers[3] % 64 == 0  # a tensor map
        self.parameters.append([ctypes.string_at(at, size) for at, size in zip(pointers, (4, 8, 4, 128, 8, 4))])
        c = config._obj
        attributes = [(c.attributes[i].id, *c.attributes[i].value[:3]) for i in range(c.count)]
        self.configs.append(
            (c.grid.x, c.grid.y, c.grid.z, c.block.x, c.block.y, c.block.z, c.shared, c.stream, attributes)
        )
        return 0


def test_clusters_that_run_at_the_same_time_are_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Counting(Launched):
        def cuOccupancyMaxActiveClusters(self, found: Any, function: Any, config: Any) -> int:
            c = config._obj
            asked.append((c.grid.x, c.block.x, c.shared, c.attributes[0].id, c.attributes[0].value[0]))
            found._obj.value = 61
            return 0

    driver = Counting()
    kernel = nvrtc.Kernel("k", 1, driver, 0)
    assert [kernel.clusters(288, 200 << 10, 2) for _ in range(2)] == [61, 61]
    assert asked == [(2, 288, 200 << 10, 4, 2)]
    assert driver.asked == [200 << 10]
    launched: list[tuple[Any, ...]] = []

    class Told:
        clusters = staticmethod(kernel.clusters)

        def __call__(self, grid: Any, threads: int, shared: int, arguments: Any, **more: Any) -> None:
            launched.append((grid[0], more["cluster"]))

    from tenfold.ops.gpu.experts import launch

    for items, blocks, cluster in ((1000, 1, 2), (1000, 1, 1), (7, 1, 2), (1000, 2, 1)):
        launch(Told(), items, 132, blocks, cluster, 288, 200 << 10, [])  # type: ignore[arg-type]
    assert launched == [(122, 2), (132, 1), (8, 2), (264, 1)]


def test_a_launch_lays_arguments_out_as_the_kernel_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Launched()
    driver.cuTensorMapEncodeTiled = lambda *told: 0  # type: ignore[attr-defined]
    monkeypatch.setattr(nvrtc, "_driver", lambda: driver)
    monkeypatch.setattr(nvrtc, "_current_stream", lambda device: 70 + device)
    x = torch.zeros(64, 64, dtype=torch.float16)
    map = nvrtc.TensorMap(x, 64)
    map.bytes = bytes(range(128))
    kernel = nvrtc.Kernel("k", 1, driver, 3)
    kernel((7, 2, 1), 96, 47 << 10, [-5, x, 0.5, map, None, 9], dependent=True, cluster=2)
    kernel((1, 1, 1), 32, 100 << 10, [6, None, -1.0, map, x, 1])
    kernel((0, 1, 1), 32, 0, [6, None, -1.0, map, x, 1])
    codes = ("i", "Q", "f", "128s", "Q", "i")
    first, second = ([struct.unpack(*one)[0] for one in zip(codes, call)] for call in driver.parameters)
    assert first == [-5, x.data_ptr(), 0.5, map.bytes, 0, 9]
    assert second == [6, 0, -1.0, map.bytes, x.data_ptr(), 1]
    assert driver.configs == [
        (7, 2, 1, 96, 1, 1, 47 << 10, 73, [(6, 1, 0, 0), (4, 2, 1, 1)]),
        (1, 1, 1, 32, 1, 1, 100 << 10, 73, []),
    ]
    assert driver.asked == [100 << 10]
    with pytest.raises(struct.error):  # an int's place gets no float
        kernel((1, 1, 1), 32, 0, [6.5, None, -1.0, map, x, 1])
