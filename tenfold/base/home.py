"""Where files that Tenfold makes or fetches lie on this machine."""

import os
from pathlib import Path


def cache_home() -> Path:
    """$XDG_CACHE_HOME, or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def home(part: str) -> Path:
    """This folder of $TENFOLD_HOME, or of `tenfold` in the cache of this user. May not exist."""
    own = os.environ.get("TENFOLD_HOME")
    return (Path(own) if own else cache_home() / "tenfold") / part
