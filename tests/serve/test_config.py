"""The configuration file: what may stand in it, what comes before it, and what `tenfold config` tells."""

import json
import os
import stat
import tomllib

import pytest
import typer

from tenfold.base.config import EngineConfig
from tenfold.serve.cli import commands, config
from tenfold.serve.cli.config_file import LARGEST, find, read
from tenfold.serve.cli.sources import DEFAULT, Given, settle
from tenfold.serve.settings import ServeConfig

TOML = """
port = 8001
"max-body" = "2M"
allowed_hosts = ["a.example", "b.example"]
watchdog = 5
kv_dtype = "float16"

[[models]]
name = "small"
model = "default"
max_batch = 4

[[models]]
model = "./big.gguf"
"""

YAML = """
port: 8001
max-body: 2M
allowed_hosts: [a.example, b.example]
watchdog: 5
kv_dtype: float16
models:
  - {name: small, model: default, max_batch: 4}
  - model: ./big.gguf
"""


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("TENFOLD_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))


@pytest.fixture
def write(tmp_path):
    def make(content, name="c.toml"):
        path = tmp_path / name
        path.write_text(content)
        return path

    return make


@pytest.fixture
def tenfold(capsys):
    """`tenfold("config", "show")` is its exit status and output."""

    def run(*arguments):
        status = typer.main.get_command(commands.app).main(list(arguments), standalone_mode=False)
        return status or 0, capsys.readouterr().out

    return run


@pytest.mark.parametrize(("name", "content"), [("c.toml", TOML), ("c.yaml", YAML), ("c.yml", YAML)])
def test_a_file_reaches_the_settings(write, tmp_path, name, content):
    settled = settle({}, [], read(write(content, name)))
    assert settled.server == ServeConfig(port=8001, max_body=2 << 20, allowed_hosts="a.example,b.example", watchdog=5.0)
    assert isinstance(settled.server.watchdog, float)
    small, big = settled.models
    assert (small.name, big.name) == ("small", "")
    assert small.config == EngineConfig(model="default", kv_dtype="float16", max_batch=4)
    assert big.config == EngineConfig(model=str(tmp_path / "big.gguf"), kv_dtype="float16")


def test_flag_before_environment_before_file_before_default(write, monkeypatch, tenfold):
    file = write("port = 1\nmax_n = 2\nmax_stop = 3\nmax_batch = 4\n")
    monkeypatch.setenv("TENFOLD_PORT", "5")
    monkeypatch.setenv("TENFOLD_MAX_N", "6")
    _, out = tenfold("config", "show", "--json", "--config", str(file), "--port", "7")
    shown = json.loads(out)
    server, (model,) = shown["server"], shown["models"]
    assert server["port"] == {"value": 7, "origin": "--port"}
    assert server["max_n"] == {"value": 6, "origin": "TENFOLD_MAX_N"}
    assert server["max_stop"] == {"value": 3, "origin": str(file)}
    assert server["max_tools"] == {"value": 128, "origin": "default"}
    assert model["max_batch"] == {"value": 4, "origin": str(file)}


def test_a_flag_comes_before_the_table_of_a_model(write):
    file = read(write(TOML))
    settled = settle({"max_batch": Given(9, "--max-batch")}, [], file)
    assert [m.config.max_batch for m in settled.models] == [9, 9]
    assert settled.models[0].origins["max_batch"] == "--max-batch"
    assert settled.models[0].origins["kv_dtype"] == str(file.path)
    assert settled.models[0].origins["model"] == f"{file.path} models[0]"
    assert settled.origins["host"] == DEFAULT


def test_a_name_of_the_file_may_be_given_for_a_model(write):
    file = read(write(TOML))
    (model,) = settle({}, [Given("small", "argument")], file).models
    assert (model.name, model.config.model, model.config.max_batch) == ("small", "default", 4)
    (other,) = settle({}, [Given("other.gguf", "argument")], file).models
    assert (other.name, other.config.model, other.config.max_batch) == ("", "other.gguf", 0)


def test_config_reaches_other_commands(write, monkeypatch):
    calls = []
    monkeypatch.setattr(commands, "body", lambda name: lambda *a, **k: calls.append(a))
    monkeypatch.setenv("TENFOLD_CONFIG", str(write(TOML)))
    typer.main.get_command(commands.app).main(["explain"], standalone_mode=False)
    assert calls == [(EngineConfig(model="default", kv_dtype="float16", max_batch=4),)]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("pport = 8001", ["pport is no setting", "did you mean port?"]),
        ("port = '8001'", ["port is '8001'", "a whole number"]),
        ("port = true", ["port is True", "a whole number"]),
        ("port = 1.5", ["port is 1.5", "a whole number"]),
        ("access_log = 1", ["access_log is 1", "true or false"]),
        ("host = 1", ["host is 1", "a text"]),
        ("watchdog = 'x'", ["watchdog is 'x'", "a number"]),
        ("max_body = '3Q'", ["max_body", "'3Q' is not a size"]),
        ("log_format = 'xml'", ["log_format is 'xml'", "text, json"]),
        ("dtype = 'int3'", ["dtype is 'int3'", "bfloat16"]),
        ("allowed_hosts = [1]", ["allowed_hosts is [1]", "a list"]),
        ("allowed_hosts = ['a,b']", ["allowed_hosts"]),
        ("max_n = 1\nmax-n = 2", ["max-n and max_n are the same"]),
        ("max_n = 1\nmax_n = 2", ["cannot be read"]),
        ("port =", ["cannot be read"]),
        ("models = 3", ["models", "[[models]]"]),
        ("[models]\nmodel = 'x'", ["[[models]]"]),
        ("[[models]]\nname = 'x'", ["models[0].model is missing"]),
        ("[[models]]\nmodel = 'x'\nport = 3", ["models[0].port cannot stand here"]),
        ("[[models]]\nmodel = 'x'\nmax_bach = 3", ["models[0].max_bach", "did you mean max_batch?"]),
        ("model = 'x'\n[[models]]\nmodel = 'y'", ["both model and [[models]]"]),
        ("[[models]]\nmodel='x'\nname='a'\n[[models]]\nmodel='y'\nname='a'", ["name 'a'"]),
        ("[server]\nport = 3", ["server is no setting"]),
        ("api_key = 3", ["api_key is ..."]),
    ],
)
def test_mistakes_in_toml_name_the_file_and_the_key(write, content, words):
    path = write(content)
    with pytest.raises(ValueError, match=r"c\.toml") as raised:
        read(path)
    assert all(word in str(raised.value) for word in words), str(raised.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a: &x [1]\nport: *x", "aliases"),
        ("port: 1\nport: 2", "twice"),
        ("- 1", "holds no settings"),
        ("port: [", "cannot be read"),
        ("port: 2026-01-01", "a whole number"),
        ("!!python/object/apply:os.system ['true']", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("? [1]\n: 2", "cannot be read"),
        ("\x00", "cannot be read"),
    ],
)
def test_mistakes_in_yaml(write, content, words):
    with pytest.raises(ValueError, match=words):
        read(write(content, "c.yaml"))


