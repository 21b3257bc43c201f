"""Fixtures for the compiled kernels. Where they cannot be built, their tests are skipped with the reason."""

import pytest

from tenfold.ops.cpu import lib


@pytest.fixture(params=lib.isas() if lib.available() else [""])
def isa(request):
    """Each instruction set of this machine in turn."""
    if not lib.available():
        pytest.skip(lib.status().reason)
    lib.set_isa(request.param)
    yield request.param
    lib.set_isa()


@pytest.fixture
def native():
    """The kernels, on two threads, with the best instruction set."""
    from tenfold.ops.cpu.native import Native

    if not lib.available():
        pytest.skip(lib.status().reason)
    kernels = Native(2)
    yield kernels
    lib.set_threads()
