"""The least time a step can take: bytes that must be read over the rate at which this device copies memory.

Floor of a decode step = (weights read once, the embedding table aside unless it is also the head, + keys and values of
every context read once) / copy bandwidth, where a copy counts what it reads and what it writes. Of a layer's experts
those count that tokens are expected to be sent to where all are equally likely.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tenfold.bench.engines import engine_config

GB = 1e9
PICTURE_TOKENS = ("image_token_id", "image_token_index", "img_context_token_id")  # in configs


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes of a model. weights: all of them; streamed: those a decode step may read, which are none that look at
    pictures; experts: of these, in layers of which a token takes the share `routed`; kv_token: keys and values of one
    token, all layers; flops_token: of the matrices for one token, without attention; vocab: ids below it are text.
    """

    weights: int
    streamed: int
    kv_token: int
    flops_token: int
    layers: int = 0
    heads: int = 0
    head_dim: int = 0
    vocab: int = 0
    experts: int = 0
    routed: float = 1.0

    def decode_bytes(self, batch: int, context: float) -> int:
        """What one step for `batch` contexts of `context` tokens on average must read."""
        idle = round(self.experts * (1 - self.routed) ** batch)
        return self.streamed - idle + round(batch * context) * self.kv_token

    def prefill_flops(self, batch: int, context: int) -> int:
        """Multiplications and additions of prompts of `context` tokens: matrices, and causal attention (half of all
        pairs). The head works for the last token alone, which is left out.
        """
        attention = 2 * 2 * self.layers * self.heads * self.head_dim * context * context // 2
        return batch * (context * self.flops_token + attention)


def model_sizes(model: str, device: str = "cpu", settings: Mapping[str, Any] | None = None) -> Sizes:
    """Sizes of a model as the engine holds it on a device. settings: fields of EngineConfig. Reads headers only. Raises
    ValueError for settings that there are not.
    """
    from tenfold.engine.memory import DTYPES, weight_bytes
    from tenfold.models.table import model_config
    from tenfold.weights.find import resolve
    from tenfold.weights.load import SIGHT, head_copy
    from tenfold.weights.open import open_checkpoint

    config = engine_config(settings or {}, model=model)
    default = "float32" if device.startswith("cpu") else "bfloat16"
    dtype = DTYPES[default if config.dtype == "auto" else config.dtype]
    kv_dtype = dtype if config.kv_dtype == "auto" else DTYPES[config.kv_dtype]
    checkpoint = open_checkpoint(resolve(model))
    shape = model_config(checkpoint.config)
    loaded = checkpoint, config.weights, dtype, "native" if device.startswith("cpu") else "gpu"
    text, _ = weight_bytes(*loaded, without=SIGHT)
    table, shares = shape.vocab_size * shape.hidden_size, shape.tied and not head_copy(checkpoint, config.weights)
    names = [name for name in checkpoint.names() if not name.startswith(SIGHT)]
    count = sum(math.prod(checkpoint.tensor(name).shape) for name in names)
    rest = count - table * (1 if shape.tied else 2)
    experts, routed = 0, 1.0
    if (own := shape.experts) is not None:
        experts = 3 * own.routing.experts * own.size * shape.hidden_size * sum(own.layers)
        routed = own.routing.top / own.routing.experts
    return Sizes(
        weights=weight_bytes(*loaded)[0],
        streamed=text if shares else text - table * dtype.itemsize,
        kv_token=(2 if shape.latent is None else 1) * shape.layers * shape.kv_size * kv_dtype.itemsize,
        flops_token=2 * round(rest - experts * (1 - routed)),
        layers=shape.layers,
        heads=shape.heads,
        head_dim=shape.head_dim,
        vocab=min([shape.vocab_size, *picture_tokens(checkpoint.config)]),
        experts=round((text - (count - rest) * dtype.itemsize) * experts / rest),
        routed=routed,
    )


def picture_tokens(raw: Mapping[str, Any]) -> list[int]:
    """The ids that stand for parts of pictures in prompts of a model with this config."""
    found = (raw.get("whole", {}).get(name) for name in PICTURE_TOKENS)
    return [id for id in found if type(id) is int]


def floor_ms(sizes: Sizes, batch: int, context: float, copy_gbs: float) -> float:
    """Milliseconds of a decode step at the copy bandwidth `copy_gbs` (GB/s, read + write)."""
    return 1e3 * sizes.decode_bytes(batch, context) / (copy_gbs * GB)


def copy_bandwidth(device: str, nbytes: int = 0, rounds: int = 5) -> float:
    """GB/s of a copy inside the device's memory, read + write, the best of `rounds`. nbytes: of the buffer."""
    count = nbytes or ((1 << 30) if device.startswith("cuda") else (1 << 28))
    source = torch.empty(count, dtype=torch.uint8, device=device).random_(0, 255)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * count / best_seconds(lambda: target.copy_(source), device, rounds) / GB


def matmul_ceiling(device: str, size: int = 8192, rounds: int = 5) -> float:
    """TFLOP/s of a square matrix product: bfloat16 on a GPU, float32 on a CPU, the best of `rounds`."""
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    a, b = (torch.empty(size, size, dtype=dtype, device=device).normal_() for _ in range(2))
    torch.mm(a, b)
    return 2 * size**3 / best_seconds(lambda: torch.mm(a, b), device, rounds) / 1e12


def best_seconds(run: Callable[[], object], device: str, rounds: int) -> float:
    """Least seconds of one call among rounds of a few."""
    each = 8 if device.startswith("cuda") else 1
    found = []
    for _ in range(rounds):
        settle(device)
        begin = time.perf_counter()
        for _ in range(each):
            run()
        settle(device)
        found.append((time.perf_counter() - begin) / each)
    return min(found)


def settle(device: str) -> None:
    """Wait until the device has done what it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
