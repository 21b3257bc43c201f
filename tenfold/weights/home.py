"""Where Tenfold and Hugging Face keep models on this machine."""

import os
from pathlib import Path


def cache_home() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def models_folder() -> Path:
    """Tenfold's own models: `models` in $TENFOLD_HOME or in ~/.cache/tenfold. May not exist."""
    home = os.environ.get("TENFOLD_HOME")
    return (Path(home) if home else cache_home() / "tenfold") / "models"


def hub_folder() -> Path:
    """Hugging Face's cache, where $HF_HUB_CACHE, $HF_HOME or the library's defaults put it. May not exist."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(variable):
            return Path(os.environ[variable])
    home = os.environ.get("HF_HOME")
    return (Path(home) if home else cache_home() / "huggingface") / "hub"
