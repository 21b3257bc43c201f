"""Offline quantisation: a model in, a recipe and weights out. Files are its interface to the engine."""
