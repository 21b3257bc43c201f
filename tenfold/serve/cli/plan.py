"""`tenfold plan`: what models need of memory, before any of it is loaded."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import typer

from tenfold.base.config import EngineConfig
from tenfold.engine.joint import JointPlan, Tenant, plan_together
from tenfold.engine.memory import free_memory, plan_memory, size
from tenfold.engine.opened import Opened
from tenfold.serve.cli.names import served_names
from tenfold.serve.cli.sources import Settled
from tenfold.serve.cli.terminal import columns

DOES_NOT_FIT = 3  # exit status
SETTING = re.compile(r"\b([a-z]\w*)=(\w+)")


def plan(settled: Settled, memory: int) -> None:
    """Print the plan for what is free here, or for `memory` bytes. Exits with DOES_NOT_FIT where the models do not
    fit.
    """
    if len(settled.models) == 1:
        fits = plan_one(settled.config, memory)
    else:
        together = joint_plan(served_names(settled.models), [m.config for m in settled.models], memory)
        print(as_flags("\n".join(lines(together))))
        fits = together.fits
    if not fits:
        raise typer.Exit(DOES_NOT_FIT)


def plan_one(config: EngineConfig, memory: int) -> bool:
    """Print the plan of one model. Returns whether it fits."""
    opened = Opened(config)
    opened.choose()
    layout = opened.memory
    if memory:
        asked = replace(opened.config, max_model_len=config.max_model_len, kv_memory=config.kv_memory)
        layout = plan_memory(opened.shape, opened.weights, asked, memory, opened.draft)
    print(f"{opened.checkpoint.path} on {opened.device}, {opened.kernels.name} kernels")
    print(as_flags(str(layout)))
    return layout.fits


def joint_plan(names: Sequence[str], configs: Sequence[EngineConfig], memory: int = 0) -> JointPlan:
    """The plan of several models, by name. memory: bytes on each device instead of what is free there. Raises
    ValueError for a model that cannot be opened.
    """
    tenants, devices = [], {}
    for name, config in zip(names, configs, strict=True):
        opened = Opened(config)
        opened.choose()
        tenants.append(Tenant.of(name, config, opened))
        devices[opened.config.device] = opened.device
    free: Mapping[str, int] = {name: memory or free_memory(device) for name, device in devices.items()}
    return plan_together(tenants, free)


def lines(together: JointPlan) -> Iterator[str]:
    """The plan as a table, a row a model, and what would make it fit where it does not."""
    rows = [("MODEL", "DEVICE", "WEIGHTS", "WORKSPACE", "KV CACHE", "TOKENS", "CONTEXT", "TOTAL")]
    for name, p in together.plans.items():
        parts = (size(p.weights), size(p.workspace), size(p.kv), str(p.tokens), str(p.max_model_len), size(p.total))
        rows.append((name, together.configs[name].device, *parts))
    yield columns(rows)
    for device, free in together.free.items():
        yield f"together {size(together.total(device))} of {size(free)} free on {device}"
    if not together.fits:
        yield (
            "They do not fit. Any one of these would make them fit:"
            if together.changes
            else ("They do not fit, and no setting would make them fit.")
        )
        yield from (f"  {change}" for change in together.changes)


def as_flags(text: str) -> str:
    """Settings in a sentence of the engine (`max_batch=8`) as a command line takes them (`--max-batch 8`)."""
    return SETTING.sub(lambda m: f"--{m[1].replace('_', '-')} {m[2]}", text)
