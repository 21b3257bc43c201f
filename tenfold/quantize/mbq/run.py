"""`tenfold quantize --method mbq|awq|smoothquant|rtn`: find scales on calibration samples, round, write the model.

Layer by layer: scales are searched on what the model as it is gives a layer, folded into what stands before, and the
layer is rounded and written as one file. Gradients and scales are kept in a file beside the folder to be written, so an
interrupted run goes on where it stopped.
"""

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tenfold.ops.formats import LOAD_COLS, Format, Packed
from tenfold.quantize.gptq import Moments
from tenfold.quantize.mbq import recipe as recipes
from tenfold.quantize.mbq.data import Sample, mix_of
from tenfold.quantize.mbq.fold import NAMES, NORMS, Folded, Scales, folded, names_of, swap_of
from tenfold.quantize.mbq.gradients import FLOORS, Directions, Kinds, Magnitude, directions, magnitudes, worths
from tenfold.quantize.mbq.recipe import FILE, Recipe
from tenfold.quantize.mbq.search import GROUPS, METHODS, Layer, Method, equalize
from tenfold.quantize.mbq.subject import Batch, Subject
from tenfold.quantize.mbq.trial import Swap
from tenfold.quantize.schemes import Scheme, format_of_scheme, grid_of, packed, parse, round_to_nearest
from tenfold.quantize.write import Folder, check_free, check_layout, config_of, tensors_of
from tenfold.weights import beside
from tenfold.weights.checkpoint import Checkpoint
from tenfold.weights.foreign import compressed, own
from tenfold.weights.hf import HFCheckpoint
from tenfold.weights.identity import identity
from tenfold.weights.load import SIGHT

