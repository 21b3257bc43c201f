"""Weights: checkpoints on disk, and the same weights in the layout kernels want."""
