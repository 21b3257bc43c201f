"""Launches and bytes of a decode step, counted:

`python -m tenfold.bench.launches --model shape:llama-3-8b --batch 1,8,64 --context 1024 --out FILE`

On a GPU a step is captured as a CUDA graph and its nodes are read back, so every kernel, copy and fill counts once; on
a CPU the operations of PyTorch are counted. What a transformer block launches is the difference of two models that
differ by one block, so nothing is attributed by guess. Bytes follow from shapes: each operation's weights, keys and
values, and activations, read and written once.
"""

import argparse
import ctypes
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tenfold.bench.command import again, save, settings
from tenfold.bench.engines import engine_config
from tenfold.bench.hardware import machine
from tenfold.engine.core import Engine
from tenfold.engine.memory import DTYPES
from tenfold.nn.step import Step
from tenfold.ops.formats import format_of
from tenfold.weights.find import resolve
from tenfold.weights.open import open_checkpoint
from tenfold.weights.shapes import at_least_positions, is_shape

if TYPE_CHECKING:  # Triton comes with it, which tables of results do not need
    from tenfold.ops.gpu.arms import Work
    from tenfold.ops.gpu.attending import Layer
    from tenfold.ops.gpu.expert_arms import ExpertsWork

KERNEL, COPY, FILL = 0, 1, 2  # CUgraphNodeType
KEPT = 2 << 30  # bytes of keys and values of each of two models on a GPU
LONGEST_NAME = 60  # characters
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Moved:
    """One operation of a block: bytes of weights, of keys and values, and of activations with what it writes."""

    op: str
    weights: int
    kv: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.activations


@dataclass(slots=True)
class Row:
    """A step of `batch` decodes at `context` tokens. block: launches of one block by name; rest: of all else, from the
    embedding to the logits. moved: the operations of a block, then the head.
    """

    batch: int
    context: int
    block: dict[str, int]
    rest: dict[str, int]
    moved: list[Moved]

    @property
    def per_block(self) -> int:
        return sum(self.block.values())

    def per_step(self, layers: int) -> int:
        return layers * self.per_block + sum(self.rest.values())


@dataclass(slots=True)
class Result:
    model: str
    layers: int
    kernels: str
    machine: dict[str, str]
    command: str = ""
    rows: list[Row] = field(default_factory=list)

    def lines(self) -> list[str]:
        found = [f"{self.kernels}, {self.layers} blocks"]
        for row in self.rows:
            total = sum(m.total for m in row.moved[:-1])
            found.append(
                f"{row.batch} x {row.context}: {row.per_block} launches and {total / MIB:.1f} MiB a block, "
                f"{sum(row.rest.values())} launches beside blocks, {row.per_step(self.layers)} a step"
            )
            found.append(f"  block: {named(row.block)}")
            found.append(f"  rest: {named(row.rest)}")
            found += [
                f"  {m.op:34} weights {m.weights / MIB:9.2f}  KV {m.kv / MIB:9.2f}  activations "
                f"{m.activations / MIB:7.3f} MiB"
                for m in row.moved
            ]
        return found

    def plain(self) -> dict[str, Any]:
        return {"suite": "launches", "lines": self.lines()} | asdict(self)


def loaded(data: dict[str, Any]) -> Result:
    """The result that `plain` made."""
    rows = [Row(**row | {"moved": [Moved(**m) for m in row["moved"]]}) for row in data["rows"]]
    return Result(data["model"], data["layers"], data["kernels"], data["machine"], data["command"], rows)


def named(launches: dict[str, int]) -> str:
    return ", ".join(f"{count} x {name}" for name, count in sorted(launches.items(), key=lambda x: -x[1])) or "none"


# Bytes