@pytest.mark.parametrize("name", ["c.toml", "c.yaml"])
def test_an_empty_file_sets_nothing(write, name):
    assert settle({}, [], read(write("", name))).server == ServeConfig()


def test_files_that_are_none(write, tmp_path):
    with pytest.raises(ValueError, match=r"\.toml, \.yaml, \.yml"):
        read(write("{}", "c.json"))
    with pytest.raises(ValueError, match="larger than"):
        read(write("#" * (LARGEST + 1)))
    (tmp_path / "bytes.toml").write_bytes(b"port = '\xff'")
    with pytest.raises(ValueError, match="cannot be read"):
        read(tmp_path / "bytes.toml")
    with pytest.raises(ValueError, match=r"--config is 'no\.toml'"):
        find("no.toml")


def test_where_a_file_is_looked_for(tmp_path, monkeypatch, write):
    monkeypatch.chdir(tmp_path)
    for name in ("config.toml", "tenfold.toml"):
        (tmp_path / name).write_text("insecure = true")
    assert find(None) is None  # the working directory may be somebody else's
    home = tmp_path / "home" / "tenfold"
    home.mkdir(parents=True)
    (home / "config.yaml").touch()
    assert find(None) == home / "config.yaml"
    monkeypatch.setenv("TENFOLD_HOME", str(tmp_path))
    assert find(None) == tmp_path / "config.toml"
    monkeypatch.setenv("TENFOLD_CONFIG", str(write("")))
    assert find(None) == tmp_path / "c.toml"
    monkeypatch.setenv("TENFOLD_CONFIG", "")
    assert find(None) is None
    monkeypatch.delenv("TENFOLD_CONFIG")
    (tmp_path / "config.yml").touch()
    with pytest.raises(ValueError, match="keep one"):
        find(None)


