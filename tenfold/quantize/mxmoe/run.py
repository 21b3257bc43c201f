"""`tenfold quantize`: measure a model's experts on a text, choose a scheme for every block, write the model.

Two passes over the text, layer by layer: one measures what every scheme costs every block, and what it found is kept in
a file beside the folder to be written, so an interrupted run goes on where it stopped; the other rounds each block as
was chosen, and writes a layer's experts as one file.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from math import ceil, inf
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tenfold.models.config import ModelConfig
from tenfold.ops.formats import Format, Packed
from tenfold.quantize.awq import behind_norm, of_strength, scaled
from tenfold.quantize.capture import TextTooShort, spread, watched
from tenfold.quantize.mxmoe.allocate import ROUNDED, Block, BudgetError, Plan
from tenfold.quantize.mxmoe.cost import fastest, launches, shapes
from tenfold.quantize.mxmoe.front import READ, corners
from tenfold.quantize.mxmoe.recipe import FILE, Recipe, load
from tenfold.quantize.mxmoe.sensitivity import PARTS
from tenfold.quantize.mxmoe.subject import (
    ENDED,
    LONGEST,
    METHODS,
    TIES,
    End,
    Key,
    Progress,
    Rounded,
    Steps,
    Subject,
    average,
    blocks_of,
    middle,
    mixed_front,
    moments_of,
    name_of,
    rounded,
    roundings,
    solved,
)
from tenfold.quantize.rotate import Rotated, check_family
from tenfold.quantize.schemes import Scheme, format_of_scheme, grid_of, packed, parse
from tenfold.quantize.write import Folder, check_free, check_layout, config_of, tensors_of
from tenfold.weights import beside
from tenfold.weights.checkpoint import Checkpoint
from tenfold.weights.foreign import compressed, own
from tenfold.weights.identity import identity
from tenfold.weights.load import TABLE

# By layout of the files: our own, and compressed-tensors with what other engines read of it.
SCHEMES = {own.METHOD: "w2g128z,w3g128z,w4g128z,w8g128z", compressed.METHOD: "w4g128,w8g128"}
SCOPES = ("layer", "model")
SENSITIVITIES = ("layer", "end")


@dataclass(frozen=True, slots=True)
class Wish:
    """bits: of a weight of experts, scales and zeros included; bytes: of all experts, and then bits are 0; schemes:
    names that blocks may get, empty for those of the layout; scope: whether each layer keeps to that many bits or the
    model as a whole; tie: what has one scheme; r: how much accuracy counts against speed, 0 to 1, and tokens: of the
    steps whose speed that is; length, windows: of the text's sequences, in tokens, and their number; layout: of the
    files that are written; rotate: turn the residual stream first; sensitivity: losses as each layer's output changes,
    or weighed by what that costs at the model's end; empty for the end where layers share bits.
    """

    bits: float
    schemes: str = ""
    rounding: str = "gptq"
    scope: str = "model"
    r: float = 1.0
    length: int = 512
    windows: int = 64
    tie: str = "block"
    layout: str = own.METHOD
    rotate: bool = False
    sensitivity: str = ""
    tokens: int = 64
    bytes: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.bits < inf or self.bytes < 0:
            raise ValueError(
                f"The budget is {self.bytes or self.bits} {'bytes' if self.bytes else 'bits a weight'}; allowed: a "
                "number above 0, such as 4.25 bits."
            )
        if bool(self.bits) == bool(self.bytes):
            raise ValueError(
                f"The budget is {self.bits:g} bits a weight and {self.bytes} bytes; give one of both, above 0."
            )
        known = {"rounding": METHODS, "scope": SCOPES, "tie": TIES, "layout": SCHEMES}
        for name, allowed in (known | {"sensitivity": ("", *SENSITIVITIES)}).items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed: {', '.join(filter(None, allowed))}.")
        if not 2 <= self.length <= LONGEST or self.windows < 1:
            raise ValueError(
                f"{self.windows} windows of {self.length} tokens were asked for; allowed: from 1, of 2 to {LONGEST}."
            )
        if self.tokens < 1:
            raise ValueError(f"tokens is {self.tokens}; allowed: from 1, those of a step whose time counts.")
        if not 0 <= self.r <= 1:
            raise ValueError(f"r is {self.r}; allowed: 0 (speed alone) to 1 (accuracy alone).")
        if self.sensitivity == "end" and self.scope == "layer":
            raise ValueError(
                "sensitivity is 'end', which tells layers apart, and scope is 'layer', where each has its own bits; "
                "take the scope model, or the sensitivity layer."
            )

    @property
    def to_the_end(self) -> bool:
        """Whether losses are weighed by what they cost at the model's end."""
        return self.scope == "model" and self.sensitivity != "layer"

    def parsed(self) -> list[Scheme]:
        """Raises ValueError for schemes that cannot be stored, and for activations of 8 bits that none takes."""
        found = [parse(name.strip()) for name in (self.schemes or SCHEMES[self.layout]).split(",")]
        for scheme in found:
            check_layout(self.layout, scheme)
            if scheme.activations == 8 and not scheme.eights:
                plain = replace(scheme, activations=16)
                raise ValueError(
                    f"{scheme} asks for activations of 8 bits, which experts are multiplied by as fp8 or as codes of 4 "
                    f"bits without zeros; take fp8a8, w4g128a8, or {plain} for activations of 16 bits."
                )
        return found


