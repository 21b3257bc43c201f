"""Tiny models that see, and samples of real pictures for them."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tenfold.quantize.mbq.data import Sample, read_pairs
from tenfold.serve.pairs import Reader
from tenfold.weights.open import open_checkpoint
from tests.vision import photograph

Seeing = Callable[[str], Path]
SAID = ("A woman in uniform.", "the flag", "Nothing much, the and then.", "A face")


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL of pictures of different shapes, and a pair without one."""
    folder = tmp_path_factory.mktemp("pairs")
    lines = []
    for i, said in enumerate(SAID):
        photograph().crop((60 * i, 40, 60 * i + 60 + 40 * i, 140)).save(folder / f"{i}.png")
        lines.append({"image": f"{i}.png", "question": f"What is {i}?", "answer": said})
    lines.append({"prompt": "Say it.", "answer": "There it is, in the end."})
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def samples_of(model: Path, pairs: Path) -> Sequence[Sample]:
    return Reader(open_checkpoint(model)).samples(read_pairs(pairs))
