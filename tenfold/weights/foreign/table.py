"""Which quantisation methods of other tools are read, and the one way in: `foreign_linears`."""

from collections.abc import Callable, Mapping
from typing import Any

from tenfold.base.log import logger
from tenfold.weights.checkpoint import CheckpointError
from tenfold.weights.foreign import awq, compressed, fp8, gptq, own
from tenfold.weights.foreign.linear import Files, Linear, Settings

METHODS: dict[str, Callable[[Settings, Files], list[Linear]]] = {
    "gptq": gptq.linears,
    "awq": awq.linears,
    compressed.METHOD: compressed.linears,
    "fp8": fp8.linears,
    "fbgemm_fp8": fp8.linears,
    own.METHOD: own.linears,
}
# Beside the weights, and of no use where activations are not quantised with fixed scales.
LEFT_OUT = (
    ".input_scale",
    ".activation_scale",
    ".input_zero_point",
    ".output_scale",
    ".k_scale",
    ".v_scale",
    ".input_scale_ub",
)


def foreign_linears(quantization: Any, files: Files) -> dict[str, Linear]:
    """The quantised weights of a checkpoint by the name they have for models, such as "lm_head.weight".

    quantization: the config's `quantization_config`. Raises CheckpointError for a method, settings or tensors that are
    not read.
    """
    if not isinstance(quantization, Mapping):
        raise CheckpointError(f"{files.path}: quantization_config is no object; the config is damaged.")
    method = quantization.get("quant_method")
    if not isinstance(method, str) or method not in METHODS:
        raise CheckpointError(
            f"{files.path} is quantised by {str(method)[:80]!r}, which is not read; "
            f"read are {', '.join(METHODS)}. Use the original weights or a GGUF file of this model."
        )
    found = METHODS[method](Settings(method, files.path, quantization), files)
    if not found:
        raise CheckpointError(
            f"{files.path} says it is quantised by {method} and holds no quantised weights; "
            "remove quantization_config from its config.json if that is so."
        )
    tell(method, found)
    return {f"{linear.module}.weight": linear for linear in found}


def tell(method: str, found: list[Linear]) -> None:
    """One line in the log: how many weights became what."""
    counts: dict[str, int] = {}
    for linear in found:
        counts[linear.storage] = counts.get(linear.storage, 0) + 1
    logger.info("weights: %s, %s", method, ", ".join(f"{count} as {name}" for name, count in counts.items()))


def hidden(files: Files, linears: Mapping[str, Linear]) -> frozenset[str]:
    """Names that models must not see: the parts of quantised weights and the scales of activations."""
    parts = {name for linear in linears.values() for name in linear.tensors}
    return frozenset(parts | {name for name in files.entries if name.endswith(LEFT_OUT)})
