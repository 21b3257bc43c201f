"""`tenfold config`: all settings with their origin, the file they may come from, and a first version of it.

Invariant: a secret is never printed, only that it is set.
"""

import json
import os
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import Field, fields
from typing import Any

import typer

from tenfold.base.config import EngineConfig, groups
from tenfold.base.log import announce
from tenfold.serve.cli.config_file import NAMES, SETTINGS, default_folder, find
from tenfold.serve.cli.flags import variable
from tenfold.serve.cli.sources import Settled
from tenfold.serve.settings import ServeConfig

NONE_YET = 1  # exit status of `config path`
OTHER_VARIABLES = frozenset({"TENFOLD_CONFIG", "TENFOLD_HOME", "TENFOLD_DEBUG", "TENFOLD_CPU_ISA"})


def show(settled: Settled, origin: bool, as_json: bool) -> None:
    """Print settings as a configuration file would hold them, or as an object."""
    if as_json:
        print(json.dumps(_object(settled), indent=2))
    else:
        print("\n".join(_lines(settled, origin)))
    for name in sorted(os.environ):
        if name.startswith("TENFOLD_") and name not in OTHER_VARIABLES | {variable(n) for n in SETTINGS}:
            announce(f"{name} is set, but there is no such setting.")


def path() -> None:
    """Print the file that is read; where there is none, the place for one."""
    found = find(None)
    print(found or default_folder() / NAMES[0])
    if found is None:
        raise typer.Exit(NONE_YET)


def init() -> None:
    """Write a file in which every setting stands as a comment. Raises OSError where there is a file already."""
    target = find(None)
    if target is not None:
        raise ValueError(f"{target} is there already; change it, or remove it first.")
    target = default_folder() / NAMES[0]
    target.parent.mkdir(parents=True, exist_ok=True)
    # Only for its owner: API keys may come to stand in it.
    with open(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(template())
    print(target)


def template() -> str:
    """A configuration file that sets nothing and shows everything."""
    lines = ["# Settings of tenfold. A flag or a TENFOLD_* variable comes before what stands here."]
    for kind in (ServeConfig, EngineConfig):
        headings = groups(kind)
        for i, f in enumerate(fields(kind)):
            if not i or f.metadata["group"]:
                lines += ["", f"# --- {headings[f.name]}"]
            lines += textwrap.wrap(f.metadata["help"], 100, initial_indent="# ", subsequent_indent="# ")
            lines.append(f"# {f.name} = {toml(f.default)}")
    return "\n".join([*lines, "", *MODELS_TEMPLATE]) + "\n"


MODELS_TEMPLATE = (
    "# --- Several models, each with engine settings of its own; these tables stand last",
    "# [[models]]",
    '# name = "small"',
    '# model = "default"',
    "# max_batch = 8",
)


def toml(value: Any) -> str:
    """A value as TOML writes it: JSON's texts, numbers and true or false are TOML's, too."""
    return json.dumps(value)


def _lines(settled: Settled, origin: bool) -> Iterator[str]:
    several = len(settled.models) > 1 or settled.models[0].name
    yield f"# from {settled.file.path}" if settled.file.path else "# no configuration file"
    yield from _section(ServeConfig, settled.server, settled.origins, origin)
    for model in settled.models:
        if several:
            yield from ("", "[[models]]", *([f"name = {toml(model.name)}"] if model.name else []))
        yield from _section(EngineConfig, model.config, model.origins, origin)


def _section(kind: type, values: Any, origins: Mapping[str, str], origin: bool) -> Iterator[str]:
    headings = groups(kind)
    for f in fields(kind):
        if f.metadata["group"]:
            yield f"\n# {headings[f.name]}"
        shown = _shown(f, values)
        line = f"# {f.name} is set" if f.metadata["secret"] and shown else f"{f.name} = {toml(shown)}"
        yield f"{line:40}  # {origins[f.name]}" if origin else line


def _object(settled: Settled) -> dict[str, Any]:
    return {
        "file": str(settled.file.path) if settled.file.path else None,
        "server": _values(settled.server, settled.origins),
        "models": [{"name": model.name or None} | _values(model.config, model.origins) for model in settled.models],
    }


def _values(values: Any, origins: Mapping[str, str]) -> dict[str, Any]:
    return {f.name: {"value": _shown(f, values), "origin": origins[f.name]} for f in fields(values)}


def _shown(field: Field[Any], values: Any) -> Any:
    value = getattr(values, field.name)
    return "set" if field.metadata["secret"] and value else value