def quantize(
    checkpoint: Checkpoint,
    text: Path,
    out: Path,
    wish: Wish,
    recipe: Path | None = None,
    device: str = "cpu",
    progress: Callable[[str], Progress] = lambda _: lambda done, total: None,
) -> Recipe:
    """The model in `out`. recipe: what to follow instead of measuring. progress(what) is given what a pass is called.

    Raises ValueError for a model without experts or already quantised, a text too short, a budget below the smallest
    schemes, another model's recipe and a folder that holds something; OSError.
    """
    check_installed()
    check_free(out)
    source = config_of(checkpoint)
    if wish.rounding == "awq":
        check_family(checkpoint, "scaled as awq does it")
    model = identity(checkpoint)
    content = text.read_bytes()
    turned = Rotated(checkpoint) if wish.rotate else checkpoint
    subject = Subject(turned, device, torch.float32 if device == "cpu" else torch.bfloat16)
    allowed = allowed_schemes(subject, wish.parsed(), wish.tie) if recipe is None else {}
    windows = subject.tokens(content.decode("utf-8", "ignore"), wish.length, wish.windows)
    if not windows:
        raise TextTooShort(
            f"{text} has fewer than {wish.length} tokens, one window; give more text or a shorter window."
        )
    digest, tokens = hashlib.sha256(content).hexdigest(), sum(map(len, windows))
    if recipe is None:
        wish = replace(wish, bits=bits_within(subject, allowed, wish), bytes=0)
        found, slope = measured(subject, windows, allowed, wish, out, f"{model} {digest}", progress("measuring"))
        blocks, cost = weighed(found, wish, slope, subject.model.config, device)
        plan, *front = mixed_front(blocks, wish.bits, wish.tie, wish.r)
        made = recipe_of(found, plan, model, digest, tokens, wish, slope)
        made = replace(made, cost=cost, front=corners(front, plan, sum(found.sizes.values())))
    else:
        made = followed(recipe, subject, wish, model, digest, tokens)
    with Folder(out) as folder:
        formats, by = write_experts(subject, windows, made, wish.layout, folder, progress("writing"))
        dense = write_rest(subject, checkpoint, folder, by)
        source["quantization_config"] = settings_of(wish.layout, formats, dense, made)
        if wish.rotate:
            source["tie_word_embeddings"] = False
        folder.finish(source, checkpoint.path, {FILE: made.content()})
    partial(out).unlink(missing_ok=True)
    return made


