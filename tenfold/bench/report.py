"""Tables of README.md and docs/measured.md, generated from the recorded claims between two marker comments."""

import re
from collections.abc import Sequence
from pathlib import Path

from tenfold.bench.claims import Claim, load
from tenfold.bench.hardware import ROOT

DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "measured.md")


def table(claims: Sequence[Claim]) -> str:
    """A Markdown table, one claim a row, with the machines and commits it rests on below."""
    rows = ["| id | what | measured | spread | target | met | note |", "|---|---|---|---|---|---|---|"]
    for c in claims:
        value = "not measured" if c.value is None else f"**{c.value:g}** {c.unit}".strip()
        spread = "" if c.spread is None else f"{c.spread[0]:g} to {c.spread[1]:g}"
        rows.append(f"| {c.id} | {c.what} | {value} | {spread} | {c.target} | {'yes' if c.met else 'no'} | {c.note} |")
    origins = sorted({f"{c.hardware}; commit {c.commit}; {c.date}" for c in claims})
    return "\n".join(rows) + "\n\n" + "\n".join(f"Measured on {origin}." for origin in origins)


def details(claims: Sequence[Claim]) -> str:
    """The same table followed by the commands that measure it again."""
    commands: dict[str, list[str]] = {}
    for c in claims:
        commands.setdefault(c.command, []).append(c.id)
    lines = [f"- {', '.join(dict.fromkeys(ids))}: `{command}`" for command, ids in commands.items()]
    return table(claims) + "\n\nMeasured again by:\n\n" + "\n".join(lines)


def fill(text: str, claims: Sequence[Claim]) -> str:
    """Put the table of ids that start with a PREFIX between `<!-- claims:PREFIX,...[:details] -->` and its end mark."""

    def block(match: re.Match[str]) -> str:
        chosen = [c for c in claims if c.id.startswith(tuple(match["prefix"].split(",")))]
        body = details(chosen) if match["form"] else table(chosen)
        return f"{match['open']}\n{body}\n<!-- /claims -->"

    pattern = r"(?P<open><!-- claims:(?P<prefix>[\w,]*)(?P<form>:details)? -->).*?<!-- /claims -->"
    return re.sub(pattern, block, text, flags=re.DOTALL)


def write(documents: Sequence[Path] = DOCUMENTS) -> list[Path]:
    """Renew the tables in place; returns the documents that changed."""
    claims = load()
    changed = []
    for document in documents:
        text = document.read_text()
        filled = fill(text, claims)
        if filled != text:
            document.write_text(filled)
            changed.append(document)
    return changed
