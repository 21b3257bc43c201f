"""A checkpoint's own settings of how pictures are prepared for it."""

from pathlib import Path
from typing import Any

from tenfold.weights.mapped import read_object

MOST = 1 << 20  # bytes of a file
OWN = "preprocessor_config.json"
JOINT = "processor_config.json"  # of picture, text and others; newer files hold all in this one


def processor_settings(folder: Path) -> dict[str, Any]:
    """Those of pictures, empty where the checkpoint has none. Raises CheckpointError for a damaged file."""
    if (folder / OWN).is_file():
        return read_object(folder / OWN, MOST)
    if not (folder / JOINT).is_file():
        return {}
    inner = read_object(folder / JOINT, MOST).get("image_processor")
    return dict(inner) if isinstance(inner, dict) else {}