def followed(path: Path, subject: Subject, wish: Wish, model: str, text: str, tokens: int) -> Recipe:
    """The recipe of a file. Raises ValueError for one of another model, another text or another wish; OSError."""
    made = load(path, model)
    if (made.text, made.tokens) != (text, tokens):
        raise ValueError(f"{path} was made with another text or other windows of it; give the same here.")
    if made.rounding != wish.rounding:
        raise ValueError(f"{path} is for the rounding {made.rounding}; ask for the same here.")
    if made.rotated != wish.rotate:
        raise ValueError(f"{path} is for a model {'' if made.rotated else 'not '}rotated; ask for the same here.")
    for name in set(made.schemes.values()):
        check_layout(wish.layout, parse(name))
    if set(made.schemes) != {name_of(key) for key in subject.blocks}:
        raise ValueError(f"{path} does not name a scheme for every block of the model; it is damaged.")
    return made


def check_installed() -> None:
    """Raises ImportError."""
    missing = [name for name in ("scipy", "safetensors") if find_spec(name) is None]
    if missing:
        raise ImportError(
            f'Quantising needs {" and ".join(missing)}, not installed here; run: pip install "tenfold[quantize]"'
        )


def together(tie: str) -> list[tuple[str, ...]]:
    """Parts of an expert that have one scheme."""
    return [(part,) for part in PARTS] if tie == "block" else [PARTS]


def allowed_schemes(subject: Subject, schemes: Sequence[Scheme], tie: str) -> dict[str, list[Scheme]]:
    """Those whose format holds the columns of each part, and of all that have one scheme with it. Raises ValueError
    where a part is left with none.
    """
    found: dict[str, list[Scheme]] = {}
    for parts in together(tie):
        columns = [subject.cols[part] for part in parts]
        fits = [
            s
            for s in schemes
            if not any(format_of_scheme(s).obstacle(cols) or cols % (s.group or cols) for cols in columns)
        ]
        if not fits:
            raise ValueError(
                f"None of {', '.join(map(str, schemes))} fits the {' and '.join(map(str, columns))} columns of "
                f"{' and '.join(parts)}; add schemes of smaller groups, such as w4g32z."
            )
        found |= dict.fromkeys(parts, fits)
    return found


def bits_within(subject: Subject, allowed: Mapping[str, Sequence[Scheme]], wish: Wish) -> float:
    """Of a weight, under the wish's budget; before anything is measured. Raises BudgetError."""
    sizes = {part: sum(size for key, size in subject.sizes.items() if key[2] == part) for part in PARTS}
    weights, least = sum(sizes.values()), 0.0
    for parts in together(wish.tie):
        taken = (sum(sizes[p] * s.stored_bits(subject.cols[p]) for p in parts) for s in allowed[parts[0]])
        least += min(taken) / weights
    bits = 8 * wish.bytes / weights if wish.bytes else wish.bits
    if not bits >= least * (1 - ROUNDED):
        asked = f"{wish.bytes} bytes" if wish.bytes else f"{bits:g} bits a weight"
        smallest = str(ceil(least * weights / 8)) if wish.bytes else f"{ceil(1000 * least * (1 - ROUNDED)) / 1000:.3f}"
        raise BudgetError(
            f"{asked} were asked for and the smallest schemes take {smallest}, scales and zeros "
            "included; allow that much, or add a scheme of fewer bits."
        )
    return bits


