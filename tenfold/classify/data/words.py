"""Texts with a mood of their own, made from words that have one.

The words are listed, so that nothing has to be fetched. Each split has words of its own for what decides, the mood;
what does not decide is shared. A mood may be turned by a negation or by a second clause, so order counts, not only
which words occur.
"""

import random
from collections.abc import Sequence

GLAD = [
    "good",
    "great",
    "lovely",
    "wonderful",
    "fantastic",
    "amazing",
    "awesome",
    "beautiful",
    "brilliant",
    "charming",
    "cheerful",
    "comfortable",
    "cool",
    "cosy",
    "delicious",
    "delightful",
    "elegant",
    "enjoyable",
    "excellent",
    "exciting",
    "fabulous",
    "fine",
    "friendly",
    "fun",
    "funny",
    "generous",
    "gentle",
    "glorious",
    "gorgeous",
    "graceful",
    "happy",
    "helpful",
    "hilarious",
    "honest",
    "impressive",
    "incredible",
    "inspiring",
    "interesting",
    "joyful",
    "kind",
    "lively",
    "magical",
    "magnificent",
    "marvelous",
    "memorable",
    "nice",
    "outstanding",
    "peaceful",
    "perfect",
    "playful",
    "pleasant",
    "positive",
    "pretty",
    "refreshing",
    "relaxing",
    "reliable",
    "remarkable",
    "romantic",
    "safe",
    "satisfying",
    "smart",
    "splendid",
    "stunning",
    "stylish",
    "superb",
    "sweet",
    "talented",
    "thrilling",
    "touching",
    "vibrant",
    "warm",
    "welcoming",
    "wise",
    "witty",
]
SAD = [
    "bad",
    "terrible",
    "awful",
    "horrible",
    "dreadful",
    "annoying",
    "boring",
    "broken",
    "brutal",
    "chaotic",
    "cheap",
    "clumsy",
    "cold",
    "corrupt",
    "cruel",
    "damaged",
    "dangerous",
    "dark",
    "depressing",
    "dirty",
    "disappointing",
    "disastrous",
    "disgusting",
    "dishonest",
    "dismal",
    "dull",
    "evil",
    "expensive",
    "fake",
    "faulty",
    "filthy",
    "foolish",
    "frightening",
    "frustrating",
    "gloomy",
    "greedy",
    "grim",
    "gross",
    "harsh",
    "hateful",
    "hideous",
    "hopeless",
    "hostile",
    "insulting",
    "irritating",
    "lame",
    "lazy",
    "lonely",
    "mediocre",
    "messy",
    "miserable",
    "nasty",
    "noisy",
    "offensive",
    "painful",
    "pathetic",
    "poor",
    "rotten",
    "rude",
    "sad",
    "scary",
    "selfish",
    "shabby",
    "shallow",
    "sloppy",
    "slow",
    "stupid",
    "stale",
    "tedious",
    "toxic",
    "tragic",
    "ugly",
    "unfair",
    "unpleasant",
    "useless",
    "vile",
    "violent",
    "weak",
    "worthless",
]
THINGS = [
    "day",
    "weekend",
    "trip",
    "concert",
    "movie",
    "book",
    "song",
    "game",
    "match",
    "meal",
    "dinner",
    "coffee",
    "party",
    "lesson",
    "meeting",
    "project",
    "phone",
    "laptop",
    "train",
    "flight",
    "hotel",
    "room",
    "view",
    "city",
    "street",
    "park",
    "garden",
    "show",
    "story",
    "speech",
    "answer",
    "plan",
    "idea",
    "job",
    "office",
    "team",
    "boss",
    "neighbour",
    "dog",
    "cat",
    "holiday",
    "beach",
    "walk",
    "morning",
    "evening",
    "night",
    "museum",
    "shop",
]
WHOS = ("my", "our", "this", "the", "your", "that")
STRONGER = ("really", "so", "very", "truly", "absolutely", "rather", "quite", "just")
NOT = ("not", "never", "hardly", "not at all", "by no means", "far from")
BEFORE = ("", "", "ok so", "guys", "today :", "update :", "@user", "well ,", "honestly ,", "wow")
AFTER = ("", "", "!", "!!", ".", "...", "#mood", "#monday", "#life", "@user", "today", "right now")
SHARES = (0.7, 0.15)  # of words of a mood that train and dev have


def own(words: Sequence[str], split: str) -> list[str]:
    """The words of a mood that only this split has, whatever the seed."""
    shuffled = sorted(words)
    random.Random(7).shuffle(shuffled)
    first, second = (round(len(shuffled) * share) for share in (SHARES[0], sum(SHARES)))
    return {"train": shuffled[:first], "dev": shuffled[first:second], "test": shuffled[second:]}[split]


class Writer:
    """Of one split. mood: 1 glad, -1 sad."""

    def __init__(self, split: str, seed: random.Random) -> None:
        self.words = {1: own(GLAD, split), -1: own(SAD, split)}
        self.any = seed

    def text(self, mood: int) -> str:
        """A post of one or two clauses, the last of which says how it is meant."""
        clauses = [self.clause(mood)]
        if self.any.random() < 0.4:
            clauses.insert(0, f"{self.clause(-mood)} but")
        elif self.any.random() < 0.3:
            clauses.insert(0, f"{self.clause(mood)} and")
        return " ".join(filter(None, (self.any.choice(BEFORE), *clauses, self.any.choice(AFTER))))

    def clause(self, mood: int) -> str:
        """A thing that is, or is not, somehow."""
        pick = self.any.choice
        is_turned = self.any.random() < 0.4
        word = pick(self.words[-mood if is_turned else mood])
        how = pick(NOT) if is_turned else pick(("", "", *STRONGER))
        kind = self.any.randrange(3)
        if kind == 0 and not is_turned:
            return " ".join(filter(None, ("what a", word, pick(THINGS))))
        verb = "was" if kind == 1 else "is"
        return " ".join(filter(None, (pick(WHOS), pick(THINGS), verb, how, word)))
