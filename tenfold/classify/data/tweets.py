"""Tweets and snippets of reviews that people rated from -4 to 4, from the source archive of the package vaderSentiment
(Hutto and Gilbert 2014, `additional_resources/hutto_ICWSM_2014.tar.gz`). They are read where they are, and never
written.

In a tweet with an emoticon the emoticon becomes the picture: the text alone lacks it.
"""

import html
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tenfold.classify.data.draw import characters
from tenfold.classify.data.posts import POLARITIES, SPLITS, DataSet, Post, as_tensor, polarity, split_of

ARCHIVE = "hutto_ICWSM_2014"
TWEETS = "tweets"
BORDER = 0.5  # rating from which a text is positive, and below minus which negative
SHARES = (80, 10)  # of a hundred: train and dev
LARGEST = 64 << 20  # bytes of a file in the archive
# Eyes, perhaps a nose, a mouth; the same the other way round; and hearts.
EMOTICON = re.compile(
    r"(?:(?<=\s)|^)(?:[<>]?[:;=8xX][\-o*'^]?[)\](\[dDpP/\\|}{@3*sSoO]+|[)\](\[/\\]+[\-o*']?[:;=8]|<\/?3+)(?=\s|$)"
)


def rows(assets: Path, name: str) -> Iterator[tuple[float, str]]:
    """Rating and text of a file of ground truth. Raises ValueError where it is not there."""
    file = f"{name}_GroundTruth.txt"
    for line in _content(assets, file).decode("utf-8", "replace").splitlines():
        parts = line.split("\t", 2)
        if len(parts) == 3:
            yield float(parts[1]), html.unescape(parts[2].strip())


def _content(assets: Path, file: str) -> bytes:
    folder = assets / "vader-ratings"
    for path in sorted(folder.glob(f"**/{ARCHIVE}/{file}")):
        return path.read_bytes()
    for path in sorted(folder.glob(f"**/{ARCHIVE}.tar.gz")):
        with tarfile.open(path) as archive:
            member = archive.extractfile(f"{ARCHIVE}/{file}")
            if member is not None:
                return member.read(LARGEST)
    raise ValueError(f"There is no {ARCHIVE}.tar.gz in {folder}; unpack the source archive of vaderSentiment there.")


def post_of(rating: float, text: str) -> Post:
    """With its first emoticon as the picture, if it has one; all emoticons are taken out of the text then."""
    found = EMOTICON.search(text)
    label = polarity(rating, BORDER)
    if found is None:
        return Post(text, None, label)
    rest = " ".join(EMOTICON.sub(" ", text).split())
    return Post(rest, as_tensor(characters(found.group())), label)


def read(assets: Path) -> DataSet:
    """The tweets with an emoticon."""
    return rated(assets, (TWEETS,), lambda post: post.picture is not None, "tweets")


def rated(assets: Path, names: Sequence[str], keeps: Callable[[Post], bool], name: str) -> DataSet:
    """Posts with some text from files of ground truth. Splits are by the text, so that no post is for learning in one
    set and for judging in another.
    """
    parts: dict[str, list[Post]] = {split: [] for split in SPLITS}
    for file in names:
        for rating, text in rows(assets, file):
            post = post_of(rating, text)
            if post.text and keeps(post):
                parts[split_of(text, *SHARES)].append(post)
    return DataSet.of(name, POLARITIES, parts.values(), "vaderSentiment, rated texts")
