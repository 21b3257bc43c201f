"""Where Tenfold and Hugging Face keep models on this machine."""

import os
from pathlib import Path

from tenfold.base.home import cache_home, home


def models_folder() -> Path:
    """Tenfold's own models. May not exist."""
    return home("models")


def hub_folder() -> Path:
    """Hugging Face's cache, where $HF_HUB_CACHE, $HF_HOME or the library's defaults put it. May not exist."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(variable):
            return Path(os.environ[variable])
    theirs = os.environ.get("HF_HOME")
    return (Path(theirs) if theirs else cache_home() / "huggingface") / "hub"
