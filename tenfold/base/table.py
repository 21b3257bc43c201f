"""Tables of optional entries: `{"name": "module:attribute"}`, the package's one lazy door."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any


def entry(table: Mapping[str, str], name: str, what: str) -> Any:
    """The object `table[name]` points to. Raises ValueError naming the allowed entries."""
    if name not in table:
        raise ValueError(f"{what} is {name!r}; allowed: {', '.join(sorted(table))}.")
    module, _, attribute = table[name].partition(":")
    return getattr(import_module(module), attribute)
