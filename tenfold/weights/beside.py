"""Files of what was measured of a checkpoint: they lie in its folder or beside its .gguf file, or where neither can be
written in Tenfold's own folder.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from tenfold.base.log import logger
from tenfold.weights.checkpoint import Checkpoint
from tenfold.weights.home import models_folder
from tenfold.weights.shapes import is_shape


def places(checkpoint: Checkpoint, model: str, kind: str, *more: str) -> list[Path]:
    """Where a .json may lie, best first. model: the checkpoint's identity; kind and more: parts of the file's name."""
    path, name = checkpoint.path, ".".join((kind, *more, "json"))
    own = models_folder().parent / kind / ".".join((model[:32], *more, "json"))
    if is_shape(str(path)):
        return [own]
    return [path / name if path.is_dir() else path.with_name(f"{path.stem}.{name}"), own]


def save(kind: str, paths: Sequence[Path], put: Callable[[Path], None]) -> Path:
    """`put` at the first place that takes it, which is returned. Raises OSError where none does."""
    *others, last = paths
    for path in others:
        try:
            put(path)
            return path
        except OSError as error:
            logger.info("%s: %s cannot be written (%s)", kind, path, error.strerror)
    put(last)
    return last


def write(path: Path, content: bytes) -> None:
    """All or nothing. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
