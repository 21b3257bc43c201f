"""The command line as a program: quick help, options from the settings, failures a user understands."""

import gzip
import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import typer

from tenfold.base.config import EngineConfig, groups
from tenfold.engine.request import Output
from tenfold.quantize.mbq.run import Wish as Scaled
from tenfold.quantize.mxmoe.run import Wish
from tenfold.serve.cli import commands, failures
from tenfold.serve.cli.flags import parse_size
from tenfold.serve.cli.names import served_names
from tenfold.serve.cli.plan import as_flags
from tenfold.serve.cli.quantize import given, mixed_wish, scaled_wish, uniform_wish
from tenfold.serve.cli.quantize import run as quantize
from tenfold.serve.cli.sizes import format_size
from tenfold.serve.cli.sources import ChosenModel, split_name
from tenfold.serve.cli.terminal import Stopwatch, columns, safe, size
from tenfold.serve.settings import ServeConfig

DOCS = Path(__file__).parents[2] / "docs"


def tenfold(*arguments, **kwargs):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TENFOLD_")} | {"COLUMNS": "200"}
    environment |= {"TENFOLD_CONFIG": ""} | kwargs.pop("env", {})
    command = [sys.executable, "-m", "tenfold.serve.cli", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=environment, stdin=subprocess.DEVNULL, **kwargs
    )


