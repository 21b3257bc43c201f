"""`tenfold models`: what is on this machine."""

import json
from dataclasses import asdict

from tenfold.serve.cli.terminal import columns, size
from tenfold.weights.find import known_models
from tenfold.weights.home import models_folder


def models(as_json: bool) -> None:
    """Print a table of models, or a list of objects."""
    found = known_models()
    if as_json:
        print(json.dumps([asdict(model) | {"path": str(model.path)} for model in found], indent=2))
        return
    if not found:
        print(f"no models here; put .gguf files or model folders into {models_folder()}, or name one of the hub")
        return
    rows = [(m.name, m.family, m.quantisation, size(m.bytes), str(m.path)) for m in found]
    print(columns([("NAME", "FAMILY", "WEIGHTS", "SIZE", "PATH"), *rows]))
