"""Tasks for caches of few bits: HellaSwag and GSM8K, by the likelihood a model gives to what is written there.

Solved items stand in front, so many that nearly all of what a query sees has left a format's window. They are the same
for all items of a task and computed once a format. Generating answers would take a forward a token; it is left out.
"""

import json
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from tenfold.bench.kv_formats import Format
from tenfold.bench.kv_model import Bench, Prefix

PREFIX = 1024  # tokens of solved items
LONGEST = 512  # tokens of an item; longer ones are passed over
TASKS = {"codes": ("code nats", ".3f"), "hellaswag": ("HellaSwag", ".1%"), "gsm8k": ("GSM8K nats", ".4f")}
"""What a task is called in a table, and how its number is written there. "codes" are those of `kv_quality.recall`."""


@dataclass(frozen=True, slots=True)
class Question:
    """Texts that may go on after the solved items. pieces: their tokens; judged: where in each piece those lie whose
    likelihood counts, never the first one; lengths: characters of what is judged; right: index of the true one.
    """

    pieces: list[list[int]]
    judged: list[range]
    lengths: list[int]
    right: int = 0


Value = Callable[[Sequence[Question], Sequence[list[float]]], float]
"""Of questions and the log-likelihood of each of their pieces, in nats, the number a task gives."""


@dataclass(frozen=True, slots=True)
class Task:
    """name: one of TASKS; solved: tokens in front of each question."""

    name: str
    solved: list[int]
    questions: list[Question]
    value: Value

    def measure(self, bench: Bench, format: Format) -> float:
        prefix = bench.begin(self.solved, format)
        return self.value(self.questions, [likelihoods(bench, format, prefix, q) for q in self.questions])


def likelihoods(bench: Bench, format: Format, prefix: Prefix, question: Question) -> list[float]:
    """Log-likelihood of what is judged in each piece, in nats."""
    rows: list[int] = []
    targets: list[int] = []
    start = 0
    for piece, judged in zip(question.pieces, question.judged):
        rows += [start + at - 1 for at in judged]
        targets += [piece[at] for at in judged]
        start += len(piece)
    logs = bench.follow(prefix, question.pieces, format, rows).log_softmax(-1)
    own = logs.gather(1, torch.tensor(targets, device=logs.device)[:, None])[:, 0].double()
    return [float(part.sum()) for part in own.split([len(judged) for judged in question.judged])]


def accuracy(questions: Sequence[Question], scores: Sequence[list[float]]) -> float:
    """Share of questions whose true text is the likeliest by character."""
    right = 0
    for question, own in zip(questions, scores):
        by_character = [score / length for score, length in zip(own, question.lengths)]
        right += by_character.index(max(by_character)) == question.right
    return right / len(questions)


def nats(questions: Sequence[Question], scores: Sequence[list[float]]) -> float:
    """Negative log-likelihood of a token of the true texts."""
    return -sum(own[0] for own in scores) / sum(len(question.judged[0]) for question in questions)


def hellaswag(bench: Bench, path: Path, items: int, length: int = PREFIX) -> Task:
    """Which of four endings is the likeliest. A line has ctx, endings, activity_label and expected_index or label.
    Raises ValueError.
    """
    texts = []
    for item in drawn(path, ("ctx", "endings")):
        label = item.get("activity_label", "")
        context = _plain((f"{label}: " if label else "") + item["ctx"])
        right = int(item.get("expected_index", item.get("label", 0)))
        texts.append((context, [f" {_plain(ending)}" for ending in item["endings"]], right))
    return _task("hellaswag", bench, path, texts, items, length, accuracy)


def _plain(text: str) -> str:
    """Without the marks of headers, titles and steps."""
    return re.sub(r"\s*\[[a-z]+\]\s*", " ", text).strip()


def gsm8k(bench: Bench, path: Path, items: int, length: int = PREFIX) -> Task:
    """How likely the solutions are; their calculator marks are taken out. A line has question and answer. Raises
    ValueError.
    """
    texts = []
    for item in drawn(path, ("question", "answer")):
        solution = re.sub(r"<<[^>]*>>", "", item["answer"])
        texts.append((f"Question: {item['question']}\nAnswer:", [f" {solution}"], 0))
    return _task("gsm8k", bench, path, texts, items, length, nats)


def drawn(path: Path, keys: Sequence[str]) -> list[Mapping[str, Any]]:
    """All items of a file, in an order that is random and always the same. Raises ValueError."""
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        item = json.loads(line)
        missing = [key for key in keys if not isinstance(item, dict) or key not in item]
        if missing:
            raise ValueError(f"{path.name} line {number} has no {missing[0]}; each line needs {', '.join(keys)}.")
        found.append(item)
    random.Random(0).shuffle(found)
    return found


def _task(
    name: str,
    bench: Bench,
    path: Path,
    texts: Sequence[tuple[str, list[str], int]],
    items: int,
    length: int,
    value: Value,
) -> Task:
    """texts: context, what may follow it, and which of that does. The last ones are solved in front of the others."""
    solved: list[int] = []
    left = list(texts)
    while left and len(solved) < length:
        context, endings, right = left.pop()
        solved = bench.encode(f"{context}{endings[right]}\n\n") + solved
    questions = list(islice(_questions(bench, left), items))
    if len(solved) < length or not questions:
        raise ValueError(
            f"{path.name} has {len(texts)} items; {length} tokens of them go in front of those that are asked. "
            "Give a larger file."
        )
    return Task(name, solved[-length:], questions, value)


def _questions(bench: Bench, texts: Sequence[tuple[str, list[str], int]]) -> Iterator[Question]:
    """Those of up to LONGEST tokens."""
    for context, endings, right in texts:
        begin = bench.encode(context)
        pieces = [begin + bench.encode(ending) for ending in endings]
        if max(map(len, pieces)) <= LONGEST:
            judged = [range(len(begin), len(piece)) for piece in pieces]
            yield Question(pieces, judged, [len(ending.strip()) for ending in endings], right)
