"""Calibration data: pairs of a picture and what is said about it, read from disk, and what a model is shown of them.

Invariant: samples are put in an order of their own (`ordered`), so no result depends on the order of files or lines.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tenfold.models.picture import Picture

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")
CAPTION = "Describe the picture."  # the prompt of a picture that comes with a text alone
LONGEST = 1 << 22  # characters of one line
MOST = 1 << 20  # pairs of one file
LEAST_ANSWERS = 16  # tokens of answers that a calibration needs


class PairError(ValueError):
    """Calibration data that cannot be used: says which file and line, and what is wanted there."""


@dataclass(frozen=True, slots=True)
class Pair:
    """image: the file of a picture, None for a pair of texts."""

    image: Path | None
    prompt: str
    answer: str


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """A pair as a model reads it. tokens: prompt and answer; answer: how many tokens come before it; pictures, and
    places [M]: of their tokens; positions [tokens]: what tokens turn by; turns [M, 3]: time, row and column of picture
    tokens, for models whose positions have such; key: of all of it.
    """

    tokens: tuple[int, ...]
    answer: int
    pictures: tuple[Picture, ...]
    places: np.ndarray
    positions: np.ndarray
    turns: np.ndarray | None = None

    @property
    def key(self) -> str:
        found = hashlib.sha256(f"{self.tokens} {self.answer}".encode())
        for picture in self.pictures:
            found.update(picture.key)
        return found.hexdigest()


def ordered(samples: Sequence[Sample]) -> list[Sample]:
    """The same in an order that does not depend on theirs."""
    return sorted(samples, key=lambda sample: sample.key)


def read_pairs(path: Path) -> list[Pair]:
    """Of a JSONL file, or of a folder: its .jsonl files, else pictures beside texts of the same name.

    A line is an object: "image" (a file, from where the JSONL lies; may be absent), "prompt" or "question", "answer" or
    "text". Raises PairError, which names file and line.
    """
    if path.is_file():
        return list(_lines(path))
    if not path.is_dir():
        raise PairError(f"{path} is not there; give a JSONL file of pairs, or a folder with one.")
    files = sorted(path.glob("*.jsonl"))
    if files:
        return [pair for file in files for pair in _lines(file)]
    images = sorted(file for file in path.rglob("*") if file.suffix.lower() in PICTURES)
    told = [file for file in images if file.with_suffix(".txt").is_file()]
    if not told:
        raise PairError(
            f"{path} has no .jsonl file, and {len(images)} pictures of which none has a text beside it; "
            'give lines of JSON such as {"image": "a.png", "question": "What is it?", "answer": "A cat."}, or '
            "a.png and a.txt."
        )
    return [Pair(file, CAPTION, _text(file.with_suffix(".txt"))) for file in told]


def _text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError:
        raise PairError(f"{path} is no UTF-8 text.") from None
    if not text:
        raise PairError(f"{path} is empty; it must say what the picture shows.")
    return text


def _lines(path: Path) -> Iterator[Pair]:
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise PairError(f"{path} is no UTF-8 text; give JSON lines.") from None
    lines = [(number, line) for number, line in enumerate(content.split("\n"), start=1) if line.strip()]
    if len(lines) > MOST:
        raise PairError(f"{path} has {len(lines)} lines; allowed: up to {MOST}.")
    for number, line in lines:
        yield _pair(line, path, number)


def _pair(line: str, path: Path, number: int) -> Pair:
    where = f"Line {number} of {path}"
    if len(line) > LONGEST:
        raise PairError(f"{where} has {len(line)} characters; allowed: up to {LONGEST}.")
    try:
        raw: Any = json.loads(line)
    except (ValueError, RecursionError):
        raise PairError(f"{where} is no JSON.") from None
    if not isinstance(raw, dict):
        raise PairError(f"{where} is no object; allowed: image, question and answer.")
    prompt, answer = raw.get("prompt", raw.get("question")), raw.get("answer", raw.get("text"))
    prompt = CAPTION if prompt is None else prompt
    if not isinstance(prompt, str) or not isinstance(answer, str) or not answer.strip():
        raise PairError(f'{where} needs "answer" or "text", a text, and may have "prompt" or "question", another.')
    image = raw.get("image")
    if image is None:
        return Pair(None, prompt, answer)
    if not isinstance(image, str) or not image:
        raise PairError(f"{where} has {repr(image)[:80]} as image; allowed: the path of a picture.")
    found = path.parent / image
    if not found.is_file():
        raise PairError(f"{where} names the picture {image[:200]!r}, which is not beside {path.name}.")
    return Pair(found, prompt, answer)


@dataclass(frozen=True, slots=True)
class Mix:
    """Tokens of samples by what they are: of pictures, of answers, of all else (prompts)."""

    samples: int
    pictures: int
    vision: int
    answers: int
    prompts: int

    def __str__(self) -> str:
        return (
            f"{self.samples} samples with {self.pictures} pictures: {self.vision} tokens of pictures, "
            f"{self.answers} of answers, {self.prompts} of prompts"
        )

    def warnings(self) -> list[str]:
        """Sentences about what is out of balance."""
        found = []
        if self.pictures < self.samples / 2:
            found.append(f"only {self.pictures} of {self.samples} samples have a picture; vision counts for little")
        if self.answers and self.vision > 200 * self.answers:
            found.append(
                f"pictures have {self.vision / self.answers:.0f} times as many tokens as answers; longer answers make "
                "the balance more certain"
            )
        return found


def mix_of(samples: Sequence[Sample]) -> Mix:
    """Raises PairError where there is too little to calibrate on."""
    every = sum(len(sample.tokens) for sample in samples)
    vision = sum(len(sample.places) for sample in samples)
    answers = sum(len(sample.tokens) - sample.answer for sample in samples)
    if answers < LEAST_ANSWERS:
        raise PairError(f"The answers have {answers} tokens together; give pairs with at least {LEAST_ANSWERS}.")
    pictures = sum(len(sample.pictures) for sample in samples)
    return Mix(len(samples), pictures, vision, answers, every - vision - answers)
