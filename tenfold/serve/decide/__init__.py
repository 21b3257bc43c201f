"""Questions with a fixed set of answers, answered with a probability for each by any language model (README.md)."""
