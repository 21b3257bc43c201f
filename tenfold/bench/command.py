"""What the commands `python -m tenfold.bench.NAME` and `tenfold bench NAME` have in common: results and settings, and
the command that measures the same again.
"""

import argparse
import json
import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tenfold.weights.beside import write

# Arguments that change no figure: where things lie, how long a run may take, whether it is kept and who asks.
PLACES = ("commit", "folder", "job", "key", "limit", "name", "out", "peer_path", "picture", "record", "resume", "total")


def save(path: Path, result: dict[str, Any], commit: str = "") -> None:
    """Write a result, all or nothing and without the folders of this machine; commit: what the command line names,
    where there is no checkout to ask.
    """
    if commit:
        result["machine"]["commit"] = commit
    named = {key: _portable(result[key]) for key in ("model", "settings", "changes") if key in result}
    write(path, (json.dumps(result | named, indent=1) + "\n").encode())


def settings(pairs: Sequence[str]) -> dict[str, Any]:
    """Fields of EngineConfig from NAME=VALUE texts; numbers and truths as such, all else as text."""
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"{pair!r} is no setting; write NAME=VALUE, such as lookahead=0.")
        try:
            found[name] = json.loads(value.lower() if value in ("True", "False") else value)
        except ValueError:
            found[name] = value
    return found


def again(parser: argparse.ArgumentParser, given: argparse.Namespace) -> str:
    """The command that measures the same: what is not as it is by default."""
    changed = ((name, value) for name, value in vars(given).items() if value != parser.get_default(name))
    return spelled(parser.prog, (("--" + name.replace("_", "-"), value) for name, value in changed))


def spelled(program: str, options: Iterable[tuple[str, Any]]) -> str:
    """A command line without PLACES. options: each with its value, True for one that takes none; of a list every value
    gets the option.
    """
    words = program.split()
    for option, value in options:
        if option.removeprefix("--").replace("-", "_") not in PLACES:
            for each in value if isinstance(value, list | tuple) else [value]:
                words += [option] if each is True else [option, _word(each)]
    return shlex.join(words)


def _word(value: Any) -> str:
    if isinstance(value, Path):
        return value.absolute().name
    return str(value).removesuffix(".0") if isinstance(value, float) else portable(str(value))


def portable(text: str) -> str:
    """A text without the folders of this machine: paths, also in lists and after "=", by their last names."""

    def last(found: re.Match[str]) -> str:
        path = os.path.expanduser(found[0])
        return os.path.basename(os.path.abspath(path)) if os.path.isabs(path) or os.path.exists(path) else found[0]

    return re.sub(r"[^,=]+", last, text)


def _portable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _portable(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_portable(each) for each in value]
    return portable(value) if isinstance(value, str) else value


def unlike(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """What of commit and torch is another on the machine of an earlier result, "" where both are the same."""
    return ", ".join(
        f"{name} {before.get(name)}, now {now.get(name)}"
        for name in ("commit", "torch")
        if before.get(name) != now.get(name)
    )
