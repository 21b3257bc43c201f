"""`HFCheckpoint`: a folder as Hugging Face lays models out: config.json, safetensors files, tokenizer files.

Invariant: no file outside the folder's own list is opened, no code in it is run, and no pickle is read.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from torch import Tensor

from tenfold.ops.matrix import RawTensor
from tenfold.weights.checkpoint import CheckpointError
from tenfold.weights.foreign.linear import Files, Linear
from tenfold.weights.foreign.table import foreign_linears, hidden
from tenfold.weights.hf_config import normalise, text_prefixes
from tenfold.weights.mapped import read_object, read_text
from tenfold.weights.processor import processor_settings
from tenfold.weights.safetensors import SafetensorsFile
from tenfold.weights.sentencepiece import read_model, sentencepiece_tokenizer, surround

MAX_CONFIG = 1 << 24
MAX_INDEX = 1 << 26
MAX_TOKENIZER = 1 << 28
MAX_TEMPLATE = 1 << 22
MAX_FILES = 1 << 12
SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")
OLDER_SETTINGS = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


class HFCheckpoint:
    """A model folder as a `Checkpoint`. Raises CheckpointError for what is damaged or incomplete."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not (path / "config.json").is_file():
            raise CheckpointError(
                f"{path} has no config.json; give the folder of a Hugging Face model, or a .gguf file."
            )
        self.config = normalise(read_object(path / "config.json", MAX_CONFIG), str(path / "config.json"))
        self.files = [SafetensorsFile(file) for file in weight_files(path)]
        self._names = self._owners()
        self._linears: dict[str, Linear] = {}
        self._hidden: frozenset[str] = frozenset()
        self._quantised(self.config.pop("quantization_config", None) or older_settings(path))
        if "composite" in self.config:  # their configs say so in several places, not all of them right
            self.config["tie_word_embeddings"] = "lm_head.weight" not in self
            self.config["processor"] = processor_settings(path)
        tokenizer_config = optional_object(path / "tokenizer_config.json")
        self.chat_template = chat_template(path, tokenizer_config)
        self.special = special_tokens(path, tokenizer_config)
        self._tokenizer: Tokenizer | None = None
        self._add_ends = (tokenizer_config.get("add_bos_token", True), tokenizer_config.get("add_eos_token", False))
        self.eos_ids = self._end_tokens()

    def names(self) -> Iterable[str]:
        return [*(name for name in self._names if name not in self._hidden), *self._linears]

    def __contains__(self, name: str) -> bool:
        return name in self._linears or (name in self._names and name not in self._hidden)

    def tensor(self, name: str) -> RawTensor:
        if name in self._linears:
            return self._linears[name].raw()
        if name not in self:
            raise CheckpointError(f"{self.path} holds no tensor {name}; it is incomplete or of another architecture.")
        file, stored = self._names[name]
        raw = file.raw(stored)
        return RawTensor(name, raw.storage, raw.shape, raw.data)

    def stored_name(self, name: str) -> str:
        """What the file calls a tensor that models know by this name. Raises KeyError."""
        return self._names[name][1]

    def _quantised(self, settings: Any) -> None:
        """Put quantised weights in the place of the tensors that hold them."""
        if settings is None:
            return
        entries = {name: file.tensors[stored] for name, (file, stored) in self._names.items()}
        files = Files(self.path, entries, self._part, self.stored_name)
        self._linears = foreign_linears(settings, files)
        self._hidden = hidden(files, self._linears)

    def _part(self, name: str) -> Tensor:
        file, stored = self._names[name]
        return file.part(stored)

    def storages(self) -> dict[str, int]:
        """Bytes of each storage type in the files, largest first."""
        bytes_of: dict[str, int] = {}
        for file in self.files:
            for entry in file.tensors.values():
                bytes_of[entry.storage] = bytes_of.get(entry.storage, 0) + entry.nbytes
        return dict(sorted(bytes_of.items(), key=lambda item: -item[1]))

    def _end_tokens(self) -> tuple[int, ...]:
        """What generation_config.json says, else config.json, else the tokenizer's end-of-sequence token."""
        generation = optional_object(self.path / "generation_config.json")
        ids = whole(generation.get("eos_token_id")) or whole(self.config.get("eos_token_id"))
        if not ids and "eos_token" in self.special:
            ids = whole(self.tokenizer().token_to_id(self.special["eos_token"]))
        return ids

    def tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            self._tokenizer = self._read_tokenizer()
        return self._tokenizer

    def _read_tokenizer(self) -> Tokenizer:
        path = self.path / "tokenizer.json"
        if path.is_file():
            text = read_text(path, MAX_TOKENIZER)
            try:
                tokenizer = Tokenizer.from_str(text)
            except Exception as error:  # the library raises bare Exception for whatever is wrong
                raise CheckpointError(
                    f"{path} is not a usable tokenizer ({str(error)[:100]}); download it again."
                ) from error
            # A file may ask to cut or fill every text to one length: training settings, wrong for serving.
            tokenizer.no_truncation()
            tokenizer.no_padding()
            return tokenizer
        model = self.path / "tokenizer.model"
        if not model.is_file():
            raise CheckpointError(
                f"{self.path} has neither tokenizer.json nor tokenizer.model; download one of them into it."
            )
        pieces = read_model(model)
        tokenizer = sentencepiece_tokenizer(pieces)
        bos, eos = (
            self.special.get(key) if add else None for key, add in zip(("bos_token", "eos_token"), self._add_ends)
        )
        surround(tokenizer, {text: number for number, text in enumerate(pieces.texts)}, bos, eos)
        return tokenizer

    def _owners(self) -> dict[str, tuple[SafetensorsFile, str]]:
        """Our names to the file that holds each tensor, and its name there."""
        prefixes = text_prefixes(self.config)
        owners: dict[str, tuple[SafetensorsFile, str]] = {}
        for file in self.files:
            for stored in file.tensors:
                name = text_name(stored, prefixes)
                if name is None:
                    continue
                if name in owners:
                    raise CheckpointError(
                        f"{file.path} and {owners[name][0].path.name} both hold the tensor {name}; download it again."
                    )
                owners[name] = (file, stored)
        return owners


