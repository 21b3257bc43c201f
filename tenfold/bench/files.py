"""Other quantisations of a GGUF file, made with llama.cpp's own quantiser, so that both engines read the same bytes."""

import ctypes
from pathlib import Path

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
