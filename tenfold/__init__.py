"""Tenfold: an inference engine for large language models in which every optimisation is a measured choice."""

__version__ = "0.1.0"