def moved(call: "Work | ExpertsWork | Layer", batch: int, context: int, dtype: torch.dtype) -> Moved:
    """Bytes of one operation for `batch` tokens, each with `context` tokens in the cache, itself among them."""
    size = dtype.itemsize
    from tenfold.ops.gpu import attending, expert_arms

    if isinstance(call, attending.Layer):
        spec = call.spec
        seen = min(context, spec.window) if spec.window else context
        token = 2 * spec.kv_heads * spec.head_dim * size
        # qkv in, heads out; old keys and values in, the new ones out
        activations = batch * size * spec.head_dim * (2 * spec.heads + 2 * spec.kv_heads)
        name = f"attention {spec.heads}/{spec.kv_heads} heads of {spec.head_dim}"
        return Moved(name, 0, batch * seen * token, activations)
    if isinstance(call, expert_arms.ExpertsWork):
        weights, activations = map(round, expert_arms.moved(replace(call, tokens=batch)))
        return Moved(f"{call.count} experts of {call.inner}, {call.top} a token", weights, 0, activations)
    outputs = call.rows // 2 if call.use.act else call.rows
    weights = call.rows * call.cols * size
    if call.format != "dense":
        weights = format_of(call.format).nbytes(call.rows, call.cols)
    activations = batch * size * (call.cols + outputs * (2 if call.use.residual else 1))
    return Moved(f"{call.use} {call.rows} x {call.cols}", weights, 0, activations)


# Launches


class Operations(TorchDispatchMode):
    """Counts PyTorch's operations, but for views."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returns = func._schema.returns
        if not any(r.alias_info is not None and not r.alias_info.is_write for r in returns):
            self.counts[str(func.overloadpacket.__name__)] += 1
        return func(*args, **(kwargs or {}))


def operations(run: Callable[[], object]) -> Counter[str]:
    """PyTorch's operations of a call."""
    with Operations() as counter:
        run()
    return counter.counts


def nodes(run: Callable[[], object]) -> Counter[str]:
    """Nodes of the graph that a call is captured as, by name. Everything it needs must have been compiled."""
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream(), capture_error_mode="thread_local"):
        run()
    return read_graph(ctypes.CDLL("libcuda.so.1"), graph.raw_cuda_graph())


class _Launch(ctypes.Structure):
    """CUDA_KERNEL_NODE_PARAMS_v2."""

    _fields_ = (
        ("function", ctypes.c_void_p),
        ("sizes", ctypes.c_uint * 7),
        ("parameters", ctypes.c_void_p),
        ("extra", ctypes.c_void_p),
        ("kernel", ctypes.c_void_p),
        ("context", ctypes.c_void_p),
    )


def read_graph(driver: Any, graph: int) -> Counter[str]:
    """Nodes of a CUgraph by name. Raises RuntimeError."""
    handle, count = ctypes.c_void_p(graph), ctypes.c_size_t(0)
    check(driver.cuGraphGetNodes(handle, None, ctypes.byref(count)))
    found = (ctypes.c_void_p * count.value)()
    check(driver.cuGraphGetNodes(handle, found, ctypes.byref(count)))
    names: Counter[str] = Counter()
    for node in filter(None, found[: count.value]):
        kind = ctypes.c_int()
        check(driver.cuGraphNodeGetType(ctypes.c_void_p(node), ctypes.byref(kind)))
        names[{KERNEL: "", COPY: "copy", FILL: "fill"}.get(kind.value, "other") or kernel_name(driver, node)] += 1
    return names


def kernel_name(driver: Any, node: int) -> str:
    """What the kernel of a node is called, "kernel" where the driver does not say."""
    launch, name = _Launch(), ctypes.c_char_p()
    check(driver.cuGraphKernelNodeGetParams_v2(ctypes.c_void_p(node), ctypes.byref(launch)))
    ask, handle = ("cuFuncGetName", launch.function) if launch.function else ("cuKernelGetName", launch.kernel)
    if not hasattr(driver, ask) or getattr(driver, ask)(ctypes.byref(name), ctypes.c_void_p(handle)):
        return "kernel"
    return readable((name.value or b"kernel").decode())


def readable(name: str) -> str:
    """The part of a mangled C++ name that says most."""
    if not name.startswith("_Z"):
        return name[:LONGEST_NAME]
    words, at = [], 2
    while found := re.compile(r"\d+").search(name, at):
        end = found.end() + int(found[0])
        if end > len(name):
            break
        words.append(name[found.end() : end])
        at = end
    kernels = [word for word in words if "kernel" in word.lower() and word.isidentifier()]
    return (kernels or words or [name])[0][:LONGEST_NAME]


