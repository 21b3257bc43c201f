"""Kernels for NVIDIA GPUs: which implementation runs, CUDA graphs, and CUDA C++ compiled on first use."""
