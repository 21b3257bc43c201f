"""Where each setting of a command comes from: a flag, else the environment, else the configuration file, else the
default.

Invariant: a value never comes without its origin, so what `tenfold config show --origin` prints is what happens.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tenfold.base.config import EngineConfig
from tenfold.serve.cli.config_file import ENGINE, SERVER, ConfigFile
from tenfold.serve.settings import ServeConfig

NAMED = re.compile(r"([\w.:@/-]{1,200})=(.+)", re.DOTALL)  # NAME=MODEL
DEFAULT = "default"


@dataclass(frozen=True, slots=True)
class Given:
    """A value and where it was given, such as "--port", "TENFOLD_PORT" or DEFAULT."""

    value: Any
    origin: str


@dataclass(frozen=True, slots=True)
class ChosenModel:
    """One model to run. `name`: what clients call it; empty where nobody said."""

    name: str
    config: EngineConfig
    origins: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Settled:
    """All settings of a command. The first model is the default one. `origins`: of the server's settings."""

    models: tuple[ChosenModel, ...]
    server: ServeConfig = field(default_factory=ServeConfig)
    origins: Mapping[str, str] = field(default_factory=dict)
    file: ConfigFile = field(default_factory=lambda: ConfigFile(None, {}, ()))

    @property
    def config(self) -> EngineConfig:
        """Of the one model of a command that takes one."""
        return self.models[0].config


def settle(given: Mapping[str, Given], models: Sequence[Given], file: ConfigFile) -> Settled:
    """given: flags and environment by field, as far as there are any. models: those named there, each a model, a name
    from the file, or NAME=MODEL; empty: those of the file, or the default one.
    """
    server = {name: _first(name, field, given, file.shared, file) for name, field in SERVER.items()}
    chosen = [_model(model, given, file) for model in models or _models_of(file)]
    return Settled(
        models=tuple(chosen),
        server=ServeConfig(**{name: value.value for name, value in server.items()}),
        origins={name: value.origin for name, value in server.items()},
        file=file,
    )


def _first(name: str, field: Any, given: Mapping[str, Given], settings: Mapping[str, Any], file: ConfigFile) -> Given:
    if name in given:
        return given[name]
    if name in settings:
        return Given(settings[name], str(file.path))
    return Given(field.default, DEFAULT)


def _models_of(file: ConfigFile) -> list[Given]:
    """Where neither a flag nor the environment names one."""
    if file.models:
        return [Given(table, f"{file.path} models[{i}]") for i, table in enumerate(file.models)]
    if "model" in file.shared:
        return [Given(file.shared["model"], str(file.path))]
    return [Given(ENGINE["model"].default, DEFAULT)]


def _model(model: Given, given: Mapping[str, Given], file: ConfigFile) -> ChosenModel:
    """The settings of one model: those of its own table before those that hold for all."""
    table = model.value if isinstance(model.value, Mapping) else file.named(model.value)
    if table is None:
        name, path = split_name(model.value)
        table = {"name": name, "model": path}
    own = dict(file.shared) | {k: v for k, v in table.items() if k in ENGINE}
    found = {name: _first(name, field, given, own, file) for name, field in ENGINE.items()}
    found["model"] = Given(table["model"], model.origin)
    config = EngineConfig(**{name: value.value for name, value in found.items()})
    return ChosenModel(table.get("name", ""), config, {name: value.origin for name, value in found.items()})


def split_name(text: str) -> tuple[str, str]:
    """("small", "a.gguf") of "small=a.gguf"; the name is empty where there is none, or where the whole is a path or a
    shape with changes (`shape:llama-3-8b@layers=4`).
    """
    match = NAMED.fullmatch(text)
    if match is None or text.startswith("shape:") or Path(text).expanduser().exists():
        return "", text
    return match[1], match[2]