def check(status: int) -> None:
    if status:
        raise RuntimeError(f"The CUDA driver could not read the graph, error {status}.")


def step_of(engine: Engine, batch: int, context: int) -> Step:
    """Decodes of `batch` requests of `context` tokens; they share the pages that there are."""
    size, device = engine.config.page_size, engine.device
    columns = engine.kernels.bucket(batch, -(-context // size))[1]
    table = (torch.arange(batch * columns, device=device) % engine.pool.total).int().view(batch, columns)
    last = table[:, (context - 1) // size] * size + (context - 1) % size
    return Step(
        token_ids=torch.ones(batch, dtype=torch.int64, device=device),
        positions=torch.full((batch,), context - 1, dtype=torch.int32, device=device),
        slots=last.int().contiguous(),
        page_table=table,
        query_start=torch.arange(batch + 1, dtype=torch.int32, device=device),
        kv_lengths=torch.full((batch,), context, dtype=torch.int32, device=device),
        logits_rows=torch.arange(batch, device=device),
        max_query=1,
        max_kv=context,
        kv=engine.kv,
        decodes=batch,
    )


def counts(engine: Engine, batch: int, context: int) -> Counter[str]:
    """Launches of a step, from the embedding to the logits."""
    step = step_of(engine, batch, context)

    def run() -> Tensor:
        return engine.model.forward(step)

    with torch.inference_mode():
        run()
        return nodes(run) if engine.device.type == "cuda" else operations(run)


def measure(
    model: str,
    device: str,
    batches: Sequence[int],
    contexts: Sequence[int],
    own: dict[str, Any] | None = None,
    say: Callable[[str], None] = print,
    command: str = "",
) -> Result:
    """Count steps of a shape. own: fields of EngineConfig. Raises ValueError for a model that is no shape."""
    from tenfold.engine.linears import traced

    if not is_shape(model):
        raise ValueError(f"{model!r} is no shape; launches are counted on two sizes of one, such as shape:llama-3-8b.")
    longest = max(contexts) + 16
    model = at_least_positions(model, longest)
    engines = []
    for layers in (1, 2):
        name = f"{model}{',' if '@' in model else '@'}layers={layers}"
        sizes = {"max_model_len": longest, "kv_memory": KEPT if device.startswith("cuda") else 0}
        config = engine_config(own or {}, model=name, device=device, graphs=False, **sizes)
        engines.append(Engine.load(config, tokens_only=True))
    one, two = engines
    checkpoint = open_checkpoint(resolve(model))
    dtype = DTYPES[one.config.dtype]
    calls = traced(checkpoint, dtype, one.config.weights).calls
    layers = int(checkpoint.config["num_hidden_layers"])
    block = [*calls[: (len(calls) - 1) // layers], calls[-1]]
    result = Result(model, layers, f"{one.kernels.name} kernels", machine(device), command)
    for batch in batches:
        for context in contexts:
            first, second = counts(one, batch, context), counts(two, batch, context)
            each = second - first
            rows = [moved(call, batch, context, dtype) for call in block]
            result.rows.append(Row(batch, context, dict(each), dict(first - each), rows))
    for line in result.lines():
        say(line)
    return result


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tenfold.bench.launches", description=__doc__)
    parser.add_argument("--model", default="shape:llama-3-8b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", default="1,8,64")
    parser.add_argument("--context", default="1024")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a field of EngineConfig")
    parser.add_argument("--commit", default="", help="what to write down where there is no checkout")
    parser.add_argument("--out", type=Path, default=Path("bench/results/gpu-launches/launches.json"))
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser()
    given = parser.parse_args(arguments)
    batches, contexts = ([int(n) for n in text.split(",")] for text in (given.batch, given.context))
    own = settings(given.set)
    result = measure(given.model, given.device, batches, contexts, own, command=again(parser, given))
    save(given.out, result.plain(), given.commit)
    return 0


if __name__ == "__main__":
    sys.exit(main())
