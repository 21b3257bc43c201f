"""`tenfold quantize`: write a model whose experts have few bits, and say what became of them."""

from collections import Counter
from pathlib import Path

from tenfold.base.config import EngineConfig
from tenfold.engine.opened import pick_device
from tenfold.quantize.mxmoe.recipe import FILE, Recipe
from tenfold.quantize.mxmoe.run import Wish, quantize
from tenfold.quantize.mxmoe.subject import Progress
from tenfold.serve.cli.terminal import Bar, columns
from tenfold.weights.find import resolve
from tenfold.weights.open import open_checkpoint

COSTLY = 5  # blocks that are explained


def run(config: EngineConfig, text: Path, out: Path, wish: Wish, recipe: Path | None, as_json: bool) -> None:
    """Measure, decide, write, print."""
    bars: list[Bar] = []

    def progress(what: str) -> Progress:
        for bar in bars:
            bar.stop()
        bars.append(Bar(what))
        return bars[-1].update

    try:
        checkpoint, device = open_checkpoint(resolve(config.model)), str(pick_device(config.device))
        made = quantize(checkpoint, text, out, wish, recipe, device, progress)
    finally:
        for bar in bars:
            bar.stop()
    if as_json:
        print((out / FILE).read_text(encoding="utf-8"))
        return
    print(describe(made))
    print(f"saved in {out}; run it with: tenfold run --model {out}")


def describe(made: Recipe) -> str:
    """What blocks got, and why those that lose most did."""
    parts: dict[str, Counter[str]] = {}
    for block, scheme in made.schemes.items():
        parts.setdefault(block.rsplit(".", 1)[1], Counter())[scheme] += 1
    idle = sum(picks == 0 for own in made.picks.values() for picks in own)
    rows = [
        ("bits of a weight of experts", f"{made.bits:.3f}, scales and zeros included"),
        ("tokens measured", str(made.tokens)),
        *((part, ", ".join(f"{n} x {name}" for name, n in sorted(own.items()))) for part, own in parts.items()),
    ]
    if made.cost:
        rows.append(("time of a scheme", made.cost))
    if idle:
        rows.append(("experts never picked", f"{idle}; rounded by what others of their layer saw. More text may help"))
    worst = sorted(made.schemes, key=lambda block: -made.loss(block))[:COSTLY]
    return "\n".join([columns(rows), "The blocks that lose most:", *(f"  {made.why(block)}" for block in worst)])
