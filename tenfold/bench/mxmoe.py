"""What experts of few bits cost in quality, mixed and uniform: `python -m tenfold.bench.mxmoe --model MODEL ...`.

Weights of experts are rounded and put back in place of the exact ones, so any bits can be judged on any device; all
else of the model stays exact. Uniform rows have one scheme everywhere; mixed ones are what the allocator makes of as
many bits, of blocks (`block`) and of whole experts (`expert`), within each layer or over the model. Losses are measured
on one text and perplexity on another.

    python -m tenfold.bench.mxmoe --model moe --calibrate a.txt --text b.txt --bits 2.25,3.25 --out mxmoe.json
"""

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tenfold.bench.command import save
from tenfold.bench.hardware import machine
from tenfold.cache.store import KVSpec, KVStore
from tenfold.models.table import build_model
from tenfold.ops.matrix import Bank
from tenfold.quantize.capture import PAGE, Seen, Watching, step_of, watched
from tenfold.quantize.gptq import gptq
from tenfold.quantize.mxmoe.allocate import Allocator, Block, BudgetError, Plan, budgets, joined
from tenfold.quantize.mxmoe.sensitivity import PARTS, losses
from tenfold.quantize.rotate import Rotated
from tenfold.quantize.schemes import Scheme, parse, round_to_nearest
from tenfold.weights.checkpoint import Checkpoint
from tenfold.weights.find import resolve
from tenfold.weights.load import Weights
from tenfold.weights.open import open_checkpoint

SCHEMES = "w1g128z,w2g128z,w3g128z,w4g128z,w8g128z"
BITS = "2.25,3.25"
AS_MANY = 64  # tokens of the layer's average that an expert's own are mixed with
Key = tuple[int, int, str]  # layer, expert, part


@dataclass(slots=True)
class Rounded:
    """What was measured of a model: weights of each block by scheme, their losses, how many numbers they have, and how
    many picks each expert of each layer had.
    """

    weights: dict[tuple[Key, str], Tensor] = field(default_factory=dict)
    losses: dict[tuple[Key, str], float] = field(default_factory=dict)
    sizes: dict[Key, int] = field(default_factory=dict)
    picks: dict[int, list[int]] = field(default_factory=dict)


def name_of(key: Key) -> str:
    return f"{key[0]}.{key[1]}.{key[2]}"


