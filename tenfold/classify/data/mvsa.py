"""MVSA-single and MVSA-multiple (Niu et al. 2016) in their public layout: `data/ID.txt`, `data/ID.jpg` and
`labelResultAll.txt`, whose rows hold `ID<tab>text,image`, for each annotator a pair.

What both modalities together feel like follows from what each feels like: `joint`. Pictures and texts are not
redistributed here; whoever has them reads them from a folder of his own.
"""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tenfold.base.log import logger
from tenfold.classify.data.posts import NEUTRAL, POLARITIES, SPLITS, DataSet, Post, divide

ITEMS = {"mvsa-single": 4511, "mvsa-multiple": 17024}  # that the literature counts after the rules below


def joint(text: int, image: int) -> int | None:
    """The label of a post whose text and picture have these; None: they contradict each other, and it is dropped."""
    if text == image:
        return text
    if NEUTRAL in (text, image):
        return text if image == NEUTRAL else image
    return None


def majority(labels: Sequence[int]) -> int | None:
    """What most annotators say; None where no label has more than half."""
    label, count = Counter(labels).most_common(1)[0]
    return label if 2 * count > len(labels) else None


def label_of(row: str) -> tuple[str, int | None]:
    """Id and joint label of a row. Raises ValueError for one that is none."""
    id, *pairs = row.split()
    sides: list[list[int]] = [[], []]
    for pair in pairs:
        words = pair.lower().split(",")
        if len(words) != 2 or not set(words) <= set(POLARITIES):
            raise ValueError(f"{row!r} is no row of labels; allowed: ID, then text,image of {', '.join(POLARITIES)}.")
        for side, word in zip(sides, words):
            side.append(POLARITIES.index(word))
    if not pairs:
        raise ValueError(f"{row!r} is no row of labels: nothing follows its id.")
    text, image = map(majority, sides)
    return id, None if text is None or image is None else joint(text, image)


def read(name: str, folder: Path, seed: int = 0) -> DataSet:
    """name: in ITEMS. Splits are those of `train.json`, `dev.json` and `test.json` (lists of objects with an `id`,
    or of ids) where the folder has them, else eight, one and one of ten by chance. Raises ValueError.
    """
    table = folder / "labelResultAll.txt"
    if not table.is_file():
        raise ValueError(
            f"{folder} is no {name}: there is no labelResultAll.txt in it; docs/sentiment.md has the layout."
        )
    found: dict[str, Post] = {}
    for row in table.read_text(encoding="utf-8", errors="replace").splitlines()[1:]:
        if not row.strip():
            continue
        id, label = label_of(row)
        if label is not None:
            found[id] = _post(folder / "data", id, label)
    if len(found) != ITEMS[name]:
        logger.warning("%s has %d posts; the literature counts %d", folder, len(found), ITEMS[name])
    parts = divide(list(found.values()), seed) if not _has_splits(folder) else _given(folder, found)
    return DataSet.of(name, POLARITIES, parts, source=f"{name}, {len(found)} posts")


def _post(folder: Path, id: str, label: int) -> Post:
    text, picture = folder / f"{id}.txt", folder / f"{id}.jpg"
    if not text.is_file() or not picture.is_file():
        raise ValueError(f"The post {id!r} lacks {text.name} or {picture.name} in {folder}.")
    return Post(text.read_text(encoding="utf-8", errors="replace").strip(), picture, label)


def _has_splits(folder: Path) -> bool:
    return all((folder / f"{split}.json").is_file() for split in SPLITS)


def _given(folder: Path, found: dict[str, Post]) -> tuple[tuple[Post, ...], ...]:
    parts = []
    for split in SPLITS:
        path = folder / f"{split}.json"
        ids = ids_of(path)
        missing = [id for id in ids if id not in found]
        if missing:
            raise ValueError(
                f"{path} names the post {missing[0]!r}, which has no row in labelResultAll.txt, or labels that "
                "contradict each other; leave it out."
            )
        parts.append(tuple(found[id] for id in ids))
    return tuple(parts)


def ids_of(path: Path) -> list[str]:
    """Of a split's file. Raises ValueError."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}.") from None
    if not isinstance(rows, list):
        raise ValueError(f"{path} holds a {type(rows).__name__}; allowed: a list of objects with an id, or of ids.")
    ids = [row.get("id") if isinstance(row, dict) else row for row in rows]
    for i, id in enumerate(ids):
        if isinstance(id, bool) or not isinstance(id, str | int):
            raise ValueError(
                f"{path}, row {i}: {str(rows[i])[:80]!r} has no id; allowed: an object with an id, or an id."
            )
    return [str(id) for id in ids]
