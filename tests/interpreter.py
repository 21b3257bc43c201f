"""Triton kernels without a GPU: the interpreter, made fit for the NumPy that is installed."""

import os
from typing import Any

import torch


def ask() -> None:
    """Make kernels run interpreted where there is no GPU. To be called before any kernel is imported."""
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")


def mend() -> None:
    """The interpreter keeps scalars as arrays of one element; newer NumPy makes no int of these, which loops need."""
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch
