"""Lengths are those of first questions and answers, from whole files and from those that are cut off."""

import json
from pathlib import Path
from typing import Any

import pytest

from tenfold.bench import conversations


def said(question: Any, answer: Any, speakers: tuple[str, str] = conversations.SPEAKERS) -> dict[str, Any]:
    turns = [{"from": who, "value": text} for who, text in zip(speakers, (question, answer))]
    return {"id": "x", "conversations": [*turns, {"from": "human", "value": "thanks"}]}


WORDS = "a b c d e f"
RECORDS = [
    said(WORDS, WORDS + " g"),
    said("short", WORDS),
    said(WORDS, WORDS, ("gpt", "human")),
    {"id": "none"},
    said(WORDS, None),
    said("a " * 1025, WORDS),
    said("a " * 1024, "b " * 1024),
    said("a " * 1024, "b " * 1025),
]


def words(text: str) -> int:
    return len(text.split())


def test_pairs_are_of_first_exchanges_within_the_bounds() -> None:
    assert conversations.pairs_of(json.dumps(RECORDS, indent=1), words, 10) == [(6, 7), (1024, 1024)]
    assert conversations.pairs_of(json.dumps(RECORDS), words, 1) == [(6, 7)]


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_file_that_is_cut_off_is_read_as_far_as_it_goes(cut: int) -> None:
    text = json.dumps([said(WORDS, WORDS)] * 3)
    assert len(conversations.pairs_of(text[:-cut], words, 10)) == (3 if cut == 1 else 2)


def test_what_is_no_list_is_refused() -> None:
    with pytest.raises(ValueError, match="no JSON list"):
        conversations.pairs_of('{"conversations": []}', words, 1)


def test_the_command_writes_numbers_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "Tell me how plants make sugar out of light and water, please."
    (tmp_path / "talk.json").write_text(json.dumps([said(text, text + " " + text)] * 2))
    conversations.main(["--file", str(tmp_path / "talk.json"), "--out", str(tmp_path / "pairs.json")])
    found = json.loads((tmp_path / "pairs.json").read_text())
    assert len(found) == 2
    assert 2 * found[0][0] - 1 <= found[0][1] <= 2 * found[0][0] + 1
    assert "2 pairs" in capsys.readouterr().out
