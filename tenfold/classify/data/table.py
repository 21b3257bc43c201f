"""Every data set by name, and how `--data` spells it: NAME or NAME=FOLDER."""

from collections.abc import Callable
from pathlib import Path

from tenfold.classify.data import emoji, everyday, hfm, incongruity, mvsa, tweets
from tenfold.classify.data.posts import DataSet

ASSETS = "assets"  # the folder where nothing else is given


def _made_up(rule: str, seed: int, sizes: tuple[int, int, int] = incongruity.SIZES) -> DataSet:
    return incongruity.generate(incongruity.Wish(rule, sizes, seed=seed))


def _of_emoji(rule: str, folder: Path, seed: int) -> DataSet:
    drawer = emoji.Drawer(emoji.find(folder))
    return incongruity.generate(incongruity.Wish(rule, seed=seed), drawer, "emoji")


# Name: how it is made from a folder and a seed.
SETS: dict[str, Callable[[Path, int], DataSet]] = {
    "incongruity": lambda folder, seed: _made_up("clash", seed),
    "incongruity-joint": lambda folder, seed: _made_up("joint", seed),
    "incongruity-large": lambda folder, seed: _made_up("clash", seed, incongruity.LARGE),
    "incongruity-tiny": lambda folder, seed: _made_up("clash", seed, (96, 32, 32)),
    "incongruity-emoji": lambda folder, seed: _of_emoji("clash", folder, seed),
    "emoji": lambda folder, seed: emoji.read(folder),
    "tweets": lambda folder, seed: tweets.read(folder),
    "everyday": everyday.read,
    "mvsa-single": lambda folder, seed: mvsa.read("mvsa-single", folder, seed),
    "mvsa-multiple": lambda folder, seed: mvsa.read("mvsa-multiple", folder, seed),
    "hfm": lambda folder, seed: hfm.read(folder),
}


def read(spelled: str, seed: int = 0) -> DataSet:
    """Raises ValueError for a name that is unknown and for folders that hold something else."""
    name, _, folder = spelled.partition("=")
    if name not in SETS:
        raise ValueError(f"data is {name!r}; allowed: {', '.join(SETS)}, each also as NAME=FOLDER.")
    found = SETS[name](Path(folder or ASSETS), seed)
    found.check()
    return found
