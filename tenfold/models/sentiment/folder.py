"""A classifier on disk: config.json (its shape, labels and temperature), model.safetensors, tokenizer.json, and
card.json, which says what it was trained on and how good it is.

Invariant: a folder that opens gives the probabilities of the model that was saved, but for the rounding of its type.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tenfold.models.sentiment.config import SentimentConfig
from tenfold.models.sentiment.model import SentimentModel
from tenfold.models.sentiment.prepare import Reader
from tenfold.weights import beside
from tenfold.weights.safetensors import SafetensorsFile, serialize

CONFIG, WEIGHTS, TOKENIZER, CARD = "config.json", "model.safetensors", "tokenizer.json", "card.json"
PACKAGED = Path(__file__).parent / "packaged"  # the classifier that comes with Tenfold
DEFAULT = "default"  # its name
TEMPERATURES = (0.05, 100.0)


@dataclass(frozen=True, slots=True)
class Classifier:
    """temperature: what logits are divided by for probabilities that mean what they say. card: as it was saved."""

    model: SentimentModel
    reader: Reader
    temperature: float = 1.0
    card: Mapping[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> SentimentConfig:
        return self.model.config

    def probabilities(self, logits: Tensor) -> Tensor:
        """[B, labels] float32 of logits of any type."""
        return (logits.float() / self.temperature).softmax(-1)


def place(named: str) -> Path:
    """The folder of a name: "default" or a path. Raises ValueError where there is none."""
    path = PACKAGED if named == DEFAULT else Path(named).expanduser()
    if not (path / CONFIG).is_file():
        raise ValueError(
            f"{named!r} is no classifier: there is no {path / CONFIG}. Give 'default' or a folder that `tenfold train "
            "sentiment` wrote."
        )
    return path


def save(path: Path, made: Classifier, dtype: torch.dtype = torch.float32) -> None:
    """Write all four files, each whole before it takes its place; config.json last. dtype: of the weights on disk."""
    path.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in made.model.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    beside.write(path / WEIGHTS, serialize(tensors))
    beside.write(path / TOKENIZER, made.reader.tokenizer.to_str().encode())
    beside.write(path / CARD, _json(made.card))
    beside.write(path / CONFIG, _json(made.config.as_json() | {"temperature": made.temperature}))


def open_folder(path: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Classifier:
    """Raises ValueError for files that are missing, damaged, or do not fit each other."""
    told = read_object(path / CONFIG)
    config = SentimentConfig.from_json(told)
    temperature = told.get("temperature", 1.0)
    low, high = TEMPERATURES
    if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not low <= temperature <= high:
        raise ValueError(f"{path / CONFIG} has the temperature {temperature!r}; allowed: {low} to {high}.")
    model = SentimentModel(config)
    load_into(model, read_tensors(path / WEIGHTS), str(path / WEIGHTS))
    placed(model, device, dtype)
    card = read_object(path / CARD) if (path / CARD).exists() else {}
    return Classifier(model, Reader.open(config, path / TOKENIZER), float(temperature), card)


def placed(model: SentimentModel, device: torch.device | str, dtype: torch.dtype) -> SentimentModel:
    """The same model, ready to be asked and no longer to be trained. On a GPU its convolutions have channels last."""
    model.to(device, dtype).eval().requires_grad_(False)
    if torch.device(device).type == "cuda":
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, copied. Raises ValueError."""
    if not path.is_file():
        raise ValueError(f"There is no {path}.")
    file = SafetensorsFile(path)
    return {name: file.part(name).clone() for name in file.tensors}


def load_into(module: torch.nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Raises ValueError where names or shapes are not those of the module."""
    own = {name: t for name, t in module.state_dict().items() if not name.endswith("num_batches_tracked")}
    missing, more = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or more:
        raise ValueError(f"{where} is of another shape: it lacks {missing[:3]} and has {more[:3]} too many.")
    wrong = [name for name, tensor in own.items() if tensor.shape != tensors[name].shape]
    if wrong:
        name = wrong[0]
        raise ValueError(f"{where}: {name} is {tuple(tensors[name].shape)}, expected {tuple(own[name].shape)}.")
    module.load_state_dict(dict(tensors), strict=False)


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file. Raises ValueError for one that is missing, damaged, or holds something else."""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}.") from None
    if not isinstance(told, dict):
        raise ValueError(f"{path} must hold a JSON object.")
    return told


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()
