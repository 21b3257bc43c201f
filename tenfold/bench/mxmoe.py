"""What experts of few bits cost in quality, mixed and uniform: `tenfold bench mxmoe --model MODEL ...`.

Weights of experts are rounded and put back in place of the exact ones, so any bits can be judged on any device; all
else of the model stays exact. Uniform rows have one scheme everywhere; mixed ones are what the allocator makes of as
many bits, of blocks (`block`) and of whole experts (`expert`), within each layer or over the model. Losses are measured
on one text; perplexity, and how far the next tokens' distributions are from the exact model's, on another.

    tenfold bench mxmoe --model moe --calibrate a.txt --text b.txt --bits 2.25,3.25 --out mxmoe.json --picture bits.png
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from tenfold.bench import plots, report
from tenfold.bench.command import again, save
from tenfold.bench.hardware import machine
from tenfold.quantize.mxmoe.allocate import BudgetError
from tenfold.quantize.mxmoe.sensitivity import PARTS
from tenfold.quantize.mxmoe.subject import (
    ENDED,
    METHODS,
    End,
    Key,
    Rounded,
    Subject,
    chosen,
    middle,
    mixed,
    name_of,
    spread,
)
from tenfold.quantize.rotate import Rotated
from tenfold.quantize.schemes import parse
from tenfold.weights.find import resolve
from tenfold.weights.open import open_checkpoint

SCHEMES = "w1g128z,w2g128z,w3g128z,w4g128z,w8g128z"
BITS = "2.25,2.75,3.25,4.25"


def rows(
    subject: Subject,
    found: Rounded,
    bits: Mapping[str, float],
    wanted: Sequence[float],
    judged: Sequence[Sequence[int]],
    say: Callable[[str], None],
    slope: Mapping[int, float] | None = None,
) -> list[dict[str, Any]]:
    """Perplexity of everything exact, uniform and mixed, and divergence from the exact model; with slopes of layers, of
    losses in the end too.
    """
    made: list[dict[str, Any]] = []
    end = End(subject, judged)

    def add(kind: str, average: float, weights: Mapping[Key, Tensor], **more: Any) -> None:
        subject.put(weights)
        perplexity, divergence = end.judge()
        made.append({"kind": kind, "bits": average, "perplexity": perplexity, "divergence": divergence} | more)
        subject.put({})
        say(f"{kind:28} {average:6.3f} bits  perplexity {perplexity:.3f}  divergence {divergence:.5f}")

    add("exact", 16.0, {})
    every = sum(found.sizes.values())
    for name, each in bits.items():
        add(f"uniform {name}", each, chosen(found, {name_of(key): name for key in found.sizes}))
    for budget in wanted:
        for scope, tie, norm, weights in (
            ("layer", "block", True, None),
            ("layer", "block", False, None),
            ("layer", "expert", False, None),
            ("model", "block", False, None),
            *((("model", tie, False, slope) for tie in ("block", "expert")) if slope else ()),
        ):
            try:
                plan = mixed(found, bits, budget, scope, tie, norm, 1.0, weights)
            except BudgetError as error:
                say(str(error))
                continue
            share = {name: sum(s == name for s in plan.schemes.values()) for name in bits}
            kind = f"mixed {scope} {tie}{' norm' * norm}{' end' * bool(weights)}"
            add(kind, 8 * sum(plan.bytes.values()) / every, chosen(found, plan.schemes), schemes=share, loss=plan.loss)
    return made


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tenfold bench mxmoe", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibrate", type=Path, required=True, help="text that losses are measured on")
    parser.add_argument("--text", type=Path, required=True, help="text that is judged")
    parser.add_argument("--schemes", default=SCHEMES, help="that blocks may get, and that uniform rows have")
    parser.add_argument("--bits", default=BITS, help="a weight, of mixed rows")
    parser.add_argument("--method", default="gptq", choices=METHODS)
    parser.add_argument("--rotate", action="store_true", help="turn the residual stream first (QuaRot)")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=64, help="that losses are measured on")
    parser.add_argument("--judged", type=int, default=64, help="windows that are judged")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="file of the result")
    parser.add_argument("--picture", type=Path, help="PNG of quality over bits; needs matplotlib")
    parser.add_argument("--commit", default="")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser()
    given = parser.parse_args(arguments)
    if given.picture:
        plots.pyplot()  # it says what is missing before anything is measured
    source = open_checkpoint(resolve(given.model))
    subject = Subject(Rotated(source) if given.rotate else source, given.device)
    schemes = [parse(name) for name in given.schemes.split(",")]
    calibrating, judged = (
        subject.tokens(path.read_text(errors="ignore"), given.length, windows)
        for path, windows in ((given.calibrate, given.windows), (given.text, given.judged))
    )
    end = End(subject, spread(calibrating, ENDED))
    found, count = Rounded(), sum(map(len, calibrating))
    for layer in subject.measure(found, calibrating, dict.fromkeys(PARTS, schemes), given.method):
        picks = found.picks[layer]
        print(f"layer {layer}: {count} tokens, {min(picks)} to {max(picks)} of them for an expert")
    bits = {str(s): subject.bits(s) for s in schemes}
    wanted = [float(b) for b in given.bits.split(",")]
    result: dict[str, Any] = {
        "suite": "mxmoe",
        "machine": machine(given.device),
        "command": again(parser, given),
        "model": Path(given.model).name,
        "method": given.method,
        "texts": [given.calibrate.name, given.text.name],
        "schemes": bits,
        "picks": {str(layer): own for layer, own in found.picks.items()},
    }
    between = dict.fromkeys(PARTS, middle(bits, wanted[0]))
    result["slopes"] = slope = {layer: end.slope(found, layer, between) for layer in found.picks}
    result["rows"] = rows(subject, found, bits, wanted, judged, print, slope)
    if given.out:
        save(given.out, result, given.commit)
    print(report.mxmoe_table(result))
    if given.picture:
        print(f"wrote {plots.mxmoe(result, given.picture)}")


if __name__ == "__main__":
    main()
