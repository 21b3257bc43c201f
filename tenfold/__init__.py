"""Tenfold: an inference engine for large language models in which every optimisation is a measured choice."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tenfold.base.config import EngineConfig
    from tenfold.engine.classifier import Classifier, Feeling, Post
    from tenfold.engine.completion import Completion
    from tenfold.engine.llm import LLM, AsyncLLM
    from tenfold.engine.request import Output, SamplingParams

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "AsyncLLM",
    "Classifier",
    "Completion",
    "EngineConfig",
    "Feeling",
    "Output",
    "Post",
    "SamplingParams",
]

# Looked up on first use: PyTorch takes more than a second to import, and not every program needs it.
_HOMES = {
    "LLM": "tenfold.engine.llm",
    "AsyncLLM": "tenfold.engine.llm",
    "Classifier": "tenfold.engine.classifier",
    "Completion": "tenfold.engine.completion",
    "EngineConfig": "tenfold.base.config",
    "Feeling": "tenfold.engine.classifier",
    "Output": "tenfold.engine.request",
    "Post": "tenfold.engine.classifier",
    "SamplingParams": "tenfold.engine.request",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tenfold' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
