"""From a checkpoint's tensors to what kernels run on. Every tensor is checked against the shape the config promises."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tenfold.base.log import logger
from tenfold.ops.blocks import BLOCKS, DENSE, dequantize, quantize
from tenfold.ops.formats import format_of, is_format
from tenfold.ops.kernels import Kernels
from tenfold.ops.matrix import Bank, Deferred, Experts, Matrix, RawTensor
from tenfold.weights.checkpoint import Checkpoint, CheckpointError

# What dense weights are quantised to when loading: matrices of the blocks, and the head, which decides the token and
# gets 8 bits of whole numbers: float8 in their place loses fifty times as much there. "-blocks" modes keep it.
PACKED = {"fp8": "fp8a8", "int8": "int8g128", "int4": "int4g128", "int3": "int3g128z", "w4a8": "int4a8"}
TARGETS = {"q8_0": "Q8_0", **PACKED, **{f"{mode}-blocks": target for mode, target in PACKED.items()}}
HEADS = {"q8_0": "Q8_0", **dict.fromkeys(PACKED, "int8g128")}
MODES = ("auto", "dense", *TARGETS)
# Matrices that decide much and weigh little: routers, and what makes keys and values of a latent vector.
UNPACKED = "self_attn.kv_b_proj.weight"  # of these, that which is dense whatever the file stores
KEPT = ("mlp.gate.weight", "block_sparse_moe.gate.weight", UNPACKED)
SIGHT = ("vision.", "projector.")  # what sees pictures is as small as it is sensitive: no mode quantises it
TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"

# Buffers that old exports saved; they are computed, not read.
COMPUTED = ("rotary_emb.inv_freq", "masked_bias", "attn.bias")


class Weights:
    """The tensors of one checkpoint, made into matrices of `kernels` and vectors on `device`.

    mode: "auto" keeps what the file stores, "dense" dequantises first; others quantise dense matrices of the blocks to
    TARGETS and the head to HEADS, and "q8_0" the embedding table too.
    progress(done, total) is called after each tensor. Raises ValueError for an unknown mode.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        kernels: Kernels,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        mode: str = "auto",
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        check_mode(mode)
        self.checkpoint = checkpoint
        self.kernels = kernels
        self.device = torch.device(device)
        self.dtype = dtype
        self.mode = mode
        self.progress = progress
        self.used: set[str] = set()
        self.matrices: list[Matrix] = []  # all that were made
        self.experts: list[Experts] = []  # of the layers that have some
        self.banks: list[tuple[str, Sequence[Sequence[str]]]] = []  # names given to `bank`, in turn
        self._names = frozenset(checkpoint.names())

    def has(self, name: str) -> bool:
        return name in self._names

    def matrix(self, *names: str, rows: Sequence[int] | None = None, cols: int | None = None) -> Matrix:
        """The named matrices stacked by rows. rows, cols: the shape each must have. Raises CheckpointError."""
        parts = [self._take(name) for name in names]
        for i, part in enumerate(parts):
            wanted = (part.shape[0] if rows is None else rows[i], part.shape[-1] if cols is None else cols)
            check_shape(part, wanted)
        return self._make(parts, [loaded_storage(self.mode, part.name, part.storage, part.shape) for part in parts])

    def bank(
        self,
        stacked: str,
        names: Sequence[Sequence[str]],
        rows: Sequence[int],
        cols: int,
        beside: Sequence[Sequence[str]] = (),
    ) -> Bank:
        """Experts' matrices: slices of the tensor `stacked` [experts, sum of rows, cols] where the file has it, else
        each expert's named ones stacked by rows. beside: names of the projection that runs together with this one.
        Raises CheckpointError.
        """
        if self.has(stacked):
            experts = [[part] for part in slices(self._take(stacked), (len(names), sum(rows), cols))]
            heights: Sequence[int] = [sum(rows)]
        else:
            experts, heights = [[self._take(name) for name in own] for own in names], rows
        made = []
        for parts in experts:
            for part, height in zip(parts, heights):
                check_shape(part, (height, cols))
            made.append([self._convert(p, loaded_storage(self.mode, p.name, p.storage, p.shape)) for p in parts])
        others = {self._loaded(name) for own in beside for name in own if self.has(name)}
        bank = self.kernels.bank(made, pairs=len(rows) == 2, beside=others)
        self.matrices += () if bank.tiled else bank.each
        self.banks.append((stacked, names))
        return bank

    def kept(self, name: str, rows: int, cols: int) -> Matrix:
        """A matrix that no mode quantises. Raises CheckpointError."""
        part = self._take(name)
        check_shape(part, (rows, cols))
        return self._make([part], [part.storage])

    def dense(self, name: str, rows: int, cols: int) -> Tensor:
        """A matrix that no kernel of ours runs on, [rows, cols] in the compute type. Raises CheckpointError."""
        part = self._take(name)
        check_shape(part, (rows, cols))
        return dequantize(self._convert(part, part.storage), self.dtype).to(self.device)

    def array(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A dense tensor of any shape, in the compute type on the device. Raises CheckpointError."""
        part = self._take(name)
        if tuple(part.shape) != shape or part.storage not in DENSE:
            raise CheckpointError(
                f"Tensor {part.name} has shape {list(part.shape)} and type {part.storage}; the config calls for "
                f"{list(shape)} in F32, F16 or BF16. Config and weights are of different models."
            )
        return part.data.to(self.device, self.dtype)

    def bank_of(self, matrices: Tensor) -> Bank:
        """Of dense matrices [N, rows, cols] in the compute type, made from those of the checkpoint."""
        storage = next(name for name, dtype in DENSE.items() if dtype == matrices.dtype)
        each = matrices.contiguous()
        bank = self.kernels.bank([[RawTensor("", storage, tuple(part.shape), part)] for part in each])
        self.matrices += bank.each
        return bank

    def tied_head(self, table: Matrix) -> Matrix:
        """The head of a model whose embedding table it is: the table itself, or in modes that pack heads a copy."""
        storage = head_copy(self.checkpoint, self.mode)
        return self._make([self._take(TABLE)], [storage]) if storage else table

    def _make(self, parts: Sequence[RawTensor], storages: Sequence[str]) -> Matrix:
        """parts, handed to the kernels as storages say."""
        self.matrices.append(self.kernels.matrix(list(map(self._convert, parts, storages))))
        return self.matrices[-1]

    def vector(self, *names: str, size: int | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """The named vectors joined, on the device. size: the length of all together. Raises CheckpointError."""
        parts = [self._take(name) for name in names]
        for part in parts:
            if len(part.shape) != 1 or part.storage not in DENSE:
                raise CheckpointError(
                    f"Tensor {part.name} has shape {list(part.shape)} and type {part.storage}; "
                    "a vector of F32, F16 or BF16 was expected. The file is damaged or of another model."
                )
        joined = torch.cat([part.data.to(dtype) for part in parts])
        if size is not None and joined.numel() != size:
            raise CheckpointError(
                f"{' and '.join(part.name for part in parts)} hold {joined.numel()} numbers; "
                f"the config calls for {size}. Config and weights are of different models."
            )
        return joined.to(self.device)

    def pass_over(self, *names: str) -> None:
        """Tensors that the checkpoint may have and the model has no use for."""
        self.used.update(name for name in self._names if name.startswith(names))

    def unused(self) -> list[str]:
        """Names in the checkpoint that no layer asked for; computed buffers and biases of zeros are left out."""
        return sorted(name for name in self._names - self.used if not (name.endswith(COMPUTED) or self._idle(name)))

    def _idle(self, name: str) -> bool:
        """Whether a tensor is a bias of zeros, which quantisers give to every linear."""
        if not name.endswith(".bias"):
            return False
        raw = self.checkpoint.tensor(name)
        return raw.storage in DENSE and not raw.data.any()

    def finish(self) -> None:
        """Say in one sentence what was left over. Call when the model is built."""
        names = self.unused()
        if names:
            shown = ", ".join(names[:4]) + (" ..." if len(names) > 4 else "")
            logger.warning(
                "%d of %d tensors in %s are not used by this model: %s",
                len(names),
                len(self._names),
                self.checkpoint.path,
                shown,
            )

    def _loaded(self, name: str) -> str:
        """The storage that a matrix has when it is handed to the kernels."""
        raw = self.checkpoint.tensor(name)
        return loaded_storage(self.mode, raw.name, raw.storage, raw.shape)

    def _take(self, name: str) -> RawTensor:
        if name not in self._names:
            raise CheckpointError(
                f"{self.checkpoint.path} has no tensor {name}, which this model needs; "
                "the file is incomplete or of another architecture."
            )
        raw = self.checkpoint.tensor(name)
        self.used.add(name)
        if self.progress is not None:
            self.progress(len(self.used), len(self._names))
        return raw

    def _convert(self, part: RawTensor, storage: str) -> RawTensor:
        if isinstance(part, Deferred):
            part = part.on(self.device)
        if storage == part.storage:
            return part
        if is_format(storage):
            # Rounding is quick where the weights will run.
            part = RawTensor(part.name, part.storage, part.shape, part.data.to(self.device))
        return quantize(part, storage)


def slices(part: RawTensor, shape: tuple[int, int, int]) -> list[RawTensor]:
    """The matrices of a tensor of three dimensions. Raises CheckpointError where it has another shape or is packed."""
    if part.shape != shape or part.storage not in DENSE:
        raise CheckpointError(
            f"Tensor {part.name} has shape {list(part.shape)} and type {part.storage}; the config calls for "
            f"{list(shape)} in F32, F16 or BF16. Config and weights are of different models, or the file is damaged."
        )
    whole = part.data
    return [RawTensor(f"{part.name}[{i}]", part.storage, shape[1:], whole[i]) for i in range(shape[0])]


def check_mode(mode: str) -> None:
    """Raises ValueError for one that is none of MODES."""
    if mode not in MODES:
        raise ValueError(f"weights is {mode!r}; allowed: {', '.join(MODES)}.")


def loaded_storage(mode: str, name: str, storage: str, shape: tuple[int, ...]) -> str:
    """The storage a matrix, or matrices of many experts, have when they are handed to the kernels."""
    if len(shape) < 2 or name.endswith(KEPT) or name.startswith(SIGHT):
        return storage
    if mode == "dense":
        return storage if storage in DENSE else "F32"
    target = (HEADS if name == HEAD else TARGETS).get(mode, "")
    if target == "Q8_0":
        wide = storage in DENSE or storage.startswith("fp8")
        return target if wide and shape[-1] % BLOCKS[target].elements == 0 else storage
    if not target or storage not in DENSE or name == TABLE or format_of(target).obstacle(shape[-1]):
        return storage
    return target


def head_copy(checkpoint: Checkpoint, mode: str) -> str:
    """What the head of a model without one of its own is stored as, empty where it is the embedding table itself."""
    names = set(checkpoint.names())
    if HEAD in names or TABLE not in names:
        return ""
    raw = checkpoint.tensor(TABLE)
    table, head = (loaded_storage(mode, name, raw.storage, raw.shape) for name in (TABLE, HEAD))
    return "" if table == head else head


def check_shape(part: RawTensor, wanted: tuple[int, int]) -> None:
    if len(part.shape) != 2 or tuple(part.shape) != wanted:
        raise CheckpointError(
            f"Tensor {part.name} has shape {list(part.shape)}; the config calls for {list(wanted)}. "
            "Config and weights are of different models, or the file is damaged."
        )
