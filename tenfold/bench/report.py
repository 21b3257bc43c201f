"""Tables of README.md and docs/measured.md, generated from the recorded claims between two marker comments."""

import re
from collections.abc import Sequence
from pathlib import Path

from tenfold.bench.claims import Claim, load
from tenfold.bench.hardware import ROOT

DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "measured.md")


def table(claims: Sequence[Claim]) -> str:
    """A Markdown table, one claim a row, with the machines and commits it rests on below."""
    rows = ["| id | what | measured | spread | target | met |", "|---|---|---|---|---|---|"]
    for c in claims:
        value = "not measured" if c.value is None else f"**{c.value:g}** {c.unit}".strip()
        spread = "" if c.spread is None else f"{c.spread[0]:g} to {c.spread[1]:g}"
        rows.append(f"| {c.id} | {c.what} | {value} | {spread} | {c.target} | {'yes' if c.met else 'no'} |")
    origins = sorted({f"{c.hardware}; commit {c.commit}; {c.date}" for c in claims})
    return "\n".join(rows) + "\n\n" + "\n".join(f"Measured on {origin}." for origin in origins)


def details(claims: Sequence[Claim]) -> str:
    """The same table followed by each claim's note and the command that re-runs it."""
    lines = [f"- **{c.id}** {c.what}: {c.note + ' ' if c.note else ''}`{c.command}`" for c in claims]
    return table(claims) + "\n\n" + "\n".join(lines)


def fill(text: str, claims: Sequence[Claim]) -> str:
    """Put the table of ids that start with PREFIX between `<!-- claims:PREFIX[:details] -->` and `<!-- /claims -->`."""

    def block(match: re.Match[str]) -> str:
        chosen = [c for c in claims if c.id.startswith(match["prefix"])]
        body = details(chosen) if match["form"] else table(chosen)
        return f"{match['open']}\n{body}\n<!-- /claims -->"

    pattern = r"(?P<open><!-- claims:(?P<prefix>\w*)(?P<form>:details)? -->).*?<!-- /claims -->"
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