class Subject:
    """A model whose experts are rounded and made exact again."""

    def __init__(
        self, model: str, device: str = "cpu", dtype: torch.dtype = torch.float32, rotate: bool = False
    ) -> None:
        """rotate: turn the residual stream first. Raises ValueError for a model without experts."""
        self.kernels = Watching(device, dtype)
        source = open_checkpoint(resolve(model))
        self.checkpoint: Checkpoint = Rotated(source) if rotate else source
        weights = Weights(self.checkpoint, self.kernels, device, dtype, "dense")
        self.model: Any = build_model(self.checkpoint.config, weights, 4096)
        if self.model.config.experts is None:
            raise ValueError(f"{model} has no experts; name a mixture-of-experts model.")
        self.exact = {key: bank.each[key[1]].data[0].clone() for key, bank in self._blocks()}

    def _blocks(self) -> list[tuple[Key, Bank]]:
        sparse = [i for i, has in enumerate(self.model.config.experts.layers) if has]
        found = []
        for layer, own in zip(sparse, self.model.experts):
            for part, bank in zip(PARTS, (own.gate_up, own.down)):
                found += [((layer, expert, part), bank) for expert in range(len(own))]
        return found

    def put(self, weights: Mapping[Key, Tensor]) -> None:
        """These blocks rounded, all others exact."""
        for key, bank in self._blocks():
            bank.each[key[1]].data[0].copy_(weights.get(key, self.exact[key]))

    def tokens(self, text: str, length: int, windows: int) -> list[list[int]]:
        ids = self.checkpoint.tokenizer().encode(text, add_special_tokens=False).ids
        found = [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
        step = max(1, len(found) // windows)
        return found[::step][:windows]

    def perplexity(self, windows: Sequence[Sequence[int]]) -> float:
        config, device = self.model.config, self.kernels.device
        spec = KVSpec(
            config.layers, config.kv_heads, config.head_dim, self.kernels.dtype, PAGE, one=bool(config.latent)
        )
        store = KVStore(spec, -(-max(map(len, windows)) // PAGE), device)
        total, count = 0.0, 0
        with torch.inference_mode():
            for window in windows:
                step = step_of(window, store, device, every=True)
                logs = self.model.forward(step)[:-1].log_softmax(-1)
                total -= float(logs.gather(1, step.token_ids[1:, None]).sum())
                count += len(window) - 1
        return math.exp(total / count)

    def measure(
        self, windows: Sequence[Sequence[int]], schemes: Sequence[Scheme], method: str, say: Callable[[str], None]
    ) -> Rounded:
        """method: gptq or rtn."""
        found, act = Rounded(), self.model.config.activation
        for layer, seen in watched(self.model, self.kernels, windows):
            averages = {part: _average(seen, part) for part in PARTS}
            found.picks[layer] = [own.picks for own in seen]
            for expert, own in enumerate(seen):
                exact = {part: self.exact[layer, expert, part].float() for part in PARTS}
                moments = {
                    "gate_up": own.inputs.shrunk(averages["gate_up"], AS_MANY),
                    "down": own.inner.shrunk(averages["down"], AS_MANY),
                }
                for part, scheme in ((part, scheme) for part in PARTS for scheme in schemes):
                    key = (layer, expert, part), str(scheme)
                    w = exact[part]
                    found.weights[key] = (
                        gptq(w, moments[part], scheme) if method == "gptq" else round_to_nearest(w, scheme)
                    )
                    found.sizes[key[0]] = w.numel()

                def kept(w: Tensor, scheme: Scheme, part: str, at: tuple[int, int] = (layer, expert)) -> Tensor:
                    return found.weights[(*at, part), str(scheme)]

                measured = losses(own, exact["gate_up"], exact["down"], act, schemes, kept)
                for (part, name), loss in measured.items():
                    found.losses[(layer, expert, part), name] = loss
            picks, tokens = found.picks[layer], sum(map(len, windows))
            say(f"layer {layer}: {tokens} tokens, {min(picks)} to {max(picks)} of them for an expert")
        return found


def _average(seen: Sequence[Seen], part: str) -> Tensor:
    """Second moments over all experts of a layer."""
    every = [own.inputs if part == "gate_up" else own.inner for own in seen]
    return torch.stack([m.sums for m in every]).sum(0) / max(1, sum(m.count for m in every))


def slopes(subject: Subject, found: Rounded, scheme: str, windows: Sequence[Sequence[int]]) -> dict[int, float]:
    """What a loss of each layer costs in the end: the rise of the text's mean negative log-likelihood where all experts
    of the layer have a scheme, for each unit of their losses. Never below zero.
    """
    before = math.log(subject.perplexity(windows))
    made = {}
    for layer in found.picks:
        own = {key: found.weights[key, scheme] for key in found.sizes if key[0] == layer}
        subject.put(own)
        loss = sum(found.losses[key, scheme] for key in own)
        made[layer] = max(0.0, math.log(subject.perplexity(windows)) - before) / loss if loss else 0.0
    subject.put({})
    return made


def blocks_of(
    found: Rounded, bits: Mapping[str, float], scope: str, norm: bool, slope: Mapping[int, float] | None = None
) -> list[Block]:
    """Blocks of the allocator. scope: "layer" or "model"; norm: losses as the paper adds them up, not squared; slope of
    each layer, of `slopes`. Time is what reading takes, of experts that are picked as often as here.
    """
    made = []
    for key, size in found.sizes.items():
        layer, expert, _ = key
        own = {name: found.losses[key, name] * (slope[layer] if slope else 1.0) for name in bits}
        often = found.picks[layer][expert] / max(1, sum(found.picks[layer]))
        made.append(
            Block(
                name_of(key),
                size,
                {name: math.sqrt(loss) if norm else loss for name, loss in own.items()},
                {name: often * size * b for name, b in bits.items()},
                f"layer {layer}" if scope == "layer" else "",
            )
        )
    return made


def mixed(
    found: Rounded,
    bits: Mapping[str, float],
    budget: float,
    scope: str,
    tie: str,
    norm: bool,
    r: float,
    slope: Mapping[int, float] | None = None,
) -> Plan:
    """tie: "block", or "expert" for one scheme for both blocks of an expert."""
    blocks = blocks_of(found, bits, scope, norm, slope)
    names = {name_of(key): f"{key[0]}.{key[1]}" for key in found.sizes}
    own = joined(blocks, names) if tie == "expert" else blocks
    plan = Allocator(own, bits).solve(budgets(own, budget), r)
    if tie == "block":
        return plan
    return Plan({name: plan.schemes[names[name]] for name in names}, plan.loss, plan.time, plan.bytes)


def chosen(found: Rounded, schemes: Mapping[str, str]) -> dict[Key, Tensor]:
    return {key: found.weights[key, schemes[name_of(key)]] for key in found.sizes}


def rows(
    subject: Subject,
    found: Rounded,
    bits: Mapping[str, float],
    wanted: Sequence[float],
    judged: Sequence[Sequence[int]],
    say: Callable[[str], None],
    slope: Mapping[int, float] | None = None,
) -> list[dict[str, Any]]:
    """Perplexity of everything exact, uniform and mixed; with slopes of layers, of losses in the end too."""
    made: list[dict[str, Any]] = []

    def add(kind: str, average: float, weights: Mapping[Key, Tensor], **more: Any) -> None:
        subject.put(weights)
        made.append({"kind": kind, "bits": average, "perplexity": subject.perplexity(judged)} | more)
        subject.put({})
        say(f"{kind:28} {average:6.3f} bits  perplexity {made[-1]['perplexity']:.3f}")

    add("exact", 16.0, {})
    every = sum(found.sizes.values())
    for name, each in bits.items():
        add(f"uniform {name}", each, chosen(found, {name_of(key): name for key in found.sizes}))
    for budget in wanted:
        for scope, tie, norm, end in (
            ("layer", "block", True, None),
            ("layer", "block", False, None),
            ("layer", "expert", False, None),
            ("model", "block", False, None),
            *((("model", "block", False, slope),) if slope else ()),
        ):
            try:
                plan = mixed(found, bits, budget, scope, tie, norm, 1.0, end)
            except BudgetError as error:
                say(str(error))
                continue
            share = {name: sum(s == name for s in plan.schemes.values()) for name in bits}
            kind = f"mixed {scope} {tie}{' norm' * norm}{' end' * bool(end)}"
            add(kind, 8 * sum(plan.bytes.values()) / every, chosen(found, plan.schemes), schemes=share, loss=plan.loss)
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tenfold.bench.mxmoe", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibrate", type=Path, required=True, help="text that losses are measured on")
    parser.add_argument("--text", type=Path, required=True, help="text that is judged")
    parser.add_argument("--schemes", default=SCHEMES, help="that blocks may get, and that uniform rows have")
    parser.add_argument("--bits", default=BITS, help="a weight, of mixed rows")
    parser.add_argument("--method", default="gptq", choices=("gptq", "rtn"))
    parser.add_argument("--rotate", action="store_true", help="turn the residual stream first (QuaRot)")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=64, help="that losses are measured on, and that are judged")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", default="")
    given = parser.parse_args(arguments)
    subject = Subject(given.model, given.device, rotate=given.rotate)
    schemes = [parse(name) for name in given.schemes.split(",")]
    calibrating, judged = (
        subject.tokens(path.read_text(errors="ignore"), given.length, given.windows)
        for path in (given.calibrate, given.text)
    )
    found = subject.measure(calibrating, schemes, given.method, print)
    columns = {w.shape[1] for w in subject.exact.values()}
    bits = {str(s): max(s.stored_bits(cols) for cols in columns) for s in schemes}
    wanted = [float(b) for b in given.bits.split(",")]
    result: dict[str, Any] = {
        "suite": "mxmoe",
        "machine": machine(given.device),
        "command": f"python -m tenfold.bench.mxmoe --schemes {given.schemes} --bits {given.bits} "
        f"--method {given.method} --length {given.length} --windows {given.windows}{' --rotate' * given.rotate}",
        "texts": [given.calibrate.name, given.text.name],
        "schemes": bits,
        "picks": {str(layer): own for layer, own in found.picks.items()},
    }
    middle = min(bits, key=lambda name: abs(bits[name] - wanted[0]))
    result["slopes"] = slope = slopes(subject, found, middle, calibrating[:16])
    result["rows"] = rows(subject, found, bits, wanted, judged, print, slope)
    if given.out:
        save(given.out, result, given.commit)


if __name__ == "__main__":
    main()