def measured(
    subject: Subject,
    windows: Sequence[list[int]],
    allowed: Mapping[str, Sequence[Scheme]],
    wish: Wish,
    out: Path,
    subjects: str,
    progress: Progress,
) -> tuple[Rounded, dict[int, float]]:
    """Losses of every block and, where the wish asks for them, slopes of layers; of layers that an interrupted run
    measured as it left them.
    """
    names = {part: list(map(str, schemes)) for part, schemes in allowed.items()}
    between = middles(subject, allowed, wish.bits) if wish.to_the_end else {}
    ended = spread(windows, ENDED) if between else []
    about = wish.bits if wish.rounding == "awq" else 0.0
    asked = [names, wish.rounding, wish.length, wish.windows, wish.rotate, between, about]
    key = json.dumps([subjects, *asked, subject.kernels.device.type, str(subject.kernels.dtype)])
    place = partial(out)
    found, slope = resumed(place, key, subject)
    layers = subject.model.config.layers
    whole = len(ended) * layers  # windows through layers, to see what rounding a layer costs at the end
    count = layers * len(windows) + len(subject.blocks) // len(PARTS) * roundings(allowed)
    steps = Steps(progress, count + whole * (1 + len(subject.layers)))
    end = End(subject, ended) if between else None
    steps.add(whole * (1 + len(slope)))
    kept = set(between.values())
    for layer in subject.measure(found, windows, allowed, wish.rounding, kept, steps, wish.bits):
        if end is not None:
            slope[layer] = end.slope(found, layer, between)
            found.weights.clear()
            steps.add(whole)
        state = {
            "key": key,
            "picks": {str(layer): picks for layer, picks in found.picks.items()},
            "losses": [[*block, name, loss] for (block, name), loss in found.losses.items()],
            "slope": {str(layer): value for layer, value in slope.items()},
            "strengths": {str(layer): value for layer, value in found.strengths.items()},
        }
        beside.write(place, json.dumps(state).encode())
    return found, slope


def weighed(
    found: Rounded, wish: Wish, slope: Mapping[int, float], config: ModelConfig, device: str
) -> tuple[list[Block], str]:
    """Blocks with losses and times, and where the times are from: of all shapes of tiles that some scheme is the
    fastest with, those of the one whose best plan is the best, with its launches as long as dealing out tiles takes.
    """

    def blocks_with(times: Mapping[tuple[Key, str], float] | None = None) -> list[Block]:
        return blocks_of(found, [str(s) for s in schemes], wish.scope, False, slope, times)

    schemes = wish.parsed()
    known, cost = shapes(config, schemes, wish.tokens, device) if wish.r < 1 else ([], "")
    own = launches(config, wish.tokens, found.picks)
    tried = []
    for shape in fastest(known, own):
        with suppress(ValueError):  # not all that the budget asks for can have such tiles
            blocks = blocks_with(own.times(shape))
            plan = solved(blocks, wish.bits, wish.tie, wish.r)
            timed = replace(plan, time=own.time(shape, plan.schemes))
            tried.append((timed.goal(wish.r), blocks, f"{cost}, in {shape}"))
    if not tried:
        return blocks_with(), f"{READ}, since no tiles hold schemes of that few bits" if known else cost
    _, blocks, cost = min(tried, key=lambda each: each[0])
    return blocks, cost


def middles(subject: Subject, allowed: Mapping[str, Sequence[Scheme]], bits: float) -> dict[str, str]:
    """By part, the scheme that a layer is rounded to for its slope."""
    cols = subject.cols
    return {part: middle({str(s): s.stored_bits(cols[part]) for s in own}, bits) for part, own in allowed.items()}


def partial(out: Path) -> Path:
    return out.with_name(f".{out.name}.measured.json")