@pytest.fixture
def ran(monkeypatch):
    """`ran("serve", "--port", "1")` is what the body of the command was given."""
    calls = []
    monkeypatch.setattr(commands, "body", lambda name: lambda *a, **k: calls.append((name, a, k)))
    for name in [name for name in os.environ if name.startswith("TENFOLD_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("TENFOLD_CONFIG", "")

    def run(*arguments):
        typer.main.get_command(commands.app).main(list(arguments), standalone_mode=False)
        return calls.pop()

    return run


def test_help_and_usage_errors_do_not_import_heavy_modules():
    code = (
        "import sys\n"
        "from tenfold.serve.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    print(end.code)\n"
        "print([m for m in ('torch', 'numpy', 'fastapi', 'uvicorn', 'tokenizers', 'jinja2') if m in sys.modules])"
    )
    for arguments, status in ((["--help"], "0"), (["serve", "--help"], "0"), (["run", "--nonsense"], "2")):
        result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)
        assert result.stdout.splitlines()[-2:] == [status, "[]"], result.stderr


def test_every_command_has_a_body_and_help():
    found = leaves(typer.main.get_command(commands.app))
    assert set(found) == set(commands.BODIES) - {"start templates"}
    assert all(command.help for command in found.values())


def leaves(group, before=""):
    """Commands by name, those of groups by both names."""
    found = {}
    for name, command in group.commands.items():
        found |= leaves(command, f"{name} ") if hasattr(command, "commands") else {before + name: command}
    return found


@pytest.mark.parametrize("command", ["run", "chat", "serve", "plan", "config show", "explain", "tune"])
def test_flags_are_the_fields_of_the_settings(command):
    parameters = {p.name: p for p in leaves(typer.main.get_command(commands.app))[command].params}
    kinds = [EngineConfig, ServeConfig] if command in ("serve", "config show") else [EngineConfig]
    for field in [f for kind in kinds for f in fields(kind)]:
        parameter = parameters[field.name]
        assert f"--{field.name.replace('_', '-')}" in parameter.opts
        assert parameter.help.startswith(field.metadata["help"])
        assert parameter.rich_help_panel == (groups(EngineConfig) | groups(ServeConfig))[field.name]
        if field.name != "model":
            assert parse(field, parameter.default) == field.default
            assert parameter.envvar == f"TENFOLD_{field.name.upper()}"


def parse(field, default):
    return parse_size(default) if field.metadata["unit"] == "bytes" else default


def test_flags_reach_the_settings(ran):
    name, (settled,), _ = ran(
        "serve", "x.gguf", "--max-batch", "3", "--no-prefix-cache", "--kv-memory", "2G", "--port", "9"
    )
    assert name == "serve"
    assert settled.config == EngineConfig(model="x.gguf", max_batch=3, prefix_cache=False, kv_memory=2 << 30)
    assert settled.server == ServeConfig(port=9)


def test_environment_reaches_the_settings(ran, monkeypatch):
    for name, value in {
        "MODEL": "a b",
        "MAX_BATCH": "4",
        "PREFIX_CACHE": "0",
        "API_KEY": "k",
        "MAX_BODY": "1M",
    }.items():
        monkeypatch.setenv(f"TENFOLD_{name}", value)
    _, (settled,), _ = ran("serve", "--max-batch", "5")
    assert settled.config == EngineConfig(model="a b", max_batch=5, prefix_cache=False)
    assert settled.server == ServeConfig(api_key="k", max_body=1 << 20)
    _, (config,), _ = ran("explain")
    assert config.model == "a b"


@pytest.mark.parametrize(
    ("arguments", "models"),
    [
        ([], [("", "default")]),
        (["a.gguf"], [("", "a.gguf")]),
        (["-m", "a.gguf", "--model", "small=b"], [("", "a.gguf"), ("small", "b")]),
        (["a", "b", "--model", "c"], [("", "a"), ("", "b"), ("", "c")]),
        (["org/name:Q4_K_M"], [("", "org/name:Q4_K_M")]),
        (["x=hub/a=b"], [("x", "hub/a=b")]),
        (["dir with blank/a=b"], [("", "dir with blank/a=b")]),
    ],
)
@pytest.mark.parametrize("command", ["serve", "plan"])
def test_several_models(ran, command, arguments, models):
    _, (settled, *_), _ = ran(command, *arguments)
    assert [(m.name, m.config.model) for m in settled.models] == models


def test_one_model_as_an_argument_or_an_option(ran, monkeypatch):
    monkeypatch.setenv("TENFOLD_MODEL", "from the environment")
    assert ran("chat")[1][0].model == "from the environment"
    assert ran("chat", "--model", "b")[1][0].model == "b"
    assert ran("chat", "a")[1][0].model == "a"
    assert ran("chat", "a", "--model", "a")[1][0].model == "a"
    with pytest.raises(ValueError, match="Two models are named, a and b"):
        ran("chat", "a", "--model", "b")


def test_an_existing_path_is_no_name(tmp_path):
    file = tmp_path / "a=b.gguf"
    file.touch()
    assert split_name(str(file)) == ("", str(file))
    assert split_name(f"x={file}") == ("x", str(file))


def test_run_takes_a_prompt_and_sampling(ran):
    _, (config, prompt), rest = ran(
        "run", "Hi", "--temperature", "0.5", "--stop", "a", "--stop", "b", "--seed", "3", "-q"
    )
    assert (config, prompt) == (EngineConfig(), "Hi")
    assert rest["sampling"]["temperature"] == 0.5
    assert rest["sampling"]["stop"] == ("a", "b")
    assert rest["sampling"]["seed"] == 3
    assert rest["quiet"]


@pytest.mark.parametrize(
    ("text", "count"), [("0", 0), ("17", 17), ("2k", 2048), ("1.5GiB", 3 << 29), ("3 MB", 3 << 20), ("1t", 1 << 40)]
)
def test_sizes(text, count):
    assert parse_size(text) == count
    assert parse_size(format_size(count)) == count


def test_names_of_models():
    def models(*chosen):
        return [ChosenModel(name, EngineConfig(model=model), {}) for name, model in chosen]

    assert served_names(models(("", "default"))) == ["SmolLM2-135M-Instruct"]
    assert served_names(models(("", "default")), "mine") == ["mine"]
    assert served_names(models(("a", "default"), ("", "org/b"))) == ["a", "org/b"]
    with pytest.raises(ValueError, match="Two models are called 'org/b'"):
        served_names(models(("", "org/b"), ("", "org/b")))
    with pytest.raises(ValueError, match="NAME=MODEL"):
        served_names(models(("a", "default"), ("b", "default")), "mine")


@pytest.mark.parametrize("text", ["x", "1Q", "-", "1e999", "G", "-5", "-1G"])
def test_wrong_sizes(text):
    with pytest.raises(typer.BadParameter, match="bytes"):
        parse_size(text)


def test_docs_name_every_command():
    text = (DOCS / "cli.md").read_text()
    for name in leaves(typer.main.get_command(commands.app)):
        assert f"\ntenfold {name} " in text


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("tenfold serve --ho", "--host"),
        ("tenfold config sh", "show"),
        ("tenfold serve --log-format j", "json"),
        ("tenfold chat --kv-dt", "--kv-dtype"),
    ],
)
def test_completion_offers_without_heavy_imports(line, offered):
    words = line.split()
    code = (
        "import sys\n"
        "from tenfold.serve.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print([m for m in ('torch', 'numpy', 'fastapi', 'uvicorn', 'tokenizers', 'jinja2') if m in sys.modules])"
    )
    asked = {"_TENFOLD_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=dict(os.environ) | asked
    )
    *offers, heavy = result.stdout.splitlines()
    assert offered in offers, result.stderr
    assert heavy == "[]"


