"""Compiled CPU kernels: plain C built with the user's compiler on first use, called through ctypes."""
