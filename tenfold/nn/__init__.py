"""Layers. Each takes `(x, step)` and calls `ops`; none keeps state about requests."""
