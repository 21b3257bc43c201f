"""`tenfold quantize`: write a model of few bits, by the method that suits it, and say what became of it."""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from tenfold.base.config import EngineConfig
from tenfold.engine.opened import pick_device
from tenfold.models.table import model_config, sees
from tenfold.quantize.mbq import run as dense
from tenfold.quantize.mbq.compare import compare, told
from tenfold.quantize.mbq.data import Sample, mix_of, read_pairs
from tenfold.quantize.mbq.recipe import Recipe as Scaled
from tenfold.quantize.mbq.search import METHODS
from tenfold.quantize.mbq.subject import Subject
from tenfold.quantize.mxmoe.front import FILE as PICTURE
from tenfold.quantize.mxmoe.front import Corner, draw, drawable, relative
from tenfold.quantize.mxmoe.recipe import FILE, Recipe
from tenfold.quantize.mxmoe.run import Wish, quantize
from tenfold.quantize.schemes import parse
from tenfold.serve.cli.terminal import Bar, columns, size
from tenfold.serve.pairs import Reader, of_text
from tenfold.weights.checkpoint import Checkpoint
from tenfold.weights.find import resolve
from tenfold.weights.open import open_checkpoint

COSTLY = 5  # blocks that are explained
HELD_OUT = 5  # every so many pairs, where none are given to judge on
AUTO, EXPERTS = "auto", "mxmoe"
UNIFORM = ("awq", "rtn")  # methods that are roundings of experts, too
BITS = 4.25  # of a weight of experts, where no budget is given
DECIDED = ("schemes", "scope", "tie", "r", "sensitivity", "tokens")  # by a recipe, of a wish for mixed bits
SCHEME = "w4g128z"  # where --scheme is not given
DENSE_BITS = 16.0  # of a weight: a budget that keeps no scheme away
Progress = Callable[[int, int], None]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Asked:
    """What the command was given beside the options of one method."""

    method: str
    rounding: str
    layout: str
    text: Path | None
    data: Path | None
    out: Path | None
    recipe: Path | None
    held_out: Path | None
    window: int
    windows: int
    samples: int
    compare: str
    as_json: bool


class Bars:
    """One bar after the other."""

    def __init__(self) -> None:
        self.shown: list[Bar] = []

    def __call__(self, what: str) -> Progress:
        self.stop()
        self.shown.append(Bar(what))
        return self.shown[-1].update

    def stop(self) -> None:
        for bar in self.shown:
            bar.stop()


def run(config: EngineConfig, asked: Asked, mixed: Sequence[Any], scaled: Sequence[Any]) -> None:
    """mixed, scaled: options of mxmoe, and of methods that scale dense models. Raises ValueError."""
    checkpoint, device = open_checkpoint(resolve(config.model)), str(pick_device(config.device))
    method = chosen(asked.method, checkpoint)
    bars = Bars()
    try:
        if asked.compare:
            print(compared(checkpoint, device, asked, bars))
            return
        if asked.out is None:
            raise ValueError("--out is missing; name the folder to write, new or empty.")
        if method == EXPERTS:
            said = mixed_bits(checkpoint, device, asked, mixed_wish(asked, mixed), bars)
        elif method in UNIFORM and model_config(checkpoint.config).experts is not None:
            said = mixed_bits(checkpoint, device, asked, uniform_wish(method, asked, scaled, mixed), bars)
        else:
            said = scaled_channels(checkpoint, device, method, asked, scaled, bars)
    finally:
        bars.stop()
    if asked.as_json:
        print((asked.out / FILE).read_text(encoding="utf-8"))
        return
    print(said)
    print(f"saved in {asked.out}; run it with: tenfold run --model {asked.out}")


def chosen(method: str, checkpoint: Checkpoint) -> str:
    """The method that was named, or the one that suits a model. Raises ValueError."""
    allowed = (EXPERTS, *METHODS)
    if method == AUTO:
        if model_config(checkpoint.config).experts is not None:
            return EXPERTS
        return "mbq" if sees(checkpoint.config) else "awq"
    if method not in allowed:
        raise ValueError(f"method is {method!r}; allowed: {', '.join((AUTO, *allowed))}.")
    return method


