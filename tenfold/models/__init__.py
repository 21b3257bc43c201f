"""Models: one family a file; reading one file shows one forward."""
