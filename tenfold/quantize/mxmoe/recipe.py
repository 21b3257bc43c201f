"""What was decided about a model's blocks, and why: `recipe.json` in the folder of the quantised model.

It names the model and the text it was made from by their digests; used with another model it is refused.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tenfold.quantize.mxmoe.front import Corner, read

FILE = "recipe.json"
SCHEMA = 2
LARGEST = 1 << 28  # bytes


@dataclass(frozen=True, slots=True)
class Recipe:
    """model: `identity` of the checkpoint; text: digest of the calibration text, tokens of which were used; rotated:
    whether the residual stream was turned first; bits: of a weight of experts, scales and zeros included; losses: what
    each scheme that a block could get costs, picks the tokens that went to each expert of a layer, and slope what a
    loss of each layer costs at the model's end, empty where all count alike: together the reason why. cost: where the
    times of schemes are from, empty where accuracy alone counted. strengths: of the scales that each layer's gates and
    ups have in common, where there are some. front: the corners among which the schemes were chosen.
    """

    model: str
    text: str
    tokens: int
    rounding: str
    rotated: bool
    scope: str
    r: float
    bits: float
    schemes: Mapping[str, str]
    losses: Mapping[str, Mapping[str, float]]
    picks: Mapping[str, list[int]]
    slope: Mapping[str, float] = field(default_factory=dict)
    cost: str = ""
    strengths: Mapping[str, float] = field(default_factory=dict)
    front: tuple[Corner, ...] = ()

    def content(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **asdict(self)}

    def loss(self, block: str) -> float:
        """What a block's scheme costs, at the end where that was measured."""
        return self.losses[block][self.schemes[block]] * self.slope.get(block.split(".")[0], 1.0)

    def why(self, block: str) -> str:
        """A sentence about one block, "layer.expert.part"."""
        layer, expert, part = block.split(".")
        taken, own = self.schemes[block], self.losses[block]
        weight = self.slope.get(layer)
        end = "" if weight is None else f", each costing {weight:.3g} nats a token at the end"
        costs = ", ".join(f"{name} {loss:.3g}" for name, loss in own.items())
        picks = self.picks[layer]
        share = picks[int(expert)] / max(1, sum(picks))
        return (
            f"layer {layer}, expert {expert}, {part}: {taken}. {share:.1%} of the layer's picks went to it; "
            f"squared error of the layer's output by scheme: {costs}{end}."
        )


def load(path: Path, model: str) -> Recipe:
    """The recipe of a file, for the model of this identity. Raises ValueError for a file that is none, and for another
    model's; OSError.
    """
    if path.stat().st_size > LARGEST:
        raise ValueError(f"{path} is too large for a recipe; give the {FILE} of a model that tenfold quantize made.")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw.pop("schema") != SCHEMA:
            raise KeyError("schema")
        found = Recipe(**raw | {"front": read(raw.get("front", ()))})
        for block, scheme in found.schemes.items():  # each has picks, and a loss of its scheme
            found.losses[block][scheme], found.why(block)
        sum((found.bits, *found.slope.values(), *found.strengths.values())), found.cost.split()
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"{path} is no recipe; give the {FILE} of a model that tenfold quantize made.") from error
    if found.model != model:
        raise ValueError(
            f"{path} was made from another model (digest {str(found.model)[:12]}, this one has {model[:12]}); "
            "measure this model with --text, or name the one the recipe belongs to."
        )
    return found