def mixed_bits(checkpoint: Checkpoint, device: str, asked: Asked, wish: Wish, bars: Bars) -> str:
    if asked.text is None:
        raise ValueError("--text is missing; experts are measured on a text, such as an encyclopedia's.")
    assert asked.out is not None
    made = quantize(checkpoint, asked.text, asked.out, wish, asked.recipe, device, bars)
    return "\n".join([describe(made), *drawn(made, asked.out)])


def drawn(made: Recipe, out: Path) -> list[str]:
    """The front as a picture beside the recipe, and a line that says where, or why there is none."""
    if len(made.front) < 2:
        return []
    if not drawable():
        return ["The front as a picture needs matplotlib; install it with: pip install 'tenfold[bench]'"]
    return [f"The front as a picture: {draw(made.front, made.cost, out.name, out / PICTURE)}"]


def mixed_wish(asked: Asked, options: Sequence[Any]) -> Wish:
    """Raises ValueError."""
    bits, most_bytes, *rest = options
    budget = [f"--{name}" for name, value in (("bits", bits), ("bytes", most_bytes)) if value is not None]
    if asked.recipe is not None and budget:
        raise ValueError(
            f"--recipe has a budget of its own, which {budget[0]} says nothing of; leave out {budget[0]} to follow "
            f"{asked.recipe}, or --recipe to measure and choose anew."
        )
    if len(budget) == 2:
        raise ValueError(f"--bits {bits:g} and --bytes {most_bytes} are two budgets; give one of both.")
    if most_bytes is not None:
        bits = 0.0
    schemes, scope, r, tie, rotate, sensitivity, tokens = rest
    rounding = "gptq" if asked.rounding == AUTO else asked.rounding
    shape = asked.window, asked.windows, tie, asked.layout, rotate, sensitivity, tokens
    wish = Wish(BITS if bits is None else bits, schemes, rounding, scope, r, *shape, most_bytes or 0)
    check_followed(asked, {f"--{name}": getattr(wish, name) != getattr(Wish(BITS), name) for name in DECIDED})
    return wish


def check_followed(asked: Asked, given: Mapping[str, bool]) -> None:
    """Raises ValueError where a recipe is followed and an option is given of what that has decided."""
    names = ", ".join(name for name, differs in given.items() if differs)
    if asked.recipe is not None and names:
        raise ValueError(
            f"--recipe has decided what {names} would; leave out {names} to follow {asked.recipe}, or --recipe to "
            "measure and choose anew."
        )


def uniform_wish(method: str, asked: Asked, options: Sequence[Any], mixed: Sequence[Any]) -> Wish:
    """All experts in one scheme, by a method that has a rounding's name. Raises ValueError for what is of no use."""
    scheme, norm, weigh, propagate, floor, _, tower = options
    bits, most_bytes, *_ = mixed
    if bits is not None or most_bytes is not None:
        raise ValueError(
            f"--bits and --bytes are budgets of --method mxmoe; {method} gives all experts --scheme {scheme}. Leave "
            "them out, or take that method."
        )
    if asked.rounding not in (AUTO, method):
        raise ValueError(
            f"rounding is {asked.rounding!r}, which {method} of a model with experts does not go with; leave it out, "
            "or take --method mxmoe."
        )
    names = {"norm": norm, "weigh": weigh, "propagate": propagate, "floor": floor, "tower": tower}
    unused = [f"--{name}" for name, value in names.items() if value not in ("", None)]
    if unused:
        raise ValueError(f"{', '.join(unused)} say nothing of a model with experts; leave them out.")
    check_followed(asked, {"--scheme": scheme != SCHEME})
    return Wish(
        DENSE_BITS, scheme, method, length=asked.window, windows=asked.windows, layout=asked.layout, sensitivity="layer"
    )


def scaled_channels(
    checkpoint: Checkpoint, device: str, method: str, asked: Asked, options: Sequence[Any], bars: Bars
) -> str:
    assert asked.out is not None
    wish = scaled_wish(method, asked, options)
    samples = calibration(checkpoint, asked, bars)
    return describe_scaled(dense.quantize(checkpoint, samples, asked.out, wish, asked.recipe, device, bars), samples)


