"""Where scales go: columns of a matrix are multiplied; what stands before it, a norm or the rows of another matrix, is
divided. Then a layer is rounded as it is stored.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tenfold.quantize.gptq import gptq
from tenfold.quantize.mbq.subject import Subject
from tenfold.quantize.mbq.trial import Swap
from tenfold.quantize.schemes import SHRINKS, WIDE, Grid, Scheme, grid_of, round_to_nearest

# Names of matrices in a checkpoint, one after the other by rows: apart, or as Phi-3 joins them.
NAMES = {
    "qkv": (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.qkv_proj",)),
    "out": (("self_attn.o_proj",),),
    "gate_up": (("mlp.gate_proj", "mlp.up_proj"), ("mlp.gate_up_proj",)),
    "down": (("mlp.down_proj",),),
}
NORMS = {"qkv": "input_layernorm", "gate_up": "post_attention_layernorm"}  # that stand before
BEFORE = {"qkv": "out", "gate_up": "down"}  # whose last rows make the inputs of which
Scales = dict[str, Tensor]  # of one layer, by matrix; a matrix that is not there keeps its own


@dataclass(frozen=True, slots=True, eq=False)
class Folded:
    """A matrix with its scales: weight [rows, cols] float32, bias [rows]; by: what its inputs are divided by where a
    norm stands before it, which takes that over.
    """

    weight: Tensor
    bias: Tensor | None
    by: Tensor | None

    def rounded(self, scheme: Scheme, moments: Tensor | None = None) -> tuple[Tensor, Grid]:
        """To nearest, or with moments [cols, cols] of its inputs by GPTQ; and the grid that it lies on."""
        shrinks = WIDE if moments is None else SHRINKS
        grid = grid_of(self.weight, scheme, shrinks)
        made = round_to_nearest(self.weight, scheme, shrinks) if moments is None else gptq(self.weight, moments, scheme)
        return made, grid


def names_of(subject: Subject, layer: int, part: str) -> list[str]:
    """Of a part's modules in the checkpoint."""
    prefix = f"model.layers.{layer}."
    found = next(names for names in NAMES[part] if subject.weights.has(f"{prefix}{names[0]}.weight"))
    return [prefix + name for name in found]


def folded(subject: Subject, layer: int, part: str, scales: Scales) -> Folded:
    linear = subject.linear(layer, part)
    weight, bias, own = subject.weight(layer, part).float(), linear.bias, scales.get(part)
    weight = weight.clone() if own is None else weight * own
    after = scales.get(BEFORE.get(part, ""))
    if after is not None:
        weight[-len(after) :] /= after[:, None]
        if bias is not None:
            bias = torch.cat([bias[: -len(after)], bias[-len(after) :] / after])
    return Folded(weight, bias, own if part in NORMS else None)


def layer_swaps(
    subject: Subject, layer: int, scales: Scales, scheme: Scheme, parts: Iterable[str] = NAMES
) -> dict[int, Swap]:
    """Matrices of one layer as they are stored, rounded to nearest."""
    made = {}
    for part in parts:
        own = folded(subject, layer, part, scales)
        weight, _ = own.rounded(scheme)
        made[id(subject.linear(layer, part).weight)] = swap_of(subject, own, weight, scheme)
    return made


def swap_of(subject: Subject, own: Folded, rounded: Tensor, scheme: Scheme) -> Swap:
    return Swap(rounded.to(subject.kernels.dtype), scheme, own.by, own.bias)


def swaps_of(subject: Subject, scales: Mapping[int, Scales], scheme: Scheme) -> dict[int, Swap]:
    """Every matrix of every layer, for `Subject.score`."""
    made: dict[int, Swap] = {}
    for layer in range(subject.layers):
        made |= layer_swaps(subject, layer, scales.get(layer, {}), scheme)
    return made
