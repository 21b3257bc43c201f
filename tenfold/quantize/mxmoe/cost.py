"""What a weight of each scheme costs in time: measured on the GPU that the model is quantised on, by the same table of
choices that engines go by, else the bytes that reading it takes.

Experts of a layer are timed as a whole, all of one scheme, by the plan that is the fastest there; what that takes is
shared out evenly among their weights.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from tenfold.models.config import ModelConfig
from tenfold.ops import tiles
from tenfold.quantize.schemes import Scheme, format_of_scheme

if TYPE_CHECKING:  # Triton is there on GPU machines only
    from tenfold.ops.gpu.expert_arms import ExpertArms
    from tenfold.ops.gpu.tune import Timer


def obstacle(config: ModelConfig, scheme: Scheme) -> str:
    """Why experts of a scheme cannot be timed, empty where they can."""
    assert config.experts is not None
    format = format_of_scheme(scheme)
    sizes = config.hidden_size, config.experts.size
    return tiles.obstacle(format) or next((why for cols in sizes if (why := format.obstacle(cols))), "")


def per_weight(
    config: ModelConfig, schemes: Sequence[Scheme], tokens: int, device: str
) -> tuple[dict[str, float] | None, str]:
    """Microseconds of each scheme's layer of experts over its weights, for steps of so many tokens, and in words where
    they are from. None: nothing can be measured here, and the words say why.
    """
    if not device.startswith("cuda"):
        return None, "bytes read, since there is no GPU here to measure on"
    for scheme in schemes:
        if why := obstacle(config, scheme):
            return None, f"bytes read, since experts of {scheme} cannot be timed: {why}"
    from tenfold.ops.gpu import arms, expert_arms, timing

    place = torch.device(device)
    name, sms = torch.cuda.get_device_name(place), torch.cuda.get_device_properties(place).multi_processor_count
    running = expert_arms.ExpertArms(arms.table(name), sms)
    found = timed(config, schemes, tokens, running, timing.GpuTimer(place), place)
    return found, f"measured on {name}, {tokens} tokens a step"


def timed(
    config: ModelConfig,
    schemes: Sequence[Scheme],
    tokens: int,
    running: "ExpertArms",
    timer: "Timer",
    device: torch.device,
) -> dict[str, float]:
    """`per_weight` by these arms, timer and device; what the table holds is not measured again."""
    from tenfold.ops.gpu import expert_arms, tune_experts

    own = config.experts
    assert own is not None
    found = {}
    for scheme in schemes:
        name, count = format_of_scheme(scheme).name, own.routing.experts
        formats = ((name, name, count),)
        work = expert_arms.ExpertsWork(
            count, own.routing.top, config.hidden_size, own.size, formats, config.activation, tokens
        )
        tune_experts.tune([work], running, timer, device, (tokens,))
        times = running.table.times(expert_arms.key(work, running.sms))
        found[str(scheme)] = min(times.values()) / (3 * count * config.hidden_size * own.size)
    return found
