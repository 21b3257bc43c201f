"""Prefill and decode side by side on one GPU, over one KV store (semi-PD, infinigence 2025).

`latency` predicts how long a phase takes on some of the GPU's multiprocessors, `controller` decides how many each gets.
"""