def test_help_shows_groups_units_environment_and_examples():
    text = tenfold("serve", "--help").stdout
    for word in (
        "Limits of one request",
        "SECONDS",
        "SIZE",
        "TENFOLD_MAX_BATCH",
        "--model small=default",
        "[default: 8M]",
    ):
        assert word in text


def test_version():
    result = tenfold("--version")
    assert result.returncode == 0
    assert result.stdout.startswith("tenfold 0.")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["rnu"], "run"),
        (["run", "--max-tokens", "0", "x"], "--max-tokens"),
        (["run", "--max-batch", "many", "x"], "--max-batch"),
        (["serve", "--kv-memory", "3Q"], "--kv-memory"),
        (["serve", "--host", "0.0.0.0"], "--api-key"),
        (["serve", "--port", "70000"], "port is 70000"),
        (["run", "-"], "The prompt is empty"),
        (["run", "x", "--raw", "--system", "y"], "--system"),
    ],
)
def test_mistakes_get_a_sentence(arguments, words):
    result = tenfold(*arguments)
    assert result.returncode == 2
    assert words in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (ValueError("x is 3; allowed: 4."), 2, "error: x is 3; allowed: 4.\n"),
        (OSError("cannot listen"), 1, "error: cannot listen\n"),
        (RuntimeError("engine"), 1, "error: engine\n"),
        (typer.Abort(), 130, ""),
    ],
)
def test_failures(capsys, error, status, said):
    assert failures.report(error, debug=False) == status
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(("error", "debug"), [(ValueError("x"), True), (KeyError("a mistake of ours"), False)])
def test_failures_with_a_trace(error, debug):
    with pytest.raises(type(error)):
        failures.report(error, debug)


def test_a_reader_that_leaves_is_no_failure_to_talk_about():
    command = f"{sys.executable} -m tenfold.serve.cli --help | head -c 1"
    result = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60)
    assert result.stderr == ""


def test_closed_standard_files_are_filled():
    code = (
        "import os, sys, tenfold.serve.cli as cli\n"
        "cli.fill_standard_files()\n"
        "print('to nobody', file=sys.stderr)\n"
        "new = os.open('.', os.O_RDONLY)\n"
        "os._exit(0 if new > 2 and os.fstat(2).st_rdev == os.stat(os.devnull).st_rdev else 1)"
    )
    command = f'{sys.executable} -c "{code}"'
    for closed in ("<&- 2>&-", "<&- >&- 2>&-", "2>&-"):
        assert subprocess.run(f"{command} {closed}", shell=True, timeout=60).returncode == 0


def test_settings_in_sentences_become_flags():
    assert (
        as_flags("Any of these: max_batch=8; kv_dtype=float16.") == "Any of these: --max-batch 8; --kv-dtype float16."
    )


