"""Results say what would measure them again, without where things lay, and are whole or not there."""

import argparse
import json
import shlex
from pathlib import Path
from types import ModuleType

import pytest

from tenfold.bench import (
    gpu,
    kernels,
    kv,
    kv_quality,
    launches,
    moe,
    mxmoe,
    phases,
    quality_gpu,
    sentiment,
    soak,
    vlm,
)
from tenfold.bench.command import again, portable, save, spelled, unlike

MODEL, TEXT, OTHER = "/weights/some model", "/texts/a text.txt", "texts/b.txt"
PLACE = ["--out", "/results/a.json", "--commit", "abc"]


@pytest.mark.parametrize(
    ("module", "given", "left"),
    [
        (gpu, ["--models", f"{MODEL},shape:tiny", "--parts", "single:9", "--limit", "9", "--peer-path", "/peer"], 2),
        (gpu, ["--set", "weights=int4", "--set", "lookahead=-1", "--prefill", "", "--rounds", "5"], 4),
        (kernels, ["--families", "stream,bulk", "--formats", "int3g128z", "--batches", "1,4", "--context", "64"], 4),
        (kv, ["--model", MODEL, "--set", "weights=int4", "--rounds", "5", "--tokens", "8", "--device", "cuda"], 5),
        (kv_quality, ["--model", MODEL, "--text", TEXT, "--calibrate", OTHER, "--only", "k2v(2|1.5)g128$"], 4),
        (launches, ["--model", "shape:tiny", "--set", "weights=int4", "--device", "cpu"], 3),
        (moe, ["--formats", "bfloat16,mixed 4 bits", "--skew", "0.5"], 2),
        (mxmoe, ["--model", MODEL, "--calibrate", TEXT, "--text", OTHER, "--device", "cuda", "--rotate"], 5),
        (mxmoe, ["--model", "moe", "--calibrate", TEXT, "--text", OTHER, "--picture", "/results/a.png"], 3),
        (phases, ["--model", MODEL, "--lengths", TEXT, "--device", "cuda", "--resume", "--name", "x"], 3),
        (quality_gpu, ["--model", MODEL, "--text", TEXT, "--device", "cpu"], 3),
        (soak, ["--seed", "7", "--rate", "2.5", "--minutes", "8", "--judged", "60", "--set", "schedule=phases"], 5),
        (vlm, ["--model", MODEL, "--data", "/data/train", "--held-out", "/data/held", "--apart", ""], 4),
    ],
    ids=lambda value: value.__name__.rpartition(".")[2] if isinstance(value, ModuleType) else "",
)
def test_the_stored_command_measures_the_same(module: ModuleType, given: list[str], left: int) -> None:
    parser = module.make_parser()
    command = again(parser, parser.parse_args([*given, *PLACE]))
    _check(parser, command, given)
    assert command.count("--") == left


@pytest.mark.parametrize(
    "given",
    [
        ["ablation", "--data", "tweets=/data/tweets,emoji", "--text", MODEL, "--jobs", "8", "--device", "cuda"],
        ["serving", "--size", "base", "--against", "--rate", "2.5", "--model", "shape:llama-3-8b"],
    ],
)
def test_each_kind_of_the_classifier_too(given: list[str]) -> None:
    parser, kinds = sentiment.make_parser()
    command = again(kinds[given[0]], parser.parse_args([*given, *PLACE]))
    _check(parser, command, given)
    assert "--data tweets=tweets,emoji" in command or given[0] == "serving"


def _check(parser: argparse.ArgumentParser, command: str, given: list[str]) -> None:
    """It parses, begins with the program, and says what was given but for folders and places."""
    program = parser.prog.split()
    words = shlex.split(command)
    assert words[: len(program)] == program
    assert "/" not in command.replace("shape:", "")
    assert again_of(parser, words[len(program) :]) == again_of(parser, given)


def again_of(parser: argparse.ArgumentParser, words: list[str]) -> dict[str, str]:
    """What a command line means, paths by their last names, places aside."""
    places = ("limit", "name", "out", "peer_path", "picture", "resume")
    found = vars(parser.parse_args(words))
    return {name: portable(str(value)).rpartition("/")[2] for name, value in found.items() if name not in places}


def test_paths_of_this_machine_are_told_by_their_last_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for text, found in {
        "/weights/model.gguf": "model.gguf",
        "~/weights/model/": "model",
        "folder/model": "model",
        "Qwen/Qwen3-8B": "Qwen/Qwen3-8B",
        "shape:llama-3-8b@layers=1,positions=8": "shape:llama-3-8b@layers=1,positions=8",
        "tweets=/data/tweets,emoji": "tweets=tweets,emoji",
        "": "",
    }.items():
        assert portable(text) == found
    assert spelled("p", [("--a", Path("x/y")), ("--b", True), ("--c", 2.0), ("--d", ["1", "2"]), ("--key", "k")]) == (
        "p --a y --b --c 2 --d 1 --d 2"
    )


def test_a_result_is_written_whole_and_without_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "a.json"
    given = {"model": "/weights/m", "settings": {"tenfold": {"table": "/tables/t.json", "lookahead": 0}}, "machine": {}}
    save(path, given, "abc")
    before = json.loads(path.read_text())
    assert before == {
        "model": "m",
        "settings": {"tenfold": {"table": "t.json", "lookahead": 0}},
        "machine": {"commit": "abc"},
    }
    monkeypatch.setattr("os.replace", lambda *paths: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        save(path, given, "def")
    assert json.loads(path.read_text()) == before


def test_results_of_another_commit_or_torch_are_others() -> None:
    before = {"commit": "a", "torch": "2.9", "date": "1"}
    assert unlike(before, before | {"date": "2"}) == ""
    assert unlike(before, before | {"commit": "b"}) == "commit a, now b"
    assert unlike(before, {}) == "commit a, now None, torch 2.9, now None"
