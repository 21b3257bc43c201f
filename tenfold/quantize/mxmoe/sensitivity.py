"""What it costs a layer's output to round one block of one expert: MxMoE's metric, without running the layer again.

The published recipe swaps in the rounded block and runs the whole layer over the text. Only tokens that go to the
expert change, and by their weight times what the expert's own output changes, so it is enough to run the expert on its
tokens: the same number for a fraction of the work. Blocks are the fused gate and up, and down.
"""

from collections.abc import Callable, Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor

from tenfold.ops.oracle import ACTIVATIONS
from tenfold.quantize.capture import Seen
from tenfold.quantize.schemes import Scheme, round_activations

PARTS = ("gate_up", "down")
Rounding = Callable[[Tensor, Scheme, str], Tensor]  # a weight, a scheme, the part it is


def outputs(x: Tensor, gate_up: Tensor, down: Tensor, act: str, schemes: Mapping[str, Scheme] | None = None) -> Tensor:
    """What an expert gives of x [n, cols]; schemes by part: how inputs of that product are rounded."""
    schemes = schemes or {}
    if "gate_up" in schemes:
        x = round_activations(x, schemes["gate_up"])
    gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
    inner = ACTIVATIONS[act](gate) * up
    if "down" in schemes:
        inner = round_activations(inner, schemes["down"])
    return F.linear(inner, down)


def losses(
    seen: Seen, gate_up: Tensor, down: Tensor, act: str, schemes: Mapping[str, Sequence[Scheme]], rounding: Rounding
) -> dict[tuple[str, str], float]:
    """By part and scheme, of those each part may get: the sum over the expert's tokens of the squared change of the
    layer's output, float32 weights gate_up [2 * inner, cols] and down [cols, inner]. An expert that was never picked
    loses nothing.
    """
    x, weights = (t.float() for t in seen.tokens())
    pairs = [(part, scheme) for part in PARTS for scheme in schemes[part]]
    found = {(part, str(scheme)): 0.0 for part, scheme in pairs}
    if not len(x):
        return found
    exact = outputs(x, gate_up, down, act)
    more = seen.picks / len(x)  # the sample stands for all
    for part, scheme in pairs:
        own = {"gate_up": gate_up, "down": down}
        own[part] = rounding(own[part], scheme, part)
        changed = outputs(x, own["gate_up"], own["down"], act, {part: scheme})
        found[part, str(scheme)] = more * float(((changed - exact) * weights[:, None]).square().sum())
    return found
