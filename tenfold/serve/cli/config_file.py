"""The configuration file: where it lies, how it is read, and what may stand in it.

Invariant: a file is data. Nothing in it is run, a file is never looked for in the working directory (which may be
somebody else's), and what is not understood is an error that names file, key and what is allowed.

Top-level keys are fields of `EngineConfig` and `ServeConfig` and hold for every model; a `[[models]]` table for each
model has `model`, optionally `name`, and engine settings of its own.
"""

import os
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import Field, dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from tenfold.base.config import EngineConfig, fits
from tenfold.serve.cli.sizes import parse_size
from tenfold.serve.settings import ServeConfig

VARIABLE = "TENFOLD_CONFIG"
NAMES = ("config.toml", "config.yaml", "config.yml")
LARGEST = 256 << 10  # bytes; a file of all settings has about 10 KB
MOST_MODELS = 64
KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text in quotes"}
MORE_KINDS = {"bytes": ", or a size such as '2G'", "list": ", or a list of them"}
PATHS = ("model", "api_key_file")  # relative to the folder of the file where they begin with a dot

ENGINE: dict[str, Field[Any]] = {f.name: f for f in fields(EngineConfig)}
SERVER: dict[str, Field[Any]] = {f.name: f for f in fields(ServeConfig)}
SETTINGS = ENGINE | SERVER


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """What a file says: settings for all, and the table of each model. `path` is None where there is no file."""

    path: Path | None
    shared: Mapping[str, Any]
    models: tuple[Mapping[str, Any], ...]

    def named(self, name: str) -> Mapping[str, Any] | None:
        """The table of the model with this `name`."""
        return next((table for table in self.models if table.get("name") == name), None)

    @property
    def exposed_secrets(self) -> list[str]:
        """Keys in a file that other users of this machine may read."""
        if self.path is None or os.name != "posix" or not self.path.stat().st_mode & 0o077:
            return []
        return [name for name in self.shared if SETTINGS[name].metadata["secret"]]


def default_folder() -> Path:
    """Where a file is looked for that nobody named: $TENFOLD_HOME, or tenfold in the user's configuration folder."""
    home = os.environ.get("TENFOLD_HOME")
    return Path(home) if home else Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "tenfold"


def find(given: str | None) -> Path | None:
    """The file to read: the one given, $TENFOLD_CONFIG (empty: none at all), or one of NAMES in `default_folder`.
    Raises ValueError for one that is not there, and for two of them.
    """
    named = given if given is not None else os.environ.get(VARIABLE)
    if named is not None:
        path = Path(named).expanduser() if named else None
        if path is not None and not path.is_file():
            origin = "--config" if given is not None else VARIABLE
            raise ValueError(f"{origin} is {named!r}, and there is no such file.")
        return path
    found = [path for name in NAMES if (path := default_folder() / name).is_file()]
    if len(found) > 1:
        raise ValueError(f"There are {' and '.join(map(str, found))}; keep one, or name one with --config.")
    return found[0] if found else None


