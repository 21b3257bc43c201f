"""Models of the Hugging Face hub: found in its cache here, or downloaded through `huggingface_hub` (optional).

Invariant: only weights in safetensors or GGUF, JSON, tokenizer and template files are fetched; no pickles, no code.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tenfold.base.table import entry
from tenfold.weights.checkpoint import CheckpointError
from tenfold.weights.gguf import parts
from tenfold.weights.home import hub_folder

# The optional package, loaded only to download.
LIBRARY = {"api": "huggingface_hub:HfApi", "snapshot": "huggingface_hub:snapshot_download"}

SECONDS = 20.0  # to wait for the list of files

WORD = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
NAME = re.compile(rf"(?P<repo>{WORD}/{WORD})(?::(?P<file>[A-Za-z0-9_][A-Za-z0-9_.+/-]{{0,200}}))?")
COMMIT = re.compile(r"[0-9A-Za-z_.-]{1,64}")
FOLDER_FILE = re.compile(
    r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json|config\.json|generation_config\.json|"
    r"tokenizer\.json|tokenizer_config\.json|tokenizer\.model|special_tokens_map\.json|chat_template\.(jinja|json)|"
    r"(pre)?processor_config\.json|quant(ize)?_config\.json"
)
LATER_SHARD = re.compile(r".*-(?!00001)\d{5}-of-\d{5}\.gguf")


@dataclass(frozen=True, slots=True)
class HubName:
    """org/name, and the GGUF file or the quantisation asked for behind a colon ("" for none)."""

    repo: str
    file: str = ""


def parse_name(name: str) -> HubName | None:
    """`org/name`, `org/name:file.gguf` or `org/name:Q4_K_M`; None for what is no hub name."""
    match = NAME.fullmatch(name)
    if match is None or ".." in name or "--" in match["repo"] or name.endswith("/"):
        return None
    return HubName(match["repo"], match["file"] or "")


def in_cache(name: HubName) -> Path | None:
    """The cached folder, or the GGUF file asked for in it; None when it is not there or not complete enough to open."""
    folder = snapshot(hub_folder() / ("models--" + name.repo.replace("/", "--")))
    if folder is None:
        return None
    if not name.file and is_model_folder(folder) and is_whole(folder):
        return folder
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*.gguf")}
    found = matching(files, name.file)
    return files[found[0]] if len(found) == 1 and all(part.exists() for part in parts(files[found[0]])) else None


def snapshot(repo: Path) -> Path | None:
    """The snapshot that `refs/main` names, or the only one there is."""
    snapshots = repo / "snapshots"
    try:
        commit = (repo / "refs" / "main").read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        folders = [path for path in snapshots.iterdir() if path.is_dir()] if snapshots.is_dir() else []
        return folders[0] if len(folders) == 1 else None
    folder = snapshots / commit
    return folder if COMMIT.fullmatch(commit) and ".." not in commit and folder.is_dir() else None


def is_model_folder(folder: Path) -> bool:
    weights = ("model.safetensors", "model.safetensors.index.json")
    return (folder / "config.json").is_file() and any((folder / name).is_file() for name in weights)


def is_whole(folder: Path) -> bool:
    """Whether a model folder has all files that its index names: an interrupted download leaves some out. A broken
    index is for who opens it.
    """
    if (folder / "model.safetensors").is_file():
        return True
    try:
        files = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"].values()
        return all((folder / name).is_file() for name in set(files))
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return True


def cached_models() -> Iterator[tuple[str, Path]]:
    """Names and paths of all models in the cache that can be opened, each GGUF file by itself."""
    root = hub_folder()
    for repo in sorted(root.glob("models--*--*")) if root.is_dir() else ():
        name = repo.name.removeprefix("models--").replace("--", "/", 1)
        folder = snapshot(repo)
        if folder is None:
            continue
        if is_model_folder(folder) and is_whole(folder):
            yield name, folder
        files = sorted(folder.rglob("*.gguf"))
        for path in files:
            if not LATER_SHARD.fullmatch(path.name) and all(part.exists() for part in parts(path)):
                yield f"{name}:{path.relative_to(folder)}", path


def matching(files: Iterable[str], wanted: str) -> list[str]:
    """GGUF files a name asks for: the exact file, else those of the quantisation, else all; of a split model part 1."""
    files = sorted(file for file in files if file.endswith(".gguf") and not LATER_SHARD.fullmatch(file))
    if wanted in files or wanted.endswith(".gguf"):
        return [wanted] if wanted in files else []
    tag = re.compile(rf"(.*[^A-Za-z0-9])?{re.escape(wanted)}([^A-Za-z0-9_].*)?", re.IGNORECASE)
    return [file for file in files if tag.fullmatch(file.removesuffix(".gguf"))] if wanted else files


def download(name: HubName) -> Path:
    """Fetch a model into Hugging Face's cache; the library shows its own progress bars. Raises CheckpointError."""
    try:
        api, fetch = (entry(LIBRARY, key, "hub") for key in ("api", "snapshot"))
    except ImportError as error:
        raise CheckpointError(
            f"{name.repo} is not on this machine, and downloading needs another package; "
            "run: pip install huggingface-hub."
        ) from error
    try:
        # Not list_repo_files: without a network that one tries again for half a minute.
        siblings = api().model_info(name.repo, timeout=SECONDS).siblings or []
        chosen = choose_files(name, [file.rfilename for file in siblings])
        folder = Path(fetch(name.repo, allow_patterns=chosen))
    except CheckpointError:
        raise
    except Exception as error:  # the library and the HTTP client under it raise a dozen unrelated kinds
        raise CheckpointError(explain(name, error)) from error
    return folder / chosen[0] if chosen[0].endswith(".gguf") else folder


def choose_files(name: HubName, files: list[str]) -> list[str]:
    """What to fetch of a repository: a model folder's files, or a GGUF file and its other parts, the first first."""
    folder = [file for file in files if FOLDER_FILE.fullmatch(file)]
    if not name.file and "config.json" in folder and any(file.endswith(".safetensors") for file in folder):
        return folder
    found = [file for file in matching(files, name.file) if re.fullmatch(r"[\w.+/ -]+", file) and ".." not in file]
    if len(found) == 1:
        return [found[0], *other_parts(found[0], files)]
    offered = ", ".join(matching(files, "")[:20])
    if not offered:
        raise CheckpointError(
            f"{name.repo} holds neither safetensors nor GGUF files; pick another version of this model."
        )
    problem = f"{len(found)} GGUF files match" if found else "no such GGUF file is there"
    raise CheckpointError(
        f"{name.repo}{':' + name.file if name.file else ''}: {problem}; give {name.repo}:FILE with one of {offered}."
    )


def other_parts(first: str, files: list[str]) -> list[str]:
    stem, part, rest = first.partition("-00001-of-")
    return [
        file
        for file in files
        if part and file != first and re.fullmatch(re.escape(stem) + r"-\d{5}-of-" + re.escape(rest), file)
    ]


def explain(name: HubName, error: Exception) -> str:
    """One sentence for a failed download, with what to do."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if "GatedRepoError" in kinds:
        return f"{name.repo} is gated: accept its terms on huggingface.co and log in with `hf auth login`."
    if "RepositoryNotFoundError" in kinds:
        return f"{name.repo} is not known to the hub (or private): check the name, or log in with `hf auth login`."
    first = (str(error).strip().splitlines() or [""])[0]
    return (
        f"{name.repo} is not on this machine and could not be downloaded ({type(error).__name__}: {first[:160]}); "
        "check the network, or give the path of a model folder or .gguf file."
    )
