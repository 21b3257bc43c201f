"""`bench/results/claims.json`: one object for each number this project claims, met or not."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tenfold.bench.command import portable
from tenfold.bench.hardware import ROOT, commit, processor, today
from tenfold.weights.beside import write
from tenfold.weights.default_model import NAMES

BUNDLED = "SmolLM2-135M-Instruct Q4_1"
CLAIMS = ROOT / "bench" / "results" / "claims.json"


@dataclass(frozen=True, slots=True)
class Claim:
    """A measured figure against its target. `value` None: not measured, and `note` says what was tried; `met` None: it
    has no target.
    """

    id: str
    what: str
    target: str
    value: float | None
    unit: str
    met: bool | None
    command: str
    against: str = ""
    spread: tuple[float, float] | None = None
    hardware: str = ""
    date: str = ""
    commit: str = ""
    kind: str = "measured"
    note: str = ""


def called(model: str) -> str:
    """What claims call a model."""
    return BUNDLED if model in NAMES else portable(model)


def ending(model: str) -> str:
    """The end of what is claimed, where that names no model: it is of the bundled one unless told otherwise."""
    return "" if model in NAMES else f", {portable(model)}"


def number(value: float) -> str:
    """For people: whole numbers with all digits."""
    return str(value) if isinstance(value, int) else f"{value:g}"


def claim(
    id: str,
    what: str,
    value: float | None,
    unit: str,
    command: str,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    against: str = "",
    spread: tuple[float, float] | None = None,
    hardware: str = "",
    kind: str = "measured",
    note: str = "",
) -> Claim:
    """A claim with its target in words and `met` derived from the value as it is written; hardware, date and commit are
    filled in.
    """
    bounds = [f">= {number(at_least)} {unit}".strip()] if at_least is not None else []
    bounds += [f"<= {number(at_most)} {unit}".strip()] if at_most is not None else []
    digits = value if value is None or isinstance(value, int) else float(f"{value:.4g}")
    fine = digits is not None and (at_least is None or digits >= at_least) and (at_most is None or digits <= at_most)
    rounded = None if spread is None else (float(f"{spread[0]:.4g}"), float(f"{spread[1]:.4g}"))
    return Claim(
        id,
        what,
        " and ".join(bounds),
        digits,
        unit,
        fine if bounds else None,
        command,
        against,
        rounded,
        hardware or processor(),
        today(),
        commit(),
        kind,
        note,
    )


def load(path: Path = CLAIMS) -> list[Claim]:
    """The claims of a file, none where there is no file. Raises ValueError for one that holds something else."""
    if not path.exists():
        return []
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        return [Claim(**{**row, "spread": tuple(row["spread"]) if row.get("spread") else None}) for row in rows]
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} holds no list of claims ({error}); take it from the repository again (git checkout)."
        ) from error


def record(claims: Iterable[Claim], path: Path = CLAIMS) -> None:
    """Put claims into the file, ordered by id; one with the same id and `what` is replaced."""
    rows = {(c.id, c.what): c for c in load(path)}
    rows.update({(c.id, c.what): c for c in claims})
    ordered = sorted(rows.values(), key=lambda c: (c.id[:1], int("".join(filter(str.isdigit, c.id)) or 0)))
    write(path, (json.dumps([asdict(c) for c in ordered], indent=1, ensure_ascii=False) + "\n").encode())


def signed(made: Claim, machine: Mapping[str, str]) -> Claim:
    """A claim with the machine and version its numbers come from."""
    return replace(
        made,
        hardware=machine.get("hardware") or made.hardware,
        commit=machine.get("commit") or made.commit,
        date=machine.get("date") or made.date,
    )