def test_control_characters_do_not_reach_a_terminal():
    text = "a\x1b[2Jb\x07\x9b\tc\nd"
    assert safe(text, True) == "a[2Jb\tc\nd"
    assert safe(text, False) == text


def test_columns():
    assert columns([("A", "B"), ("long", "x")]) == "A     B\nlong  x"


def test_sizes_for_people():
    assert [size(n) for n in (999, 98_362_432, 2 * 10**9)] == ["1 kB", "98.4 MB", "2.0 GB"]


def test_stopwatch():
    watch = Stopwatch(30, start=0.0)
    assert "no answer" in str(watch)
    watch.take(Output("r", 0, (1,), cached_tokens=16))
    watch.take(Output("r", 0, (2, 3)))
    watch.first, watch.last = 0.5, 1.5
    assert (
        str(watch) == "first token 0.50 s · prompt 14 tokens, 28 tokens/s · 16 cached · answer 3 tokens, 2.0 tokens/s"
    )


def test_quantize_wishes_what_its_options_say(ran, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("words")
    always = ("quantize", "folder", "--text", str(text), "--out", str(tmp_path / "out"))
    assert wish_of(ran(*always)) == Wish(4.25)
    given = {"bits": "3.25", "scope": "layer", "sensitivity": "layer", "tie": "expert", "rounding": "rtn", "r": "0.5"}
    asked = wish_of(ran(*always, *(word for name, value in given.items() for word in (f"--{name}", value))))
    assert asked == Wish(3.25, "", "rtn", "layer", 0.5, tie="expert", sensitivity="layer")


def test_quantize_takes_one_budget(ran, tmp_path):
    text, recipe = tmp_path / "text.txt", tmp_path / "recipe.json"
    text.write_text("words")
    recipe.write_text("{}")
    always = ("quantize", "folder", "--text", str(text), "--out", str(tmp_path / "out"))
    assert wish_of(ran(*always, "--bytes", "3.5GiB")) == Wish(0.0, bytes=7 << 29)
    assert wish_of(ran(*always, "--bytes", "12345")) == Wish(0.0, bytes=12345)
    assert wish_of(ran(*always, "--recipe", str(recipe))) == Wish(4.25)
    with pytest.raises(typer.BadParameter, match="'nan' is not a size"):
        ran(*always, "--bytes", "nan")
    for words, message in (
        (("--bits", "4", "--bytes", "1G"), "--bits 4 and --bytes 1073741824 are two budgets; give one of both"),
        (("--bits", "nan"), "The budget is nan bits a weight"),
        (("--bytes", "0"), "give one of both, above 0"),
        (("--recipe", str(recipe), "--bits", "2.25"), "--recipe has a budget of its own.*leave out --bits to follow"),
        (("--recipe", str(recipe), "--bytes", "1G"), "--recipe has a budget of its own.*leave out --bytes to follow"),
        (("--recipe", str(recipe), "--r", "0.5"), "--recipe has decided what --r would; leave out --r to follow"),
        (
            ("--recipe", str(recipe), "--schemes", "w4g128", "--tie", "layer", "--scope", "layer", "--tokens", "8"),
            "--recipe has decided what --schemes, --scope, --tie, --tokens would; leave out --schemes, --scope, --tie",
        ),
        (("--recipe", str(recipe), "--sensitivity", "layer"), "what --sensitivity would; leave out --sensitivity"),
    ):
        with pytest.raises(ValueError, match=message):
            wish_of(ran(*always, *words))


def test_quantize_wishes_for_models_that_see(ran, tmp_path):
    data = tmp_path / "pairs.jsonl"
    data.write_text("{}")
    always = ("quantize", "folder", "--data", str(data), "--out", str(tmp_path / "out"))
    _, asked, _, options = ran(*always)[1]
    assert (asked.method, asked.samples) == ("auto", 128)
    assert scaled_wish("mbq", asked, options) == Scaled("w4g128z")
    given = {"scheme": "w4a8", "tower": "w8a8", "norm": "mse", "floor": "none", "alpha": "0.7", "rounding": "gptq"}
    words = [word for name, value in given.items() for word in (f"--{name}", value)]
    _, asked, _, options = ran(*always, *words, "--weigh", "kinds", "--propagate")[1]
    wanted = Scaled("w4a8", "awq", "mse", "kinds", True, "none", 0.7, "gptq", "w8a8")
    assert scaled_wish("awq", asked, options) == wanted


@pytest.mark.parametrize("as_json", [False, True])
def test_quantize_makes_experts_of_one_scheme(ran, tiny, tmp_path, capsys, as_json):
    """By awq or rtn, as a dense model is made; what was done is printed, or the recipe."""
    pytest.importorskip("scipy")
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("The quick brown fox jumps over the lazy dog, and nobody knows why. " * 60)
    always = ("quantize", str(tiny("qwen2-moe-even")), "--text", str(text), "--out", str(out), "--window", "64")
    words = (*always, "--device", "cpu", "--method", "awq", "--scheme", "w4g32z", *(["--json"] if as_json else []))
    quantize(*ran(*words)[1])
    recipe = json.loads((out / "recipe.json").read_text())
    assert set(recipe["schemes"].values()) == {"w4g32z"}
    assert recipe["rounding"] == "awq"
    assert set(recipe["strengths"]) == {"0", "1", "2"}
    printed = capsys.readouterr().out
    assert json.loads(printed) == recipe if as_json else f"saved in {out}; run it with" in printed


@pytest.mark.parametrize("name", ["qwen2-moe-even", "llama"])
def test_quantize_refuses_what_is_no_text(name, ran, tiny, tmp_path):
    pytest.importorskip("scipy")
    text, out = tmp_path / "text.txt.gz", tmp_path / "out"
    text.write_bytes(gzip.compress(bytes(range(256)) * 100 + os.urandom(4000)))
    words = ("quantize", str(tiny(name)), "--text", str(text), "--out", str(out), "--device", "cpu")
    with pytest.raises(ValueError, match=r"is no text: .* of its characters are not UTF-8; give some thousand words"):
        quantize(*ran(*words)[1])
    assert not out.exists()


def test_quantize_knows_what_is_not_given(ran, tmp_path):
    (tmp_path / "text").write_text("words")
    _, asked, mixed, scaled = ran("quantize", "folder")[1]
    assert given(asked, mixed, scaled) == []
    words = ("--bits", "4.25", "--exact", "--held-out", str(tmp_path / "text"), "--samples", "127", "--r", "0.9")
    _, asked, mixed, scaled = ran("quantize", "folder", *words)[1]
    assert given(asked, mixed, scaled) == ["bits", "r", "propagate", "samples", "held_out"]


@pytest.mark.parametrize(
    ("model", "words", "message"),
    [
        ("llama", "--bits 3", "--bits says nothing of a dense model by awq on a text; leave it out. Allowed: --text"),
        ("llama", "--bytes 1G --rotate", "--bytes, --rotate say nothing of a dense model by awq on a text; leave them"),
        ("llama", "--samples 3", "--samples says nothing of a dense model by awq on a text"),
        ("llama", "--alpha 0.7", "--alpha says nothing of a dense model by awq"),
        ("llama", "--method rtn --norm mse", "--norm says nothing of a dense model by rtn"),
        ("llama", "--method smoothquant --norm mse", "--norm says nothing of a dense model by smoothquant"),
        ("llama", "--data HERE", "--text says nothing of a dense model by awq on pairs; leave it out. Allowed: --data"),
        ("llama", "--held-out HERE", "--held-out says nothing of a dense model by awq on a text"),
        (
            "llama",
            "--compare w4a8",
            "--out, --text say nothing of a comparison of methods; leave them out. Allowed: --d",
        ),
        (
            "qwen2-moe-even",
            "--scheme w2g128z",
            "--scheme says nothing of experts in mixed bits; leave it out, or take --method awq or rtn, for one "
            "scheme. Allowed: --text, --window, --windows, --bits, --bytes, --schemes, --scope, --r, --tie, --rotate",
        ),
        ("qwen2-moe-even", "--tower w8a8 --data HERE", "--tower, --data say nothing of experts in mixed bits"),
        (
            "qwen2-moe-even",
            "--method rtn --rotate --schemes w4g32z --tie layer --r 0.5 --scope layer --sensitivity layer --tokens 8",
            "--schemes, --scope, --r, --tie, --rotate, --sensitivity, --tokens say nothing of experts in one scheme by "
            "rtn; leave them out, or take --method mxmoe, for mixed bits. Allowed: --text, --window, --windows, "
            "--scheme.",
        ),
        ("qwen2-moe-even", "--method awq --bits 3", "--bits says nothing of experts in one scheme by awq"),
        ("qwen2-moe-even", "--method awq --norm mae --exact --floor none", "--norm, --propagate, --floor say nothing"),
    ],
)
def test_quantize_refuses_options_of_other_methods(ran, tiny, tmp_path, model, words, message):
    """Before anything is read or written."""
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("words")
    always = ("quantize", str(tiny(model)), "--text", str(text), "--out", str(out), "--device", "cpu")
    with pytest.raises(ValueError, match=re.escape(message)):
        quantize(*ran(*always, *words.replace("HERE", str(text)).split())[1])
    assert not out.exists()


def test_quantize_refuses_what_a_recipe_has_decided_of_experts(ran, tmp_path):
    text, recipe = tmp_path / "text.txt", tmp_path / "recipe.json"
    text.write_text("words")
    recipe.write_text("{}")
    always = ("quantize", "folder", "--text", str(text), "--out", str(tmp_path / "out"))
    _, asked, _, options = ran(*always, "--recipe", str(recipe))[1]
    assert uniform_wish("awq", asked, options).schemes == "w4g128z"
    for words, message in (
        (("--recipe", str(recipe), "--scheme", "w8"), "--recipe has decided what --scheme would; leave out --scheme"),
        (("--rounding", "gptq"), "rounding is 'gptq', which awq of a model with experts does not go with"),
    ):
        _, asked, _, options = ran(*always, *words)[1]
        with pytest.raises(ValueError, match=message):
            uniform_wish("awq", asked, options)


@pytest.mark.parametrize("r", ["1", "0.5"])
@pytest.mark.parametrize("matplotlib", [True, False])
def test_quantize_shows_the_front(ran, tiny, tmp_path, capsys, monkeypatch, matplotlib, r):
    """As a table with the chosen point, and as a picture where that can be drawn. Without a GPU there are no times."""
    pytest.importorskip("scipy")
    if matplotlib:
        pytest.importorskip("matplotlib")
    monkeypatch.setattr("tenfold.serve.cli.quantize.drawable", lambda: matplotlib)
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("The quick brown fox jumps over the lazy dog, and nobody knows why. " * 60)
    always = ("quantize", str(tiny("qwen2-moe-even")), "--text", str(text), "--out", str(out), "--window", "64")
    quantize(*ran(*always, "--device", "cpu", "--bits", "5.5", "--schemes", "w2g32z,w4g32z,w8g32z", "--r", r)[1])
    front = json.loads((out / "recipe.json").read_text())["front"]
    printed = capsys.readouterr().out.splitlines()
    head = next(i for i, line in enumerate(printed) if line.split() == ["bits", "size", "loss", "bits", "read"])
    rows = [line.split() for line in printed[head + 1 : head + 1 + len(front)]]
    assert [row[0] for row in rows] == [f"{corner['bits']:.3f}" for corner in front]
    assert [row[-1] == "chosen" for row in rows] == [corner["chosen"] for corner in front]
    assert (out / "front.png").exists() == matplotlib
    wanted = f"The front as a picture: {out / 'front.png'}" if matplotlib else "needs matplotlib; install it with: pip"
    assert any(wanted in line for line in printed)


def wish_of(call):
    _, asked, mixed, _ = call[1]
    return mixed_wish(asked, mixed)