def older_settings(folder: Path) -> dict[str, Any] | None:
    """Settings of quantisation from the files where they stood before config.json held them; None without any."""
    for name, method in OLDER_SETTINGS.items():
        if (folder / name).is_file():
            return {"quant_method": method, **read_object(folder / name, MAX_CONFIG)}
    return None


def text_name(stored: str, prefixes: Mapping[str, str]) -> str | None:
    """Our name for a tensor of a composite model; None for one of a part that is not read."""
    if not prefixes:
        return stored
    prefix = max((p for p in prefixes if stored.startswith(p)), key=len, default=None)
    if prefix is None:
        return stored if stored.startswith("lm_head.") else None
    return prefixes[prefix] + stored[len(prefix) :]


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model: the one, or those its index lists. Raises CheckpointError."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if index.is_file():
        return indexed_files(index)
    if single.is_file():
        return [single]
    if any(next(folder.glob(pattern), None) for pattern in PICKLES):
        raise CheckpointError(
            f"{folder} holds its weights as pickle files, which can run any code and are not read; "
            "use a safetensors or GGUF version of this model."
        )
    raise CheckpointError(
        f"{folder} has no model.safetensors and no model.safetensors.index.json; the download is incomplete."
    )


def indexed_files(index: Path) -> list[Path]:
    weight_map = read_object(index, MAX_INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map of tensor names to files; it is damaged, download it again.")
    names = sorted(set(weight_map.values()))
    if len(names) > MAX_FILES:
        raise CheckpointError(f"{index} lists {len(names)} files; at most {MAX_FILES} are read.")
    for name in names:
        if Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{index} lists the file {name[:80]!r}; only safetensors files in the same folder are read."
            )
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index.parent} lacks {name}, which its index lists; the download is incomplete.")
    return [index.parent / name for name in names]


def optional_object(path: Path) -> dict[str, Any]:
    return read_object(path, MAX_CONFIG) if path.is_file() else {}


def chat_template(folder: Path, tokenizer_config: Mapping[str, Any]) -> str | None:
    """From chat_template.jinja, chat_template.json or tokenizer_config.json; of several the one named "default"."""
    if (folder / "chat_template.jinja").is_file():
        return read_text(folder / "chat_template.jinja", MAX_TEMPLATE)
    for source in (optional_object(folder / "chat_template.json"), tokenizer_config):
        template = source.get("chat_template")
        if isinstance(template, list):
            named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
            template = named.get("default")
        if isinstance(template, str) and template:
            return template
    return None


def special_tokens(folder: Path, tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """Names like "eos_token" to token strings; tokenizer_config.json counts before special_tokens_map.json."""
    found: dict[str, str] = {}
    for source in (optional_object(folder / "special_tokens_map.json"), tokenizer_config):
        for name in SPECIAL:
            value = source.get(name)
            content = value.get("content") if isinstance(value, dict) else value
            if isinstance(content, str) and content:
                found[name] = content
    return found


def whole(value: Any) -> tuple[int, ...]:
    """Token ids given as a number or a list of them; anything else is none."""
    values = value if isinstance(value, list) else [value]
    return tuple(number for number in values if type(number) is int and number >= 0)
