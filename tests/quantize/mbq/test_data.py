"""Pairs from disk: what is read, what is refused with which words, and what is said about the mix."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tenfold.quantize.mbq.data import CAPTION, Pair, PairError, Sample, mix_of, ordered, read_pairs


def picture(folder: Path, name: str = "a.png") -> Path:
    Image.new("RGB", (20, 20), (200, 30, 40)).save(folder / name)
    return folder / name


def lines(folder: Path, *objects: object) -> Path:
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(each if isinstance(each, str) else json.dumps(each) for each in objects))
    return path


def sample(tokens: int, answer: int, places: int = 0) -> Sample:
    return Sample(tuple(range(tokens)), answer, (), np.arange(places), np.arange(tokens))


def test_lines_in_both_spellings(tmp_path: Path) -> None:
    image = picture(tmp_path)
    path = lines(
        tmp_path,
        {"image": "a.png", "question": "What?", "answer": "Red."},
        "",
        {"image": "a.png", "text": "A red square."},
        {"prompt": "Say hello.", "answer": "Hello."},
    )
    wanted = [Pair(image, "What?", "Red."), Pair(image, CAPTION, "A red square."), Pair(None, "Say hello.", "Hello.")]
    assert read_pairs(path) == wanted
    assert read_pairs(tmp_path) == wanted


def test_only_line_feeds_end_a_line(tmp_path: Path) -> None:
    """Texts of the web hold other separators, which JSON takes as they are."""
    text = "One.\u2028Two.\x85Three."
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b"\r\n".join(json.dumps({"text": t}, ensure_ascii=False).encode() for t in (text, "Four.")))
    assert read_pairs(path) == [Pair(None, CAPTION, text), Pair(None, CAPTION, "Four.")]


def test_pictures_with_texts_beside(tmp_path: Path) -> None:
    for name in ("b.png", "a.jpg", "c.png"):
        picture(tmp_path, name)
    (tmp_path / "a.txt").write_text(" A square. \n")
    (tmp_path / "b.txt").write_text("Another.")
    found = read_pairs(tmp_path)
    assert found == [Pair(tmp_path / "a.jpg", CAPTION, "A square."), Pair(tmp_path / "b.png", CAPTION, "Another.")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"Line 2 of .*pairs.jsonl is no JSON"),
        ("[" * 100_000, r"Line 2 of .* is no JSON"),
        ("[1]", "Line 2 of .* is no object"),
        ({"image": "a.png"}, 'needs "answer" or "text"'),
        ({"image": "a.png", "answer": "  "}, 'needs "answer" or "text"'),
        ({"image": "a.png", "answer": "x", "prompt": 4}, 'may have "prompt" or "question"'),
        ({"image": 5, "answer": "x"}, "has 5 as image; allowed: the path"),
        ({"image": "none.png", "answer": "x"}, "names the picture 'none.png', which is not beside"),
    ],
)
def test_what_is_wrong_is_said(line: object, message: str, tmp_path: Path) -> None:
    picture(tmp_path)
    path = lines(tmp_path, {"answer": "fine"}, line)
    with pytest.raises(PairError, match=message):
        read_pairs(path)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(PairError, match="is not there; give a JSONL"):
        read_pairs(tmp_path / "no")
    picture(tmp_path)
    with pytest.raises(PairError, match="1 pictures of which none has a text"):
        read_pairs(tmp_path)
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(PairError, match="no UTF-8"):
        read_pairs(tmp_path)
    (tmp_path / "a.txt").write_text(" ")
    with pytest.raises(PairError, match="is empty"):
        read_pairs(tmp_path)


def test_the_mix_is_counted_and_judged() -> None:
    mix = mix_of([sample(100, 90, 80), sample(30, 10)])
    assert (mix.samples, mix.vision, mix.answers, mix.prompts) == (2, 80, 30, 20)
    assert mix.warnings() == ["only 0 of 2 samples have a picture; vision counts for little"]
    assert "times as many tokens as answers" in mix_of([sample(9000, 8980, 8000)]).warnings()[1]
    with pytest.raises(PairError, match="answers have 3 tokens together"):
        mix_of([sample(10, 7)])


def test_order_does_not_matter() -> None:
    samples = [sample(10 + i, 5) for i in range(5)]
    assert ordered(samples) == ordered(samples[::-1])
