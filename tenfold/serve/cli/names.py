"""What clients call the models of a server."""

from collections.abc import Sequence
from pathlib import Path

from tenfold.serve.cli.sources import ChosenModel
from tenfold.weights import default_model


def display_name(model: str) -> str:
    """What to call a model that a user named by `model`."""
    if model in default_model.NAMES:
        return default_model.TITLE
    path = Path(model).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return path.stem
    return path.resolve().name if path.is_dir() else model


def served_names(models: Sequence[ChosenModel], served_name: str = "") -> list[str]:
    """A name for each model. Raises ValueError where two would have the same."""
    if served_name and len(models) > 1:
        raise ValueError(
            f"served_name is {served_name!r}, and there are {len(models)} models; name each: --model NAME=MODEL."
        )
    names = [model.name or served_name or display_name(model.config.model) for model in models]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"Two models are called {name!r}; give each a name of its own: --model NAME=MODEL.")
    return names


def classifier_names(given: str, taken: Sequence[str]) -> dict[str, str]:
    """Name to folder of the classifiers of a setting. Raises ValueError where two models would have the same name."""
    found: dict[str, str] = {}
    for spelled in filter(None, (part.strip() for part in given.split(","))):
        name, equals, path = spelled.partition("=")
        if not equals:
            name, path = ("sentiment" if spelled == "default" else Path(spelled).expanduser().resolve().name), spelled
        if name in found or name in taken:
            raise ValueError(f"Two models are called {name!r}; give each a name of its own: --classifier NAME=FOLDER.")
        if not name or not path:
            raise ValueError(f"classifier is {spelled!r}; allowed: default, a folder, or NAME=FOLDER.")
        found[name] = path
    return found
