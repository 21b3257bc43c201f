"""Loading a model for a command: progress while it takes long, then one line that says where the time went."""

import gc
import sys
from pathlib import Path
from typing import TypeVar

from tenfold.base.config import EngineConfig
from tenfold.base.log import Timeline
from tenfold.engine.llm import LLM, AsyncLLM
from tenfold.serve.cli.terminal import loading, process_age
from tenfold.weights import default_model

Front = TypeVar("Front", LLM, AsyncLLM)


def load(kind: type[Front], config: EngineConfig, quiet: bool = False) -> Front:
    """The model that `config` names. Its start-up times, from the start of the process, go to standard error."""
    timeline = Timeline()
    timeline.phases.append(("start and imports", process_age()))
    with loading(quiet) as progress:
        llm = kind(config=config, timeline=timeline, loading=progress)
    gc.freeze()  # a model and its tokenizer stay; a collection that walks them would show as a pause between tokens
    if not quiet:
        print(f"{display_name(config.model)} ready: {timeline}", file=sys.stderr, flush=True)
    return llm


def display_name(model: str) -> str:
    """What to call a model that a user named by `model`."""
    if model in default_model.NAMES:
        return default_model.TITLE
    path = Path(model).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return path.stem
    return path.resolve().name if path.is_dir() else model
