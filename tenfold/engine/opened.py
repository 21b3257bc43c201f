"""A model found and checked before any of its weights is read: what it needs and how it will run.

Invariant: opening reads headers only, so `tenfold plan` answers for a model of any size at once.
"""

from collections.abc import Callable

import torch

from tenfold.base.config import EngineConfig, check_kinds
from tenfold.base.log import logger
from tenfold.cache.format import calibrated
from tenfold.cache.store import Groupings
from tenfold.engine.memory import (
    DTYPES,
    Draft,
    check_sight,
    fill,
    free_memory,
    kv_spec,
    plan_memory,
    resolve,
    weight_bytes,
)
from tenfold.engine.text import Text
from tenfold.models.table import Model, build_model, model_config
from tenfold.ops.kernels import Kernels, Options
from tenfold.ops.kv.quantize import Grouping
from tenfold.ops.table import make_kernels
from tenfold.weights import kv_calibration
from tenfold.weights.checkpoint import Checkpoint
from tenfold.weights.find import UnknownModel
from tenfold.weights.find import resolve as find_model
from tenfold.weights.load import Weights
from tenfold.weights.open import open_checkpoint
from tenfold.weights.shapes import is_shape


class Opened:
    """The checkpoint `config.model` names. `choose()` picks the kernels and plans memory; after it `config` has every
    size filled in. draft_checkpoint: of the draft model that `config.speculate` names, None where it names none.

    Raises ValueError, and of its kind CheckpointError and ConfigError.
    """

    def __init__(self, config: EngineConfig) -> None:
        check_kinds(config)
        self.config = config
        self.device = pick_device(config.device)
        self.checkpoint: Checkpoint = open_checkpoint(find_model(config.model))
        self.shape = model_config(self.checkpoint.config)
        self.draft_checkpoint: Checkpoint | None = None
        if config.speculate not in ("", "ngram"):
            try:
                self.draft_checkpoint = open_checkpoint(find_model(config.speculate))
                self.draft_shape = model_config(self.draft_checkpoint.config)
            except ValueError as error:
                raise ValueError(
                    f"speculate is {config.speculate!r}; allowed: '', ngram or the name of a model. {error}"
                ) from error

    def choose(self) -> None:
        config = self.config
        dtype = DTYPES.get(config.dtype) or (torch.float32 if self.device.type == "cpu" else torch.bfloat16)
        self.kernels = self._kernels(self.device, dtype)
        self.weights, quantised = weight_bytes(self.checkpoint, config.weights, dtype, self.kernels.name)
        self.draft: Draft | None = None
        if self.draft_checkpoint is not None:
            size, _ = weight_bytes(self.draft_checkpoint, config.weights, dtype, self.kernels.name)
            self.draft = Draft(self.draft_shape, size)
        experts = self.shape.experts is not None
        resolved = resolve(config, self.device, self.kernels.name, quantised, experts)
        check_sight(self.shape, resolved)
        if resolved.max_model_len > self.shape.max_positions:
            logger.warning(
                "max_model_len is %d; this model allows up to %d tokens, which is what it gets",
                resolved.max_model_len,
                self.shape.max_positions,
            )
        self.memory = plan_memory(self.shape, self.weights, resolved, free_memory(self.device), self.draft)
        self.config = fill(resolved, self.memory)

    def _kernels(self, device: torch.device, dtype: torch.dtype) -> Kernels:
        config = self.config
        options = Options(config.graphs, config.softmax, config.gemm, config.merge)
        return make_kernels(config.kernels, device, dtype, config.threads, options)

    def groupings(self) -> Groupings | None:
        """How the keys and values of a packed cache are grouped; None where its format needs no calibration, and for
        random weights, which none would serve. Raises ValueError where there is none.
        """
        spec = kv_spec(self.shape, self.config)
        if spec.packed is None or not calibrated(spec.packed) or is_shape(self.config.model):
            return None
        channels = spec.kv_heads * spec.head_dim
        groups = spec.packed.groups(spec.kv_heads, spec.head_dim)
        found = kv_calibration.load(self.checkpoint, str(spec.packed), spec.layers, channels, groups).tensors

        def grouping(side: str, layer: int) -> Grouping:
            group, clip, unit, shift = (found[f"{side}.{part}"][layer] for part in Grouping.__slots__)
            return Grouping(group.long(), clip, unit, shift)

        keys, values = kv_calibration.SIDES
        return [(grouping(keys, i), grouping(values, i)) for i in range(spec.layers)]

    def check_vocabulary(self, text: Text) -> None:
        """text: of the checkpoint. Raises ValueError where the draft model means other things by the same ids."""
        if self.draft_checkpoint is None:
            return
        ours = text.tokenizer.get_vocab(with_added_tokens=True)
        theirs = self.draft_checkpoint.tokenizer().get_vocab(with_added_tokens=True)
        if ours != theirs:
            differ = sum(theirs.get(token) != id for token, id in ours.items())
            raise ValueError(
                f"speculate is {self.config.speculate!r}, whose vocabulary of {len(theirs)} tokens is not that of "
                f"{self.config.model} ({len(ours)} tokens, {differ} of them missing or numbered otherwise); choose a "
                "smaller model of the same family, or speculate=ngram."
            )

    def replica(self, device: torch.device) -> tuple[Model, Kernels]:
        """The model on another device of the same kind, and its kernels."""
        config, dtype = self.config, DTYPES[self.config.dtype]
        kernels = self._kernels(device, dtype)
        weights = Weights(self.checkpoint, kernels, device, dtype, config.weights)
        return build_model(self.checkpoint.config, weights, config.max_model_len), kernels

    def load_draft(self) -> Model | None:
        """The draft model, for as long a context as the plan has, or as the model itself allows."""
        if self.draft_checkpoint is None:
            return None
        config = self.config
        weights = Weights(self.draft_checkpoint, self.kernels, self.device, DTYPES[config.dtype], config.weights)
        return build_model(
            self.draft_checkpoint.config, weights, min(config.max_model_len, self.draft_shape.max_positions)
        )


def open_text(model: str, fetched: Callable[[], None]) -> Text:
    """The tokenizer and chat template of a model that another process loads. fetched: returns when that process has
    the model, or raises why it has not; called where the model is not on this machine yet.
    """
    try:
        path = find_model(model, allow_download=False)
    except UnknownModel:
        fetched()
        path = find_model(model)
    checkpoint = open_checkpoint(path)
    model_config(checkpoint.config)  # an unsupported model is refused as such, not for what its tokenizer lacks
    return Text(checkpoint)


def pick_device(name: str) -> torch.device:
    """The device a setting names. Raises ValueError for one that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()) or (kind == "cpu" and index):
        raise ValueError(f"device is {name!r}; allowed: auto, cpu, cuda or cuda:N.")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device is {name!r}, but this PyTorch sees {torch.cuda.device_count()} CUDA devices; use cpu or auto."
        )
    return torch.device(name)
