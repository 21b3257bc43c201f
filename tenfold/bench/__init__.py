"""Benchmarks: paired, interleaved cases and the claims made from them."""
