"""Every data set by name, and how `--data` spells it: NAME or NAME=FOLDER."""

from collections.abc import Callable
from pathlib import Path

from tenfold.classify.data import emoji, everyday, hfm, incongruity, mvsa, tweets
from tenfold.classify.data.posts import DataSet

ASSETS = "assets"  # the folder of packages where nothing else is given
LAYOUTS = "docs/sentiment.md"


def _made_up(rule: str, seed: int, sizes: tuple[int, int, int] = incongruity.SIZES) -> DataSet:
    return incongruity.generate(incongruity.Wish(rule, sizes, seed=seed))


def _of_emoji(rule: str, folder: Path, seed: int) -> DataSet:
    drawer = emoji.Drawer(emoji.find(folder))
    return incongruity.generate(incongruity.Wish(rule, seed=seed), drawer, "emoji")


# Name: how it is made, from a seed,
MADE_UP: dict[str, Callable[[int], DataSet]] = {
    "incongruity": lambda seed: _made_up("clash", seed),
    "incongruity-joint": lambda seed: _made_up("joint", seed),
    "incongruity-large": lambda seed: _made_up("clash", seed, incongruity.LARGE),
    "incongruity-tiny": lambda seed: _made_up("clash", seed, (96, 32, 32)),
}
# from a folder of packages and a seed,
PACKAGES: dict[str, Callable[[Path, int], DataSet]] = {
    "incongruity-emoji": lambda folder, seed: _of_emoji("clash", folder, seed),
    "emoji": lambda folder, seed: emoji.read(folder),
    "tweets": lambda folder, seed: tweets.read(folder),
    "everyday": everyday.read,
}
# and from a folder that has to be given, and a seed.
FOLDERS: dict[str, Callable[[Path, int], DataSet]] = {
    "mvsa-single": lambda folder, seed: mvsa.read("mvsa-single", folder, seed),
    "mvsa-multiple": lambda folder, seed: mvsa.read("mvsa-multiple", folder, seed),
    "hfm": lambda folder, seed: hfm.read(folder),
}
NAMES = (*MADE_UP, *(f"{name}[=FOLDER]" for name in PACKAGES), *(f"{name}=FOLDER" for name in FOLDERS))


def read(spelled: str, seed: int = 0) -> DataSet:
    """Raises ValueError for a name that is unknown and for folders that hold something else."""
    name, _, folder = spelled.partition("=")
    if name in MADE_UP:
        if name != spelled:
            raise ValueError(f"data is {spelled!r}, but {name} is made up and reads no folder; give {name} alone.")
        found = MADE_UP[name](seed)
    elif name in PACKAGES:
        found = PACKAGES[name](_folder(folder or ASSETS), seed)
    elif name in FOLDERS:
        if not folder:
            raise ValueError(f"data is {spelled!r}; give {name}=FOLDER, whose layout is in {LAYOUTS}.")
        found = FOLDERS[name](_folder(folder), seed)
    else:
        raise ValueError(f"data is {name!r}; allowed: {', '.join(NAMES)}.")
    found.check()
    return found


def _folder(given: str) -> Path:
    return Path(given).expanduser()
