"""Tasks for KV formats: what stands in front, what is judged, and that the numbers are those of whole sequences."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tenfold.bench import kv_quality, kv_tasks, report
from tenfold.bench.kv_formats import STRIDE, Exact, Float8
from tenfold.bench.kv_model import Bench
from tenfold.bench.kv_tasks import Question


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Operations this small spend their time waiting for other threads wherever cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def bench(tiny: Callable[[str], Path]) -> Bench:
    return Bench(tiny("llama"), 640)


def lines(path: Path, items: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def endings(path: Path, count: int = 24) -> Path:
    items = [
        {
            "activity_label": "Sailing",
            "ctx": f"[header] How to sail {i} [title] The land is wide.",
            "endings": ["[step] The river runs.", "the sea", "no", f"through it {i}"],
            "expected_index": i % 4,
        }
        for i in range(count)
    ]
    return lines(path / "endings.jsonl", items)


def sums(path: Path, count: int = 24) -> Path:
    items = [{"question": f"What is {i} + 1?", "answer": f"It is {i}+1=<<{i}+1={i + 1}>>{i + 1}"} for i in range(count)]
    return lines(path / "sums.jsonl", items)


def test_solved_items_stand_in_front_of_others(bench: Bench, tmp_path: Path) -> None:
    task = kv_tasks.hellaswag(bench, endings(tmp_path), 5, length=STRIDE)
    assert (len(task.solved), len(task.questions)) == (STRIDE, 5)
    front = bench.tokenizer.decode(task.solved)
    for question in task.questions:
        texts = [bench.tokenizer.decode(piece) for piece in question.pieces]
        begin = texts[0].index(" The river runs.")
        assert all(text[:begin] == texts[0][:begin] for text in texts)
        assert "[" not in texts[0]
        assert texts[0][:begin] not in front
        judged = [piece[own.start : own.stop] for piece, own in zip(question.pieces, question.judged)]
        assert bench.tokenizer.decode(judged[1]).strip() == "the sea"
        assert question.lengths[:3] == [15, 7, 2]
    assert {question.right for question in task.questions} > {task.questions[0].right}
    again = kv_tasks.hellaswag(bench, endings(tmp_path), 5, length=STRIDE)
    assert again.questions == task.questions


def test_solutions_are_judged_without_calculator_marks(bench: Bench, tmp_path: Path) -> None:
    task = kv_tasks.gsm8k(bench, sums(tmp_path), 3, length=STRIDE)
    for question in task.questions:
        (piece,), (judged,) = question.pieces, question.judged
        text = bench.tokenizer.decode(piece)
        solution = bench.tokenizer.decode(piece[judged.start :])
        assert "<<" not in text
        assert solution.strip().startswith("It is")
        assert judged.stop == len(piece)


def test_likelihoods_are_those_of_whole_sequences(bench: Bench, tmp_path: Path) -> None:
    task = kv_tasks.hellaswag(bench, endings(tmp_path), 2, length=STRIDE)
    for format in (Exact(), Float8(16)):
        prefix = bench.begin(task.solved, format)
        for question in task.questions:
            expected = []
            for piece, judged in zip(question.pieces, question.judged):
                rows = [STRIDE + at - 1 for at in judged]
                logs = bench.logits(task.solved + piece, format, rows).log_softmax(-1)
                expected.append(sum(float(logs[i, piece[at]]) for i, at in enumerate(judged)))
            assert kv_tasks.likelihoods(bench, format, prefix, question) == pytest.approx(expected, abs=1e-3)


def test_numbers_of_tasks() -> None:
    first = Question([[1, 2, 3], [1, 2]], [range(1, 3), range(1, 2)], [10, 2], right=0)
    second = Question([[1, 2, 3], [1, 2]], [range(1, 3), range(1, 2)], [10, 2], right=1)
    scores = [[-4.0, -3.0], [-5.0, -3.0]]  # by character the longer one wins both times
    assert kv_tasks.accuracy([first, second], scores) == 0.5
    assert kv_tasks.nats([first, second], scores) == pytest.approx(9 / 4)


def test_files_that_do_not_do(bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"sums.jsonl line 1 has no ctx; each line needs ctx, endings"):
        kv_tasks.hellaswag(bench, sums(tmp_path), 3)
    with pytest.raises(ValueError, match=r"sums.jsonl has 2 items; 1024 tokens .* larger file"):
        kv_tasks.gsm8k(bench, sums(tmp_path, 2), 3)


def test_the_command_asks_for_tasks(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "made"
    text.write_text("the land is wide and the river runs through it to the sea. " * 400)
    files = ["--text", str(text), "--calibrate", str(text), "--out", str(out)]
    tasks = ["--hellaswag", str(endings(tmp_path, 60)), "--gsm8k", str(sums(tmp_path, 60)), "--items", "2"]
    sizes = ["--length", "192", "--windows", "1", "--prompts", "1", "--questions", "2", "--only", "fp8"]
    kv_quality.main(["--model", str(tiny("llama")), *files, *tasks, *sizes])
    found = json.loads(next(out.glob("*.json")).read_text())
    assert found["items"] == {"hellaswag": 2, "gsm8k": 2}
    assert all(row["hellaswag"] in (0, 0.5, 1) and row["gsm8k"] > 0 for row in found["rows"])
    assert "--hellaswag endings.jsonl --gsm8k sums.jsonl --items 2" in found["command"]
    drawn = report.kv_quality_table(found)
    assert "| HellaSwag | GSM8K nats |" in drawn.splitlines()[0]
    assert f"{found['rows'][1]['gsm8k']:.4f} |" in drawn
    assert "2 items of hellaswag, 2 items of gsm8k" in drawn
