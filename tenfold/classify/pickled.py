"""Files that `torch.save` wrote. They are recognised and not read, as they may hold code; whoever has one is told how
to convert it.
"""

import shlex
from pathlib import Path
from typing import NoReturn

BEGINNINGS = (b"PK\x03\x04", b"\x80\x02")  # a zip archive, or a pickle as older versions wrote it
CONVERT = (
    'python -c "import sys, torch; from tenfold.weights.safetensors import serialize; '
    "open(sys.argv[2], 'wb').write(serialize(torch.load(sys.argv[1], weights_only=True)))\""
)


def is_pickled(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4).startswith(BEGINNINGS)


def refuse(path: Path, made: Path) -> NoReturn:
    """made: the file to convert it to. Raises ValueError."""
    raise ValueError(
        f"{path} is a file of torch.save, which is not read, as it may hold code. Convert it once to {made}:\n"
        f"{CONVERT} {shlex.quote(str(path))} {shlex.quote(str(made))}"
    )