def scaled_wish(method: str, asked: Asked, options: Sequence[Any]) -> dense.Wish:
    """Raises ValueError."""
    scheme, norm, weigh, propagate, floor, alpha, tower = options
    rounding = "rtn" if asked.rounding == AUTO else asked.rounding
    return dense.Wish(scheme, method, norm, weigh, propagate, floor, alpha, rounding, tower, asked.layout)


def calibration(checkpoint: Checkpoint, asked: Asked, bars: Bars) -> list[Sample]:
    """Samples of the pairs, or of the text. Raises ValueError where neither is given."""
    reader = Reader(checkpoint)
    if asked.data is not None:
        return reader.samples(spread(read_pairs(asked.data), asked.samples), bars("pairs"))
    if asked.text is None:
        wanted = (
            "--data, pairs of pictures and texts" if sees(checkpoint.config) else "--text, a text, or --data, pairs"
        )
        raise ValueError(f"There is nothing to calibrate on; give {wanted}.")
    found = of_text(asked.text.read_text(encoding="utf-8", errors="ignore"), reader, asked.window, asked.windows)
    if not found:
        raise ValueError(f"{asked.text} has fewer than {asked.window} tokens, one window; give more, or less --window.")
    return found


def spread(items: Sequence[T], most: int) -> list[T]:
    """At most so many, evenly from all. Raises ValueError."""
    if most < 1:
        raise ValueError(f"{most} samples were asked for; allowed: from 1.")
    count = min(most, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def compared(checkpoint: Checkpoint, device: str, asked: Asked, bars: Bars) -> str:
    """Methods side by side at equal bits, as a table or as JSON. Raises ValueError."""
    if asked.data is None:
        raise ValueError("--data is missing; --compare judges on pairs, in the same files or in those of --held-out.")
    pairs = read_pairs(asked.data)
    if asked.held_out is None:
        judged, pairs = pairs[::HELD_OUT], [pair for i, pair in enumerate(pairs) if i % HELD_OUT]
        if not pairs:
            raise ValueError(f"{asked.data} has one pair; give more, of which every fifth is held out, or --held-out.")
    else:
        judged = read_pairs(asked.held_out)
    reader = Reader(checkpoint)
    calibrating = reader.samples(spread(pairs, asked.samples), bars("pairs"))
    held = reader.samples(judged, bars("pairs held out"))
    bars.stop()
    mix_of(calibrating)
    longest = max(len(sample.tokens) for sample in (*calibrating, *held))
    subject = Subject(checkpoint, device, longest=longest)
    rows, _ = compare(subject, calibrating, held, [parse(name) for name in asked.compare.split(",")])
    if asked.as_json:
        return json.dumps([asdict(row) for row in rows], indent=1)
    return "\n".join([f"{mix_of(calibrating)}; judged on {len(held)} held out", *map(told, rows)])


def describe_scaled(made: Scaled, samples: Sequence[Sample]) -> str:
    """What was calibrated on, what a token of a picture counted, and what is out of balance."""
    rows = [("calibrated on", made.mix), *((name, str(value)) for name, value in made.settings.items() if value != "")]
    for part, own in made.magnitudes.items():
        ratio = [one.ratio for one in own]
        rows.append((f"a picture's token, {part}", f"{min(ratio):.3f} to {max(ratio):.3f} of an answer's"))
    return "\n".join([columns(rows), *(f"note: {sentence}" for sentence in mix_of(samples).warnings())])


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
    costly = ["The blocks that lose most:", *(f"  {made.why(block)}" for block in worst)]
    return "\n".join([columns(rows), *front_table(made.front, made.cost), *costly])


def front_table(front: Sequence[Corner], cost: str) -> list[str]:
    """Lines; none where there was nothing to choose from. cost: where times are from, empty for bits that are read."""
    if len(front) < 2:
        return []
    rows = [("bits", "size", "loss", "time" if cost else "bits read", "")]
    for corner, time in zip(front, relative(front)):
        numbers = f"{corner.bits:.3f}", size(corner.bytes), f"{corner.loss:.4g}", f"{time:.3f}x"
        rows.append((*numbers, "chosen" if corner.chosen else ""))
    return ["The front within the budget, no point of which any other beats:", columns(rows)]
