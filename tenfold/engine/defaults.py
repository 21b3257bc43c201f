"""How a model is sampled when the user says nothing: as the model's own generation_config.json recommends."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tenfold.engine.request import SamplingParams

logger = logging.getLogger(__name__)

COMPLETION_TOKENS = 16  # length of a completion when neither user nor model says, as in the OpenAI API and in vLLM

# Names in generation_config.json to fields of SamplingParams and their types.
FIELDS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "temperature": ("temperature", float),
    "top_k": ("top_k", int),
    "top_p": ("top_p", float),
    "min_p": ("min_p", float),
    "repetition_penalty": ("repetition_penalty", float),
    "max_new_tokens": ("max_tokens", int),
}


def recommended(path: Path) -> SamplingParams:
    """The parameters a checkpoint recommends, others at their defaults. A value out of range is left out with a
    warning.
    """
    from tenfold.weights.hf import optional_object  # PyTorch comes with it, and `completion` is asked for without

    config: Mapping[str, Any] = optional_object(path / "generation_config.json") if path.is_dir() else {}
    params = SamplingParams()
    for name, (field, kind) in FIELDS.items():
        value = config.get(name)
        if value is None or isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        try:
            changed = replace(params, **{field: kind(value)})
            changed.check()
            params = changed
        except (ValueError, OverflowError) as error:
            logger.warning("generation_config.json of %s is not followed: %s", path, error)
    return params


def completion(params: SamplingParams) -> SamplingParams:
    """Of `recommended`, for continuing a text: COMPLETION_TOKENS tokens unless the model says how many."""
    return params if params.max_tokens is not None else replace(params, max_tokens=COMPLETION_TOKENS)
