"""Base: configuration, devices, logging and the table of choices. Imports nothing of the package above it."""