ROUNDINGS = ("rtn", "gptq")
LAYOUTS = (own.METHOD, compressed.METHOD)
PLACE = ("device", "dtype")  # of a search; its recipe may be followed in another
TOWER = re.compile(re.escape(SIGHT[0]) + r"(?:.*\.)?\d+\..*\.weight")  # matrices of a tower's blocks
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Wish:
    """scheme: of every matrix of the text part's layers; method: one of METHODS; norm, weigh, propagate: see `Method`,
    empty and None for the method's own, all tokens alike where the norm is fisher; floor: of what a kind of token
    counts; alpha: of smoothquant; rounding: to nearest as published, or by GPTQ with the same token weights; tower:
    scheme of what looks at pictures, empty to leave it; layout: of the files.
    """

    scheme: str
    method: str = "mbq"
    norm: str = ""
    weigh: str = ""
    propagate: bool | None = None
    floor: str = ""
    alpha: float = 0.5
    rounding: str = "rtn"
    tower: str = ""
    layout: str = own.METHOD

    def __post_init__(self) -> None:
        for name, allowed in (
            *(("method", tuple(METHODS)), ("floor", ("", *FLOORS)), ("rounding", ROUNDINGS)),
            ("layout", LAYOUTS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed: {', '.join(filter(None, allowed))}.")

    def resolved(self) -> Method:
        """Raises ValueError."""
        base = METHODS[self.method]
        return replace(
            base,
            norm=self.norm or base.norm,
            weigh=self.weigh or ("alike" if self.norm == "fisher" else base.weigh),
            propagate=base.propagate if self.propagate is None else self.propagate,
            alpha=self.alpha,
        )

    def settings(self) -> dict[str, Any]:
        """What a recipe is for; the layout is not of it."""
        method = self.resolved()
        return {
            "scheme": str(parse(self.scheme)),
            "method": self.method,
            "norm": method.norm,
            "weigh": method.weigh,
            "propagate": method.propagate,
            "floor": self.floor,
            "alpha": method.alpha,
            "rounding": self.rounding,
            "tower": self.tower and str(parse(self.tower)),
        }


def quantize(
    checkpoint: Checkpoint,
    samples: Sequence[Sample],
    out: Path,
    wish: Wish,
    recipe: Path | None = None,
    device: str = "cpu",
    progress: Callable[[str], Progress] = lambda _: lambda done, total: None,
) -> Recipe:
    """The model in `out`. recipe: whose scales to take instead of searching. progress(what) is given what a pass is
    called.

    Raises ValueError for a model with experts or already quantised, samples that say too little, a scheme that the
    files cannot hold, another model's recipe and a folder that holds something; OSError.
    """
    check_free(out)
    source = config_of(checkpoint)
    assert isinstance(checkpoint, HFCheckpoint)
    scheme, method, mix = parse(wish.scheme), wish.resolved(), mix_of(samples)
    longest = max(len(sample.tokens) for sample in samples)
    subject = Subject(checkpoint, device, torch.float32 if device == "cpu" else torch.bfloat16, longest)
    check_scheme(subject, scheme, wish)
    check_tower(checkpoint, wish)
    batches = subject.batches(samples)
    digest = recipes.digest_of(samples)
    made = Recipe(identity(checkpoint), digest, wish.settings() | place_of(subject), str(mix))
    made = followed(recipe, made) if recipe is not None else resumed(partial(out), made)
    if not made.magnitudes and needs_gradients(method, samples):
        made.magnitudes = magnitudes(subject, batches, progress("gradients"))
        beside.write(partial(out), json.dumps(made.content()).encode())
    searching = method.norm == "fisher" and len(made.scales) < subject.layers
    towards = directions(subject, batches, progress("directions")) if searching else None
    writer = Writer(subject, checkpoint, wish, made, batches, out, towards)
    with Folder(out) as folder:
        told = progress(f"{wish.method}, layers")

        def visit(layer: int, states: Sequence[Tensor]) -> dict[int, Swap]:
            tensors, rounded = writer.layer(layer, states)
            folder.add(tensors)
            told(layer + 1, subject.layers)
            return rounded if method.propagate else {}

        subject.walk(batches, visit)
        folder.add(writer.tower())
        rest = writer.rest()
        folder.add(rest)
        source["quantization_config"] = writer.config(rest)
        folder.finish(source, checkpoint.path, {FILE: made.content()})
    partial(out).unlink(missing_ok=True)
    return made


def needs_gradients(method: Method, samples: Sequence[Sample]) -> bool:
    """Where tokens that differ in what they are worth meet."""
    if method.weigh == "answers":
        return any(sample.pictures for sample in samples)
    return method.weigh != "alike"


def partial(out: Path) -> Path:
    return out.with_name(f".{out.name}.scales.json")


def resumed(place: Path, new: Recipe) -> Recipe:
    """What an interrupted run of the same left; anything else is passed over."""
    try:
        found = recipes.load(place)
    except (OSError, ValueError):
        return new
    return found if found.key == new.key else new


def place_of(subject: Subject) -> dict[str, str]:
    """Where scales are found, by the names of PLACE."""
    found = subject.kernels.device.type, str(subject.kernels.dtype).removeprefix("torch.")
    return dict(zip(PLACE, found))


def followed(path: Path, new: Recipe) -> Recipe:
    """Raises ValueError for a recipe of another model, other data, or another wish."""
    found = recipes.load(path)
    if found.model != new.model:
        raise ValueError(f"{path} is of another model; a recipe serves the model that it was made from alone.")
    if found.data != new.data:
        raise ValueError(f"{path} was made with other samples; give the same here.")
    for name, value in new.settings.items():
        if name not in PLACE and found.settings.get(name) != value:
            raise ValueError(
                f"{path} has {name} {found.settings.get(name)!r}, and {value!r} was asked for; ask for the same."
            )
    return found


def check_scheme(subject: Subject, scheme: Scheme, wish: Wish) -> None:
    """Raises ValueError where files or matrices do not take a scheme."""
    check_layout(wish.layout, scheme)
    format = format_of_scheme(scheme)
    for part in NAMES:
        cols = subject.linear(0, part).weight.cols
        why = format.obstacle(cols)
        if not why and cols % (scheme.group or cols):
            why = f"{cols} columns are no multiple of the group, {scheme.group}"
        if why:
            raise ValueError(
                f"The matrices of {part} cannot be stored as {format.name}: {why}. Take another group, or 4 or 8 bits, "
                "such as w4g64z or w4g32z."
            )


def check_tower(checkpoint: Checkpoint, wish: Wish) -> None:
    """Raises ValueError where files do not take the scheme, or nothing of a tower could be stored."""
    if wish.tower:
        check_layout(wish.layout, parse(wish.tower))
    if wish.tower and not tower_names(checkpoint, parse(wish.tower)):
        raise ValueError(
            f"{checkpoint.path} has no tower whose matrices can be stored as {parse(wish.tower)}; take w8a8, or leave "
            "the tower as it is."
        )


def tower_names(checkpoint: Checkpoint, scheme: Scheme) -> list[str]:
    """Matrices of a tower's blocks, but for those whose columns the format or blocks of the CPU kernels cannot hold."""
    format, multiple = format_of_scheme(scheme), math.lcm(LOAD_COLS, scheme.group or 1)
    found = []
    for name in filter(TOWER.fullmatch, sorted(checkpoint.names())):
        shape = checkpoint.tensor(name).shape
        if len(shape) == 2 and shape[1] % multiple == 0 and not format.obstacle(shape[1]):
            found.append(name)
    return found


class Writer:
    """Makes the tensors of a folder, under the names that the source's files have."""

    def __init__(
        self,
        subject: Subject,
        source: HFCheckpoint,
        wish: Wish,
        made: Recipe,
        batches: Sequence[Batch],
        out: Path,
        towards: Directions | None,
    ) -> None:
        self.subject, self.source, self.wish, self.made, self.batches = subject, source, wish, made, batches
        self.towards = towards
        self.scheme, self.method = parse(wish.scheme), wish.resolved()
        self.place = partial(out)
        self.worths = worths(made.magnitudes, self.method.weigh, wish.floor)
        self.formats: dict[str, Format] = {}  # by our names of modules
        self.taken: set[str] = set()  # tensors that are written already, or in another form

    def worth(self, number: int) -> dict[str, Kinds]:
        """Of tokens in one layer, by its part."""
        if self.worths:
            return {part: own[number] for part, own in self.worths.items()}
        plain = Magnitude(Kinds(1.0, 1.0, 1.0, 1.0), Kinds(1.0, 1.0, 1.0, 1.0))
        return dict.fromkeys(GROUPS.values(), plain.worth(self.method.weigh))

    def layer(self, number: int, states: Sequence[Tensor]) -> tuple[dict[str, Tensor], dict[int, Swap]]:
        """Tensors to be written, and the matrices as they are then."""
        layer, worth = Layer(self.subject, number, self.batches, states, self.towards), self.worth(number)
        if number not in self.made.scales:
            scales, losses = equalize(layer, self.scheme, self.method, worth)
            self.made.scales[number] = {part: s.cpu() for part, s in scales.items()}
            self.made.losses[number] = losses
            beside.write(self.place, json.dumps(self.made.content()).encode())
        device = self.subject.kernels.device
        own_scales = {part: s.to(device) for part, s in self.made.scales[number].items()}
        moments = self.moments(layer, own_scales, worth) if self.wish.rounding == "gptq" else {}
        tensors: dict[str, Tensor] = {}
        swaps: dict[int, Swap] = {}
        for part in NAMES:
            own_part = folded(self.subject, number, part, own_scales)
            rounded, grid = own_part.rounded(self.scheme, moments.get(part))
            tensors |= self.part(number, part, own_part, packed(rounded, grid))
            matrix = self.subject.linear(number, part).weight
            swaps[id(matrix)] = swap_of(self.subject, own_part, rounded, self.scheme)
        return tensors, swaps

    def moments(self, layer: Layer, scales: Scales, worth: dict[str, Kinds]) -> dict[str, Tensor]:
        """Of the inputs of each matrix as they are once scales are folded in, tokens weighed as in the search."""
        found = {}
        middle = layer.middle()
        for part, side in GROUPS.items():
            inputs = layer.inputs(part, layer.states if side == "attention" else middle)
            sums = Moments(inputs[0].shape[1], inputs[0].device)
            for x, batch in zip(inputs, self.batches):
                sums.add(x / scales[part] if part in scales else x, worth[side].weights(batch))
            found[part] = sums.mean()
        return found

    def part(self, number: int, part: str, own_part: Folded, held: Packed) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        at = 0
        for name in names_of(self.subject, number, part):
            rows = self.source.tensor(f"{name}.weight").shape[0]
            place = slice(at, at + rows)
            tensors |= self.stored(name, self.scheme, held.rows(place))
            if own_part.bias is not None and self.subject.weights.has(f"{name}.bias"):
                tensors[self.named(f"{name}.bias")] = own_part.bias[place]
            at += rows
        if own_part.by is not None:  # kept in float32, so that no scale is rounded
            norm = f"model.layers.{number}.{NORMS[part]}.weight"
            stored = self.source.tensor(norm).data.float().to(own_part.by.device)
            tensors[self.named(norm)] = stored / own_part.by
        return tensors

    def stored(self, module: str, scheme: Scheme, held: Packed) -> dict[str, Tensor]:
        self.formats[module] = format = format_of_scheme(scheme)
        name = self.named(f"{module}.weight").removesuffix(".weight")
        return tensors_of(self.wish.layout, name, format, held)

    def named(self, name: str) -> str:
        self.taken.add(name)
        return self.source.stored_name(name)

    def tower(self) -> dict[str, Tensor]:
        """Matrices of the tower's blocks to nearest, where that was wished."""
        tensors: dict[str, Tensor] = {}
        if self.wish.tower:
            scheme = parse(self.wish.tower)
            for name in tower_names(self.source, scheme):
                w = self.source.tensor(name).data.float()
                tensors |= self.stored(
                    name.removesuffix(".weight"), scheme, packed(round_to_nearest(w, scheme), grid_of(w, scheme))
                )
        return tensors

    def rest(self) -> dict[str, Tensor]:
        """Everything else as it is."""
        return {
            self.source.stored_name(n): self.source.tensor(n).data for n in self.source.names() if n not in self.taken
        }

    def config(self, rest: dict[str, Tensor]) -> dict[str, Any]:
        if self.wish.layout == own.METHOD:
            told = {"model": self.made.model, "text": self.made.data, "recipe": self.made.digest()}
            return own.settings_of(self.formats) | told
        formats = {self.source.stored_name(f"{m}.weight").removesuffix(".weight"): f for m, f in self.formats.items()}
        matrices = (n for n, t in rest.items() if n.endswith(".weight") and t.dim() == 2)
        return compressed.settings_of(formats, [n.removesuffix(".weight") for n in matrices])
