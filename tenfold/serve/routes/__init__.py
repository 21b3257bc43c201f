"""The endpoints: one module a family of paths, each with a `router`."""
