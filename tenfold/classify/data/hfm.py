"""HFM, the tweets with pictures of Cai et al. 2019 for finding sarcasm, in their public layout: `text/train.txt`,
`text/valid2.txt` and `text/test2.txt`, whose lines are lists `['id', 'text', label]`, the last entry being what counts,
and `dataset_image/ID.jpg`.
"""

import ast
import re
from pathlib import Path

from tenfold.base.log import logger
from tenfold.classify.data.posts import DataSet, Post

LABELS = ("sincere", "sarcastic")
FILES = {"train": "train.txt", "dev": "valid2.txt", "test": "test2.txt"}
ITEMS = {"train": 19816, "dev": 2410, "test": 2409}
# Posts for training that give themselves away are left out, as in the literature.
TELLING = re.compile("exgag|sarcasm|sarcastic|reposting|<url>|joke|humour|humor|jokes|irony|ironic", re.IGNORECASE)


def row_of(line: str) -> tuple[str, str, int]:
    """Id, text and label. Raises ValueError."""
    try:
        row = ast.literal_eval(line)
        id, text, label = str(row[0]), str(row[1]), row[-1]
    except (ValueError, SyntaxError, TypeError, IndexError, KeyError, MemoryError, RecursionError):
        raise ValueError(f"{line[:80]!r} is no row of HFM; allowed: ['id', 'text', label].") from None
    if label not in (0, 1):
        raise ValueError(f"{line[:80]!r} has the label {label!r}; allowed: 0 and 1.")
    return id, text, int(label)


def read(folder: Path) -> DataSet:
    """Raises ValueError for a folder that holds something else."""
    parts = {split: _split(folder, split) for split in FILES}
    for split, posts in parts.items():
        if len(posts) != ITEMS[split]:
            logger.warning("%s: %d posts of %s; the literature counts %d", folder, len(posts), split, ITEMS[split])
    return DataSet("hfm", LABELS, parts["train"], parts["dev"], parts["test"], "HFM")


def _split(folder: Path, split: str) -> tuple[Post, ...]:
    path = folder / "text" / FILES[split]
    if not path.is_file():
        raise ValueError(f"{folder} is no HFM: there is no {path}; docs/sentiment.md has the layout.")
    posts = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if not line.strip():
            continue
        id, text, label = row_of(line)
        if split == "train" and TELLING.search(text):
            continue
        picture = folder / "dataset_image" / f"{id}.jpg"
        if not picture.is_file():
            raise ValueError(f"The post {id!r} lacks its picture {picture}.")
        posts.append(Post(text, picture, label))
    return tuple(posts)
