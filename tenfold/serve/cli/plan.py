"""`tenfold plan`: what a model needs of memory, before any of it is loaded."""

import re
from dataclasses import replace

import typer

from tenfold.base.config import EngineConfig
from tenfold.engine.memory import plan_memory
from tenfold.engine.opened import Opened

DOES_NOT_FIT = 3  # exit status
SETTING = re.compile(r"\b([a-z]\w*)=(\w+)")


def plan(config: EngineConfig, memory: int) -> None:
    """Print the plan for what is free here, or for `memory` bytes. Exits with DOES_NOT_FIT where the model does not
    fit.
    """
    opened = Opened(config)
    opened.choose()
    layout = opened.memory
    if memory:
        asked = replace(opened.config, max_model_len=config.max_model_len, kv_memory=config.kv_memory)
        layout = plan_memory(opened.shape, layout.weights, asked, memory)
    print(f"{opened.checkpoint.path} on {opened.device}, {opened.kernels.name} kernels")
    print(as_flags(str(layout)))
    if not layout.fits:
        raise typer.Exit(DOES_NOT_FIT)


def as_flags(text: str) -> str:
    """Settings in a sentence of the engine (`max_batch=8`) as a command line takes them (`--max-batch 8`)."""
    return SETTING.sub(lambda m: f"--{m[1].replace('_', '-')} {m[2]}", text)
