"""The engine: requests become steps, steps become tokens."""
