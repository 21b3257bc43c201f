"""Which model a file of measurements belongs to: a digest of what a checkpoint is, cheap for one of any size."""

import hashlib
import json
from pathlib import Path

from tenfold.weights.checkpoint import Checkpoint
from tenfold.weights.gguf import SHARD
from tenfold.weights.hf import weight_files
from tenfold.weights.shapes import is_shape

SAMPLES = 64  # places of each weight file that are read
SAMPLE_BYTES = 4096


def identity(checkpoint: Checkpoint) -> str:
    """A digest of the config, the tensors' names, the sizes of the weight files and samples of their bytes, whatever
    they are called and wherever they lie. Random weights of a shape have that of their name.
    """
    digest = hashlib.sha256()
    if is_shape(str(checkpoint.path)):
        digest.update(str(checkpoint.path).encode())
        return digest.hexdigest()
    digest.update(json.dumps(checkpoint.config, sort_keys=True, default=str).encode())
    digest.update("\0".join(sorted(checkpoint.names())).encode())
    for file in files(checkpoint.path):
        sample(file, digest)
    return digest.hexdigest()


def files(path: Path) -> list[Path]:
    """The files that hold a checkpoint's weights, in order."""
    if path.is_dir():
        return weight_files(path)
    shard = SHARD.fullmatch(path.name)
    return sorted(path.parent.glob(f"{shard['stem']}-*-of-{shard['count']}.gguf")) if shard else [path]


def sample(file: Path, digest: "hashlib._Hash") -> None:
    """Add a file's size and bytes at evenly spaced places."""
    size = file.stat().st_size
    digest.update(size.to_bytes(8, "little"))
    with file.open("rb") as stream:
        for i in range(SAMPLES):
            stream.seek(max(0, size - SAMPLE_BYTES) * i // (SAMPLES - 1))
            digest.update(stream.read(SAMPLE_BYTES))
