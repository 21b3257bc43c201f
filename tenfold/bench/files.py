"""Files that the benchmark reads and makes: raw results of a folder, by suite; and other quantisations of a GGUF file,
made with llama.cpp's own quantiser, so that both engines read the same bytes.
"""

import ctypes
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

Made = TypeVar("Made")
Suites = dict[str, list[dict[str, Any]]]
INCOMPLETE = (LookupError, TypeError, AttributeError, ValueError, ArithmeticError)  # what reading half a result raises

# llama.cpp's file types (enum llama_ftype of its public header).
FILE_TYPES = {
    "F16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q8_0": 7,
    "Q5_0": 8,
    "Q5_1": 9,
    "Q2_K": 10,
    "Q3_K_M": 12,
    "Q4_K_M": 15,
    "Q5_K_M": 17,
    "Q6_K": 18,
}


class NoCharts(ValueError):
    """What draws is not installed."""


def results_in(folder: Path) -> Suites:
    """The raw results of a folder by suite. Raises ValueError as `each_in`."""
    return by_suite(data for _, data in each_in(folder))


def made_of(folder: Path, make: Callable[[Suites], Made]) -> Made:
    """What `make` makes of the raw results of a folder. Raises ValueError where there are none, and with the name of a
    file that is not complete.
    """
    files = each_in(folder)
    if not files:
        raise ValueError(
            f"{folder} holds no raw results; allowed: a folder with JSON files as `tenfold bench ... --out FOLDER` "
            "writes them."
        )
    try:
        return make(by_suite(data for _, data in files))
    except INCOMPLETE as error:
        for path, data in files:
            _check(path, data, make)
        raise ValueError(f"The results of {folder} do not go together: {_reason(error)}.") from error


def by_suite(results: Iterable[dict[str, Any]]) -> Suites:
    found: Suites = {}
    for data in results:
        found.setdefault(data["suite"], []).append(data)
    return found


def each_in(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The raw results of a folder and where each lies, other files left alone. Raises ValueError for one that is no
    JSON.
    """
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is no JSON ({error}); measure it again, or remove it.") from error
        if isinstance(data, dict) and isinstance(data.get("suite"), str):
            found.append((path, data))
    return found


def _check(path: Path, data: dict[str, Any], make: Callable[[Suites], Any]) -> None:
    """Raises ValueError where a result by itself cannot be read."""
    try:
        make(by_suite([data]))
    except INCOMPLETE as error:
        raise ValueError(
            f"{path} is no complete result of suite {data['suite']!r} ({_reason(error)}); measure it again, or remove "
            "it."
        ) from error


def _reason(error: Exception) -> str:
    return f"{error.args[0]!r} is missing" if isinstance(error, KeyError) and error.args else str(error)


def requantize(source: Path, kind: str, folder: Path) -> Path:
    """`folder/NAME.KIND.gguf`, made from source on first use. Speed only: quality suffers from quantising twice.

    Raises ValueError for an unknown kind and RuntimeError when llama.cpp refuses.
    """
    if kind not in FILE_TYPES:
        raise ValueError(f"file type is {kind!r}; allowed: {', '.join(FILE_TYPES)}.")
    import llama_cpp

    from tenfold.bench.peers.llama_cpp import silence

    silence(llama_cpp)
    target = folder / f"{source.name.split('.')[0]}.{kind}.gguf"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = FILE_TYPES[kind]
    settings.allow_requantize = True
    partial = target.with_suffix(".partial")
    code = llama_cpp.llama_model_quantize(str(source).encode(), str(partial).encode(), ctypes.byref(settings))
    if code != 0:
        raise RuntimeError(f"llama.cpp could not quantise {source.name} to {kind} (code {code}).")
    partial.rename(target)
    return target
