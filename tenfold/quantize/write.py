"""A quantised model's folder as it is written: a file of tensors at a time, and in its place only when it is whole."""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from tenfold.ops.blocks import DENSE
from tenfold.ops.formats import Format, Packed
from tenfold.quantize.schemes import Scheme, format_of_scheme
from tenfold.weights.checkpoint import Checkpoint
from tenfold.weights.foreign import compressed, own
from tenfold.weights.hf import MAX_CONFIG, HFCheckpoint
from tenfold.weights.mapped import read_object

INDEX = "model.safetensors.index.json"
# Whatever of a model's folder is neither weights nor config.
BESIDE = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *(
        "vocab.json",
        "merges.txt",
        "generation_config.json",
        "chat_template.jinja",
        "chat_template.json",
        "preprocessor_config.json",
        "processor_config.json",
    ),
)


def check_free(path: Path) -> None:
    """Raises ValueError where a folder cannot be made, since the path holds something."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} is there already; give a folder that is new or empty, or remove it.")


def config_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """config.json as it is in the folder. Raises ValueError for what is no folder of dense weights."""
    if not isinstance(checkpoint, HFCheckpoint):
        raise ValueError(f"{checkpoint.path} is no Hugging Face folder; quantise the original weights of this model.")
    for name in checkpoint.names():
        if (storage := checkpoint.tensor(name).storage) not in DENSE:
            raise ValueError(f"{checkpoint.path} is quantised already ({storage}); give the original weights.")
    return read_object(checkpoint.path / "config.json", MAX_CONFIG)


def check_layout(layout: str, scheme: Scheme) -> None:
    """Raises ValueError for a scheme that files of a layout cannot hold."""
    format_of_scheme(scheme)
    if scheme.zero and layout != own.METHOD:
        other = replace(scheme, bits=max(2, scheme.bits), zero=False)
        raise ValueError(f"{scheme} has zeros that are no whole numbers, which {layout} lacks; take {other}.")


def tensors_of(layout: str, module: str, format: Format, held: Packed) -> dict[str, Tensor]:
    """The tensors of a packed matrix in the files of a layout: our own, or compressed-tensors."""
    return own.tensors(module, held) if layout == own.METHOD else compressed.tensors(module, format, held)


class Folder:
    """Written beside `path` under a name of its own, until `finish`; left without that, it is removed. Raises
    ValueError as `check_free` does, OSError where it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        check_free(path)
        self.path = path
        self.partial = path.with_name(f".{path.name}.partial")
        self.files: list[str] = []
        self.owners: dict[str, str] = {}
        self.bytes = 0

    def __enter__(self) -> Self:
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)
        return self

    def __exit__(self, *error: object) -> None:
        shutil.rmtree(self.partial, ignore_errors=True)

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """One file more; nothing where there are no tensors."""
        from safetensors.torch import save_file

        if not tensors:
            return
        name = f"part-{len(self.files) + 1:05}.safetensors"
        save_file({key: t.contiguous().cpu() for key, t in tensors.items()}, self.partial / name, {"format": "pt"})
        self.files.append(name)
        self.owners |= dict.fromkeys(tensors, name)
        self.bytes += sum(t.numel() * t.element_size() for t in tensors.values())

    def finish(self, config: Mapping[str, Any], source: Path, more: Mapping[str, Mapping[str, Any]]) -> None:
        """config.json, what lies beside the weights in `source`, and further JSON files by name; then the folder gets
        its name.
        """
        final = {
            name: f"model-{i:05}-of-{len(self.files):05}.safetensors" for i, name in enumerate(self.files, start=1)
        }
        for name, new in final.items():
            (self.partial / name).rename(self.partial / new)
        index = {
            "metadata": {"total_size": self.bytes},
            "weight_map": {key: final[file] for key, file in sorted(self.owners.items())},
        }
        for name, content in {INDEX: index, "config.json": config, **more}.items():
            (self.partial / name).write_text(json.dumps(content, indent=1), encoding="utf-8")
        for name in BESIDE:
            if (source / name).is_file():
                shutil.copyfile(source / name, self.partial / name)
        if self.path.exists():
            self.path.rmdir()
        os.replace(self.partial, self.path)
