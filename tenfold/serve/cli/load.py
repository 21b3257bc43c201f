"""Loading a model for a command: progress while it takes long, then one line that says where the time went."""

import gc
from typing import Any, TypeVar

from tenfold.base.config import EngineConfig
from tenfold.base.log import Timeline, announce
from tenfold.engine.llm import LLM, AsyncLLM
from tenfold.serve.cli.names import display_name
from tenfold.serve.cli.terminal import loading, process_age

Front = TypeVar("Front", LLM, AsyncLLM)


def load(
    kind: type[Front], config: EngineConfig, quiet: bool = False, name: str = "", first: bool = True, **rest: Any
) -> Front:
    """The model that `config` names, called `name`. Its start-up times go to standard error, those of the `first` from
    the start of the process. rest: for `kind`.
    """
    timeline = Timeline()
    if first:
        timeline.phases.append(("start and imports", process_age()))
    with loading(quiet) as progress:
        llm = kind(config=config, timeline=timeline, loading=progress, **rest)
    gc.freeze()  # a model and its tokenizer stay; a collection that walks them would show as a pause between tokens
    if not quiet:
        announce(f"{name or display_name(config.model)} ready: {timeline}")
    return llm
