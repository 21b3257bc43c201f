"""Classifiers made: data to learn from, training, scores and calibration. Serving reads what this writes, and nothing
of it."""
