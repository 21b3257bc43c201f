"""`open_checkpoint`: the one way in, whatever the kind of checkpoint."""

from pathlib import Path

from tenfold.weights.checkpoint import Checkpoint, CheckpointError
from tenfold.weights.gguf_model import GGUFCheckpoint
from tenfold.weights.hf import HFCheckpoint
from tenfold.weights.shapes import ShapeCheckpoint, is_shape


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a `.gguf` file or a Hugging Face folder; its weights are mapped, not read. `shape:NAME` stands for random
    weights.

    Raises CheckpointError for anything else and for what is damaged.
    """
    path = Path(path)
    if is_shape(str(path)):
        return ShapeCheckpoint(str(path))
    if path.is_dir():
        return HFCheckpoint(path)
    if path.is_file() and path.suffix == ".gguf":
        return GGUFCheckpoint(path)
    if not path.exists():
        raise CheckpointError(
            f"{path} does not exist; give a folder with config.json and safetensors, or a .gguf file."
        )
    raise CheckpointError(f"{path} is neither a folder with config.json and safetensors nor a .gguf file.")
