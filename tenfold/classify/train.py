"""Training: a recipe and a data set in, a classifier with its card out.

Invariant: every epoch begins with random numbers of its own, which seed and epoch tell, so a run that was interrupted
goes on as if it had not been (to the bit on a CPU).
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tenfold.classify import loss
from tenfold.classify.batches import Shelf, varied
from tenfold.classify.checkpoint import Checkpoint
from tenfold.classify.data.posts import DataSet
from tenfold.classify.encoder import Beginning, begin
from tenfold.classify.pickled import is_pickled, refuse
from tenfold.classify.recipe import Recipe
from tenfold.classify.scores import Scores, fit_temperature, score
from tenfold.models.sentiment.config import SentimentConfig
from tenfold.models.sentiment.folder import DEFAULT, WEIGHTS, Classifier, place, read_tensors
from tenfold.models.sentiment.image import from_image_weights
from tenfold.models.sentiment.model import Posts, SentimentModel
from tenfold.models.sentiment.prepare import Reader

WARM_UP = 0.05  # share of all steps in which the learning rate rises
LONGEST_GRADIENT = 1.0
JUDGED = 256  # posts of a batch that is only judged

Progress = Callable[[int, int], None]
State = dict[str, Tensor]


@dataclass(slots=True)
class Run:
    """What changes while training. best: weights of the epoch with the best dev accuracy, of equals with the least
    loss.
    """

    epoch: int = 0
    best_epoch: int = -1
    best_accuracy: float = -1.0
    best_nll: float = math.inf
    history: list[dict[str, float]] = field(default_factory=list)
    best: State = field(default_factory=dict)

    def take(self, found: Scores, trained: float, state: Callable[[], State]) -> None:
        """The end of an epoch; trained: mean loss of its batches."""
        if (found.accuracy, -found.nll) > (self.best_accuracy, -self.best_nll):
            self.best_accuracy, self.best_nll, self.best_epoch = found.accuracy, found.nll, self.epoch
            self.best = state()
        row = {"loss": trained, "dev_accuracy": found.accuracy, "dev_f1": found.f1_weighted, "dev_nll": found.nll}
        self.history.append({name: round(value, 5) for name, value in row.items()})
        self.epoch += 1

    def is_over(self, recipe: Recipe) -> bool:
        return self.epoch >= recipe.epochs or self.epoch - 1 - self.best_epoch >= recipe.patience


class Trainer:
    """Of one recipe on one data set."""

    def __init__(self, recipe: Recipe, data: DataSet, device: str = "cpu") -> None:
        """Raises ValueError for a recipe or data that make no classifier."""
        recipe.check()
        data.check()
        self.recipe, self.data, self.device = recipe, data, torch.device(device)
        torch.manual_seed(recipe.seed)
        self.beginning = begin(recipe.text, recipe.size, (post.text for post in data.train))
        self.config = config_of(recipe, data, self.beginning)
        self.reader = Reader(self.config, self.beginning.tokenizer)
        self.model = initial(self.config, self.beginning, recipe.image_weights).to(self.device)
        self.shelves = {name: Shelf(data.split(name), self.reader) for name in ("train", "dev", "test")}
        self.steps = math.ceil(len(data.train) / recipe.batch)
        self.optimizer = torch.optim.AdamW(self._groups(), weight_decay=recipe.decay)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=recipe.precision == "float16")
        self.unknown = self.beginning.tokenizer.token_to_id("[UNK]") or 0

    def _groups(self) -> list[dict[str, Any]]:
        """Encoders that have learnt something are treated with care."""
        self.knows = bool(self.beginning.state)
        known = [*self.model.text.parameters()] if self.knows else []
        if self.recipe.image_weights:
            known += self.model.image.parameters()
        careful = {id(p) for p in known}
        rest = [p for p in self.model.parameters() if id(p) not in careful]
        return [
            {"params": rest, "peak": self.recipe.rate},
            {"params": [p for p in known if p.requires_grad], "peak": self.recipe.encoder_rate},
        ]

    def train(
        self, at: Path | None = None, progress: Progress | None = None, say: Callable[[str], None] | None = None
    ) -> Run:
        """at: where each epoch is saved, and an interrupted run goes on. progress: called with batches done and in all.
        say: called with a line an epoch. The model then has the best weights.
        """
        run = Run()
        checkpoint = Checkpoint(at, self.recipe.digest(self.data.digest())) if at is not None else None
        if checkpoint is not None and checkpoint.exists():
            checkpoint.load(run, self.model, self.optimizer, self.scaler)
        while not run.is_over(self.recipe):
            trained = self._epoch(run.epoch, progress)
            found = self.judge("dev")
            run.take(found, trained, self._copy)
            if checkpoint is not None:
                checkpoint.save(run, self.model, self.optimizer, self.scaler)
            if say is not None:
                say(
                    f"epoch {run.epoch}: loss {trained:.4f}, dev accuracy {found.accuracy:.4f}, F1 {found.f1_macro:.4f}"
                )
        self.model.load_state_dict(run.best)
        return run

    def _copy(self) -> State:
        return {name: t.detach().clone() for name, t in self.model.state_dict().items()}

    def _epoch(self, epoch: int, progress: Progress | None) -> float:
        torch.manual_seed(self.recipe.seed * 100_003 + epoch)
        seed = torch.Generator().manual_seed(self.recipe.seed * 100_003 + epoch)
        self.model.train()
        self.model.text.requires_grad_(not self.knows or epoch >= self.recipe.frozen)
        if not next(self.model.image.encoder.parameters()).requires_grad:
            self.model.image.encoder.eval()  # its norms keep their statistics
        total = 0.0
        for i, (posts, labels) in enumerate(self.shelves["train"].shuffled(self.recipe.batch, seed)):
            self._rates(epoch * self.steps + i)
            total += self._step(posts, labels.to(self.device), seed)
            if progress is not None:
                progress(epoch * self.steps + i + 1, self.recipe.epochs * self.steps)
        return total / self.steps

    def _rates(self, step: int) -> None:
        """Up in a line, down in a cosine; told by the step alone."""
        whole = self.recipe.epochs * self.steps
        warm = max(1, round(WARM_UP * whole))
        share = step / warm if step < warm else 0.5 + 0.5 * math.cos(math.pi * (step - warm) / max(1, whole - warm))
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * share

    def _step(self, posts: Posts, labels: Tensor, seed: torch.Generator) -> float:
        with self._precision():
            value = self._loss(posts, labels, seed)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(value).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.grad is not None], LONGEST_GRADIENT)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return float(value.detach())

    def _loss(self, posts: Posts, labels: Tensor, seed: torch.Generator) -> Tensor:
        def view() -> Posts:
            return varied(posts, seed, self.unknown, self.recipe.word_dropout).to(self.device)

        told = self.model(view())
        value = F.cross_entropy(told.logits, labels)
        if told.contrast is not None:
            other = self.model(view())
            pairs = loss.of_views(told.contrast.float(), other.contrast.float())
            mates = loss.of_labels(told.contrast.float(), labels)
            value = value + self.recipe.contrast * (pairs + mates)
        return value

    def _precision(self) -> Any:
        dtype = getattr(torch, self.recipe.precision)
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    def logits(self, split: str) -> tuple[Tensor, Tensor]:
        """Of all posts of a split, with their labels, both on the CPU."""
        self.model.eval()
        found: list[Tensor] = []
        labels: list[Tensor] = []
        with torch.inference_mode():
            for posts, own in self.shelves[split].in_order(JUDGED):
                with self._precision():
                    found.append(self.model(posts.to(self.device)).logits.float().cpu())
                labels.append(own)
        return torch.cat(found), torch.cat(labels)

    def judge(self, split: str, temperature: float = 1.0) -> Scores:
        return score(*self.logits(split), temperature)

    def finish(self, run: Run, seconds: float = 0.0) -> Classifier:
        """The classifier with its best weights and the temperature that dev asks for, and a card of what it is."""
        temperature = fit_temperature(*self.logits("dev"))
        card = {
            "data": {
                "name": self.data.name,
                "source": self.data.source,
                "sha256": self.data.digest(),
                "counts": self.data.counts(),
            },
            "text_encoder": self.beginning.source,
            "recipe": self.recipe.as_json(),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "epochs": run.epoch,
            "best_epoch": run.best_epoch + 1,
            "history": run.history,
            "temperature": temperature,
            "dev": self.judge("dev", temperature).as_json(),
            "test": self.judge("test", temperature).as_json(),
            "test_uncalibrated": self.judge("test").as_json(),
            "device": self.device.type,
            "seconds": round(seconds, 1),
        }
        return Classifier(self.model.eval(), self.reader, temperature, card)


def train(
    recipe: Recipe,
    data: DataSet,
    device: str = "cpu",
    at: Path | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> Classifier:
    """All of it. Raises ValueError for a recipe or data that make no classifier."""
    begun = time.perf_counter()
    trainer = Trainer(recipe, data, device)
    run = trainer.train(at, progress, say)
    return trainer.finish(run, time.perf_counter() - begun)


def config_of(recipe: Recipe, data: DataSet, beginning: Beginning) -> SentimentConfig:
    """Raises ValueError where it cannot be built."""
    shape = beginning.shape
    longest = min(recipe.max_tokens, shape.positions)
    config = SentimentConfig(data.labels, shape, recipe.image, recipe.parts, recipe.dropout, longest)
    config.check()
    return config


def initial(config: SentimentConfig, beginning: Beginning, image_weights: str) -> SentimentModel:
    """A model before training, with what its encoders already know. Raises ValueError for weights that do not fit."""
    model = SentimentModel(config)
    _fill(model.text, beginning.state, "the text encoder")
    if image_weights:
        _fill_image(model, image_weights)
    return model


def _fill_image(model: SentimentModel, source: str) -> None:
    """source: a file of weights, after which the encoder is frozen; or a classifier, whose encoder goes on learning."""
    path, shape = Path(source).expanduser(), model.config.image
    if path.is_file():
        if is_pickled(path):
            refuse(path, path.with_suffix(".safetensors"))
        state = from_image_weights(shape.kind, read_tensors(path))
        _fill(model.image.encoder, state, source)
        _check_whole(model.image.encoder, state, f"{path} as weights of a {shape.kind}")
        model.image.encoder.requires_grad_(False)
        return
    if source != DEFAULT and not path.is_dir():
        raise ValueError(
            f"There is no {path} to begin the picture encoder with; allowed: 'default', a classifier's folder, or a "
            "safetensors file."
        )
    folder = place(source)
    tensors = read_tensors(folder / WEIGHTS)
    own = {name.removeprefix("image."): t.float() for name, t in tensors.items() if name.startswith("image.")}
    _fill(model.image, own, str(folder / WEIGHTS))
    _check_whole(model.image, own, f"{folder} as a classifier")


def _check_whole(module: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Raises ValueError where weights are missing."""
    names = (name for name in module.state_dict() if not name.endswith("num_batches_tracked"))
    if missing := [name for name in names if name not in state]:
        raise ValueError(f"{what} lacks {len(missing)} tensors, {missing[0]} for one; is it of another kind?")


def _fill(module: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    own = module.state_dict()
    for name, tensor in state.items():
        if name not in own or own[name].shape != tensor.shape:
            raise ValueError(f"{where} has {name} of shape {tuple(tensor.shape)}, which the model has no place for.")
    module.load_state_dict(dict(state), strict=False)