def resumed(place: Path, key: str, subject: Subject) -> tuple[Rounded, dict[int, float]]:
    """What a run with the same key left; nothing where there is anything else."""
    try:
        state = json.loads(place.read_text(encoding="utf-8"))
        if state["key"] != key:
            return Rounded(), {}
        losses = {((int(layer), int(e), part), name): float(x) for layer, e, part, name, x in state["losses"]}
        picks = {int(layer): list(own) for layer, own in state["picks"].items()}
        slope, strengths = (
            {int(layer): float(x) for layer, x in state[name].items()} for name in ("slope", "strengths")
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return Rounded(), {}
    sizes = {key: size for key, size in subject.sizes.items() if key[0] in picks}
    return Rounded({}, losses, sizes, picks, strengths), slope


def recipe_of(
    found: Rounded, plan: Plan, model: str, text: str, tokens: int, wish: Wish, slope: Mapping[int, float]
) -> Recipe:
    losses: dict[str, dict[str, float]] = {}
    for (key, name), loss in found.losses.items():
        losses.setdefault(name_of(key), {})[name] = loss
    picks = {str(layer): own for layer, own in found.picks.items()}
    bits = 8 * sum(plan.bytes.values()) / sum(found.sizes.values())
    schemes = dict(plan.schemes)
    by_layer = {str(layer): value for layer, value in slope.items()}
    strengths = {str(layer): value for layer, value in found.strengths.items()}
    return Recipe(
        *(model, text, tokens, wish.rounding, wish.rotate, wish.scope, wish.r, bits, schemes, losses, picks, by_layer),
        strengths=strengths,
    )


def write_experts(
    subject: Subject,
    windows: Sequence[Sequence[int]],
    recipe: Recipe,
    layout: str,
    folder: Folder,
    progress: Progress,
) -> tuple[dict[str, Format], dict[int, Tensor]]:
    """A file for each layer; the packed format of each module, and what was multiplied [cols] in layers behind norms
    that are to be divided.
    """
    formats: dict[str, Format] = {}
    multiplied: dict[int, Tensor] = {}
    steps = Steps(progress, subject.model.config.layers * len(windows) + len(subject.blocks))
    for layer, seen in watched(subject.model, subject.kernels, windows, steps):
        tensors: dict[str, Tensor] = {}
        by = of_strength(average(seen, "gate_up"), recipe.strengths.get(str(layer), 0.0))
        if bool((by != 1).any()):
            multiplied[layer] = by.cpu()
        for expert, moments in enumerate(moments_of(seen)):
            for key, format, held in packed_blocks(subject, (layer, expert), moments, recipe, by):
                steps.add()
                names = subject.names(key)
                height = len(held.codes) // len(names)
                for i, name in enumerate(names):
                    module = name.removesuffix(".weight")
                    formats[module] = format
                    tensors |= tensors_of(layout, module, format, held.rows(slice(i * height, (i + 1) * height)))
        folder.add(tensors)
    return formats, multiplied


def packed_blocks(
    subject: Subject, at: tuple[int, int], moments: Mapping[str, Tensor], recipe: Recipe, by: Tensor
) -> Iterator[tuple[Key, Format, Packed]]:
    """The blocks of one expert of a layer, rounded as the recipe says; by [cols]: what columns of gate and up are
    multiplied by first.
    """
    keys: dict[str, Key] = {part: (*at, part) for part in PARTS}
    schemes = {part: parse(recipe.schemes[name_of(key)]) for part, key in keys.items()}
    exact = {part: subject.exact(key).float() for part, key in keys.items()}
    method = recipe.rounding
    if method == "awq":
        pair = scaled(exact["gate_up"] * by, exact["down"], moments["down"], schemes["down"])
        exact, method = dict(zip(PARTS, pair)), "rtn"
    for part, key in keys.items():
        scheme, w = schemes[part], exact[part]
        held = packed(rounded(w, moments[part], scheme, method, part), grid_of(w, scheme))
        yield key, format_of_scheme(scheme), held


def write_rest(subject: Subject, source: Checkpoint, folder: Folder, by: Mapping[int, Tensor]) -> list[str]:
    """All other tensors, in the types that the source has; the modules of their matrices. by [cols] of layers: what
    reads the norm before the experts is multiplied by.
    """
    banks = subject.weights.banks
    experts = {stacked for stacked, _ in banks} | {name for _, names in banks for each in names for name in each}
    rest = [name for name in subject.checkpoint.names() if name not in experts]
    types = {name: source.tensor(name).data.dtype for name in source.names()}
    tensors = {
        name: behind_norm(name, subject.checkpoint.tensor(name).data, by).to(types.get(name, types[TABLE]))
        for name in rest
    }
    folder.add(tensors)
    return [name.removesuffix(".weight") for name, t in tensors.items() if name.endswith(".weight") and t.dim() == 2]


def settings_of(layout: str, formats: Mapping[str, Format], dense: Sequence[str], recipe: Recipe) -> dict[str, Any]:
    """The quantization_config of a layout."""
    if layout == compressed.METHOD:
        return compressed.settings_of(formats, dense)
    return own.settings_of(formats) | {
        "model": recipe.model,
        "text": recipe.text,
        "recipe": hashlib.sha256(json.dumps(recipe.content(), sort_keys=True).encode()).hexdigest(),
    }
