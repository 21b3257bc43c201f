"""Checkpoints that other quantisers wrote: their settings, their tensors, and how these become packed formats."""
