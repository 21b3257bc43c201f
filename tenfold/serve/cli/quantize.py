"""`tenfold quantize`: write a model of few bits, by the method that suits it, and say what became of it."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tenfold.base.config import EngineConfig
from tenfold.engine.opened import pick_device
from tenfold.models.table import model_config, sees
from tenfold.quantize.capture import spread
from tenfold.quantize.mbq import run as dense
from tenfold.quantize.mbq.compare import compare, told
from tenfold.quantize.mbq.data import Sample, mix_of, read_pairs
from tenfold.quantize.mbq.recipe import Recipe as Scaled
from tenfold.quantize.mbq.search import METHODS
from tenfold.quantize.mbq.subject import Subject
from tenfold.quantize.mxmoe.front import FILE as PICTURE
from tenfold.quantize.mxmoe.front import Corner, draw, drawable, relative, timed
from tenfold.quantize.mxmoe.recipe import FILE, Recipe
from tenfold.quantize.mxmoe.run import Wish, quantize
from tenfold.quantize.schemes import parse
from tenfold.serve.cli.calibrate import check_text
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
DENSE_BITS = 16.0  # of a weight: a budget that keeps no scheme away
# Options and what they are where they are not given: of experts in mixed bits, of one scheme, and of `Asked`.
MIXED = {
    **{"bits": None, "bytes": None, "schemes": "", "scope": "model", "r": 1.0, "tie": "block"},
    **{"rotate": False, "sensitivity": "", "tokens": 64},
}
SCALED = {"scheme": "w4g128z", "norm": "", "weigh": "", "propagate": None, "floor": "", "alpha": 0.5, "tower": ""}
WRITING = {"method": AUTO, "rounding": AUTO, "layout": "tenfold", "out": None, "recipe": None}
ON_TEXT = {"text": None, "window": 512, "windows": 64}
ON_PAIRS = {"data": None, "samples": 128}
JUDGING = {"held_out": None}
OF_KIND = {"alpha": "smooth", "norm": "search"}  # options of methods of one kind alone
Progress = Callable[[int, int], None]


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


@dataclass(frozen=True, slots=True)
class Kind:
    """What a run makes, the options that say something of it, and what to do where others were meant."""

    what: str
    own: Sequence[str]
    otherwise: str = ""

    def check(self, given: Sequence[str]) -> None:
        """Raises ValueError for options that say nothing of it."""
        names = [name for name in given if name not in self.own]
        if names:
            say, them = ("say", "them") if len(names) > 1 else ("says", "it")
            allowed = flags(name for name in self.own if name not in WRITING)
            raise ValueError(
                f"{flags(names)} {say} nothing of {self.what}; leave {them} out{self.otherwise}. Allowed: {allowed}."
            )


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
    uniform = method in UNIFORM and model_config(checkpoint.config).experts is not None
    kind_of(method, uniform, asked).check(given(asked, mixed, scaled))
    if asked.text is not None:
        check_text(asked.text)
    bars = Bars()
    try:
        if asked.compare:
            print(compared(checkpoint, device, asked, bars))
            return
        if asked.out is None:
            raise ValueError("--out is missing; name the folder to write, new or empty.")
        if method == EXPERTS:
            said = mixed_bits(checkpoint, device, asked, mixed_wish(asked, mixed), bars)
        elif uniform:
            said = mixed_bits(checkpoint, device, asked, uniform_wish(method, asked, scaled), bars)
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


def flags(names: Iterable[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)


def given(asked: Asked, mixed: Sequence[Any], scaled: Sequence[Any]) -> list[str]:
    """Options that differ from what they are where they are not given."""
    others = WRITING | ON_TEXT | ON_PAIRS | JUDGING
    values = dict(zip(MIXED, mixed, strict=True)) | dict(zip(SCALED, scaled, strict=True))
    values |= {name: getattr(asked, name) for name in others}
    return [name for name, usual in (MIXED | SCALED | others).items() if values[name] != usual]


def kind_of(method: str, uniform: bool, asked: Asked) -> Kind:
    """uniform: whether the method gives experts one scheme."""
    if asked.compare:
        return Kind("a comparison of methods", (*ON_PAIRS, *JUDGING))
    if method == EXPERTS:
        own = *WRITING, *ON_TEXT, *MIXED
        return Kind("experts in mixed bits", own, ", or take --method awq or rtn, for one scheme")
    if uniform:
        own = *WRITING, *ON_TEXT, "scheme"
        return Kind(f"experts in one scheme by {method}", own, ", or take --method mxmoe, for mixed bits")
    others = {name for name, kind in OF_KIND.items() if METHODS[method].kind != kind}
    on, source = ("a text", ON_TEXT) if asked.data is None else ("pairs", ON_PAIRS)
    return Kind(f"a dense model by {method} on {on}", (*WRITING, *source, *(n for n in SCALED if n not in others)))


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


def uniform_wish(method: str, asked: Asked, options: Sequence[Any]) -> Wish:
    """All experts in one scheme, by a method that has a rounding's name. Raises ValueError."""
    scheme, *_ = options
    if asked.rounding not in (AUTO, method):
        raise ValueError(
            f"rounding is {asked.rounding!r}, which {method} of a model with experts does not go with; leave it out, "
            "or take --method mxmoe."
        )
    check_followed(asked, {"--scheme": scheme != SCALED["scheme"]})
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
    """Lines; none where there was nothing to choose from. cost: where times are from."""
    if len(front) < 2:
        return []
    rows = [("bits", "size", "loss", "time" if timed(cost) else "bits read", "")]
    for corner, time in zip(front, relative(front)):
        numbers = f"{corner.bits:.3f}", size(corner.bytes), f"{corner.loss:.4g}", f"{time:.3f}x"
        rows.append((*numbers, "chosen" if corner.chosen else ""))
    return ["The front within the budget, no point of which any other beats:", columns(rows)]
