"""Triton kernels run interpreted where there is no GPU; said before any test of this folder imports a kernel."""

import importlib.util

from tests import interpreter

interpreter.ask()
if importlib.util.find_spec("triton"):
    interpreter.mend()