def test_secrets_are_never_printed(write, monkeypatch, tenfold):
    file = write('api_key = "sk-from-file"')
    monkeypatch.setenv("TENFOLD_ADMIN_KEY", "sk-from-environment")
    for arguments in ([], ["--origin"], ["--json"], ["--json", "--api-key", "sk-from-flag"]):
        _, out = tenfold("config", "show", "--config", str(file), *arguments)
        assert "sk-" not in out
        assert "api_key" in out
    assert json.loads(out)["server"]["admin_key"] == {"value": "set", "origin": "TENFOLD_ADMIN_KEY"}
    assert "sk-" not in repr(settle({}, [], read(file)).server)


def test_what_is_shown_can_be_read_again(write, tenfold):
    _, out = tenfold("config", "show", "--origin", "--config", str(write(TOML)), "--port", "9")
    assert "port = 9                                  # --port" in out.splitlines()
    again = settle({}, [], read(write(out, "again.toml")))
    assert again.server.port == 9
    assert [m.name for m in again.models] == ["small", ""]
    assert again.models[0].config.max_batch == 4


def test_unknown_variables_are_told(monkeypatch, capfd):
    monkeypatch.setenv("TENFOLD_MAX_BACH", "3")
    typer.main.get_command(commands.app).main(["config", "show"], standalone_mode=False)
    assert "TENFOLD_MAX_BACH is set, but there is no such setting" in capfd.readouterr().err


def test_init_writes_a_file_that_changes_nothing(tenfold, tmp_path):
    place = tmp_path / "home" / "tenfold" / "config.toml"
    assert tenfold("config", "path") == (1, f"{place}\n")
    assert tenfold("config", "init") == (0, f"{place}\n")
    assert tenfold("config", "path") == (0, f"{place}\n")
    assert stat.S_IMODE(place.stat().st_mode) == 0o600
    settled = settle({}, [], read(find(None)))
    assert settled.server == ServeConfig()
    assert settled.config == EngineConfig()
    with pytest.raises(ValueError, match="is there already"):
        tenfold("config", "init")


def test_the_template_shows_every_setting_at_its_default():
    settings = [line[2:] for line in config.template().splitlines() if " = " in line and not line.startswith("# #")]
    lines = [line for line in settings if line.split(" = ")[0].isidentifier()]
    top = tomllib.loads("\n".join(lines[: -len(config.MODELS_TEMPLATE) + 2]))
    for kind in (ServeConfig, EngineConfig):
        assert {f: top[f] for f in kind.__dataclass_fields__} == {
            name: field.default for name, field in kind.__dataclass_fields__.items()
        }


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_keys_that_others_may_read_are_noticed(write):
    path = write('api_key = "k"')
    path.chmod(0o644)
    assert read(path).exposed_secrets == ["api_key"]
    path.chmod(0o600)
    assert read(path).exposed_secrets == []
