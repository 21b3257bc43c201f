"""What the commands `python -m tenfold.bench.NAME` have in common."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def save(path: Path, result: dict[str, Any], commit: str) -> None:
    """Write a result; commit: what the command line names, where there is no checkout to ask."""
    if commit:
        result["machine"]["commit"] = commit
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1))


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
