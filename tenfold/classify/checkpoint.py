"""A training run on disk, after each epoch: weights, the best so far, the optimizer's memory, and numbers; two files of
tensors and one of JSON, which is written last and names them.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tenfold.weights import beside
from tenfold.weights.safetensors import SafetensorsFile, serialize

if TYPE_CHECKING:  # the trainer saves its run here
    from tenfold.classify.train import Run

STATE = "state.json"


class Checkpoint:
    """In a folder of its own. digest: of recipe and data; a run with another one does not go on from here."""

    def __init__(self, path: Path, digest: str) -> None:
        self.path, self.digest = path, digest

    def exists(self) -> bool:
        return (self.path / STATE).is_file()

    def save(self, run: "Run", model: nn.Module, optimizer: torch.optim.Optimizer, scaler: Any) -> None:
        name = f"epoch-{run.epoch}.safetensors"
        tensors = {f"model.{n}": t for n, t in model.state_dict().items()}
        tensors |= {f"best.{n}": t for n, t in run.best.items()}
        tensors |= {f"optimizer.{n}": t for n, t in _memory(model, optimizer).items()}
        beside.write(self.path / name, serialize(tensors))
        told = {
            "digest": self.digest,
            "tensors": name,
            "epoch": run.epoch,
            "best_epoch": run.best_epoch,
            "best_accuracy": run.best_accuracy,
            "best_nll": run.best_nll,
            "history": run.history,
            "scaler": scaler.state_dict(),
        }
        beside.write(self.path / STATE, json.dumps(told).encode())
        for old in self.path.glob("epoch-*.safetensors"):
            if old.name != name:
                old.unlink()

    def load(self, run: "Run", model: nn.Module, optimizer: torch.optim.Optimizer, scaler: Any) -> None:
        """Raises ValueError for a run of another recipe or other data, and for damaged files."""
        try:
            told = json.loads((self.path / STATE).read_text(encoding="utf-8"))
            if told["digest"] != self.digest:
                raise ValueError(
                    f"{self.path} holds an interrupted run with other settings or data. Give the same ones to go on "
                    "with it, or remove it to begin anew."
                )
            file = SafetensorsFile(self.path / Path(told["tensors"]).name)
        except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{self.path} holds no run that can go on ({error}); remove it to begin anew.") from None
        tensors = {name: file.part(name).clone() for name in file.tensors}
        model.load_state_dict(_under("model.", tensors))
        _remember(model, optimizer, _under("optimizer.", tensors))
        device = next(model.parameters()).device
        run.best = {name: t.to(device) for name, t in _under("best.", tensors).items()}
        run.epoch, run.best_epoch = told["epoch"], told["best_epoch"]
        run.best_accuracy, run.best_nll, run.history = told["best_accuracy"], told["best_nll"], told["history"]
        if told["scaler"]:
            scaler.load_state_dict(told["scaler"])

    def remove(self) -> None:
        """The run has ended; what it made lies elsewhere."""
        shutil.rmtree(self.path, ignore_errors=True)


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _memory(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What the optimizer remembers of each parameter, by the parameter's name."""
    found = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            found[f"{name}/{key}"] = value
    return found


def _remember(model: nn.Module, optimizer: torch.optim.Optimizer, memory: Mapping[str, Tensor]) -> None:
    parameters = dict(model.named_parameters())
    for path, value in memory.items():
        name, _, key = path.rpartition("/")
        parameter = parameters[name]
        there = value if key == "step" else value.to(parameter.device)
        optimizer.state[parameter][key] = there