def read(path: Path | None) -> ConfigFile:
    """Read and check a file. Raises ValueError with file and key."""
    if path is None:
        return ConfigFile(None, {}, ())
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"{path} ends in {path.suffix!r}; allowed: {', '.join(READERS)}.")
    with path.open("rb") as file:
        content = file.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise ValueError(f"{path} is larger than {LARGEST >> 10} KiB, which is more than any configuration needs.")
    try:
        found = reader(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # of its kind: a wrong encoding, and what both readers raise
        raise ValueError(f"{path} cannot be read: {error}") from None
    return checked(path, {} if found is None else found)


def checked(path: Path, found: Any) -> ConfigFile:
    """The content of a file with every key known and every value of its type. Raises ValueError."""
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no settings; allowed: lines like 'port = 8001' (TOML) or 'port: 8001' (YAML).")
    tables = found.pop("models", [])
    if not isinstance(tables, list) or not all(isinstance(t, dict) for t in tables) or len(tables) > MOST_MODELS:
        raise ValueError(f"{path}: models is not a list of tables; write one [[models]] table for each model.")
    shared = dict(_settings(path, found, SETTINGS, ""))
    models = tuple(_model(path, table, f"models[{i}].") for i, table in enumerate(tables))
    if models and "model" in shared:
        raise ValueError(f"{path}: there are both model and [[models]]; put the model into a table of its own.")
    names = [table["name"] for table in models if "name" in table]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{path}: two [[models]] have the name {name!r}; give each its own.")
    return ConfigFile(path, shared, models)


def _model(path: Path, table: dict[str, Any], where: str) -> dict[str, Any]:
    for key in table:
        if _plain(key) in SERVER:
            way = "it is a setting of the whole server; put it above the first [[models]]"
            raise ValueError(f"{path}: {where}{key} cannot stand here: {way}.")
    settled = dict(_settings(path, table, ENGINE | {"name": SERVER["served_name"]}, where))
    if not settled.get("model"):
        raise ValueError(f'{path}: {where}model is missing; every [[models]] table needs one, as in model = "default".')
    return settled


def _settings(
    path: Path, found: dict[str, Any], known: Mapping[str, Field[Any]], where: str
) -> Iterator[tuple[str, Any]]:
    seen: dict[str, str] = {}
    for key, value in found.items():
        name = _plain(key)
        if name not in known:
            raise ValueError(f"{path}: {where}{str(key)[:64]} is no setting; {_suggest(name, known)}")
        if name in seen:
            raise ValueError(f"{path}: {where}{key} and {seen[name]} are the same setting; keep one.")
        seen[name] = key
        yield name, _value(path, f"{where}{key}", known[name], value)


def _plain(key: Any) -> str:
    """Dashes are understood too, as on the command line."""
    return str(key).replace("-", "_")


def _suggest(name: str, known: Mapping[str, Any]) -> str:
    close = get_close_matches(name, known, n=1)
    return (f"did you mean {close[0]}? " if close else "") + "`tenfold config show` lists all."


def _value(path: Path, where: str, field: Field[Any], value: Any) -> Any:
    """A value as the setting holds it. Secrets are not repeated in messages."""
    kind: type[Any] = type(field.default)
    meta = field.metadata
    shown = "..." if meta["secret"] else repr(value)[:80]
    if meta["unit"] == "bytes" and isinstance(value, str):
        return _size(path, where, value)
    if meta["unit"] == "list" and isinstance(value, list) and all(isinstance(v, str) and "," not in v for v in value):
        return ",".join(value)
    if not fits(value, kind):
        raise ValueError(f"{path}: {where} is {shown}; allowed: {KINDS[kind]}{MORE_KINDS.get(meta['unit'], '')}.")
    if meta["choices"] and value not in meta["choices"]:
        raise ValueError(f"{path}: {where} is {shown}; allowed: {', '.join(meta['choices'])}.")
    if field.name in PATHS and str(value).startswith(("./", "../")):
        return str(path.parent / str(value))
    return kind(value)


def _size(path: Path, where: str, value: str) -> int:
    try:
        return parse_size(value)
    except ValueError as error:
        raise ValueError(f"{path}: {where}: {error}") from None


def _yaml(text: str) -> Any:
    """Plain data only, without aliases, with which a few lines could stand for billions. Raises ValueError."""
    import yaml  # not at the top: only who has such a file should wait for it

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise ValueError(f"line {self.peek_event().start_mark.line + 1}: aliases (*name) are not allowed.")
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            for key, (at, _) in zip(keys, node.value):
                if keys.count(key) > 1:
                    raise ValueError(f"line {at.start_mark.line + 1}: {str(key)[:64]!r} is there twice.")
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None


READERS: dict[str, Callable[[str], Any]] = {".toml": tomllib.loads, ".yaml": _yaml, ".yml": _yaml}
