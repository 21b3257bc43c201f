"""The mixture that the packaged classifier is trained on: rated tweets and snippets without a picture, tweets with
their emoticon drawn, emoji without a text, and made-up posts of both. Three labels.
"""

from pathlib import Path

from tenfold.classify.data import emoji, incongruity, tweets
from tenfold.classify.data.posts import POLARITIES, SPLITS, DataSet, Post

MADE_UP = (3000, 300, 300)
RATED = (tweets.TWEETS, "amazonReviewSnippets")


def read(assets: Path, seed: int = 0) -> DataSet:
    """Raises ValueError where the packages are not there."""
    known = emoji.find(assets)
    wish = incongruity.Wish("joint", MADE_UP, seed=seed)
    sets = [
        tweets.rated(assets, RATED, lambda post: True, "rated"),
        _alone(emoji.read(assets)),
        incongruity.generate(wish),
        incongruity.generate(wish, emoji.Drawer(known), "emoji"),
    ]
    parts = (tuple(post for each in sets for post in each.split(name)) for name in SPLITS)
    return DataSet.of("everyday", POLARITIES, parts, source="; ".join(each.source for each in sets))


def _alone(given: DataSet) -> DataSet:
    """Pictures without their texts."""
    parts = (tuple(Post("", post.picture, post.label) for post in given.split(name)) for name in SPLITS)
    return DataSet.of(given.name, given.labels, parts, source=given.source)
