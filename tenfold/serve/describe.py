"""The tables of docs/api.md, cli.md and serving.md, made from the models, settings and metrics they describe.

`python -m tenfold.serve.describe` in a checkout renews them; a test fails where that was forgotten.
"""

from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from tenfold.base.config import EngineConfig, groups
from tenfold.serve.aliases import ALIASES, Alias
from tenfold.serve.metrics import Metrics
from tenfold.serve.protocol.body import Body
from tenfold.serve.protocol.chat import ChatRequest
from tenfold.serve.protocol.completions import CompletionRequest
from tenfold.serve.protocol.decisions import ClassifyRequest, DecisionRequest
from tenfold.serve.protocol.embeddings import EmbeddingRequest
from tenfold.serve.protocol.messages import MessagesRequest
from tenfold.serve.protocol.responses import ResponsesRequest
from tenfold.serve.protocol.tokens import TokenizeRequest
from tenfold.serve.settings import ServeConfig

DOCS = Path(__file__).parents[2] / "docs"
TREATMENTS = ("honoured", "refused", "ignored")  # order of a table
EXTENSION = "extension: "  # how fields begin that OpenAI's API does not have; they come after the others


def field_table(model: type[Body]) -> Iterator[str]:
    """One row a request field: what becomes of it, and what it means or why not."""
    yield "| field | | |"
    yield "|---|---|---|"
    rows = [(name, model.treatment(name), str(field.description)) for name, field in model.model_fields.items()]
    for name, treatment, help in sorted(rows, key=lambda row: (TREATMENTS.index(row[1]), row[2].startswith(EXTENSION))):
        yield f"| `{name}` | {treatment} | {help} |"


def settings_table(kind: type) -> Iterator[str]:
    """One row a setting, as the command line spells it, under the headings its help has."""
    headings = groups(kind)
    yield "| option | default | |"
    yield "|---|---|---|"
    for f in fields(kind):
        if f.metadata["group"]:
            yield f"| **{headings[f.name]}** | | |"
        yield f"| `--{f.name.replace('_', '-')}` | {f.default!r} | {f.metadata['help']} |"


SUFFIXES = {"counter": "_total"}


def metrics_table(settings: type[ServeConfig]) -> Iterator[str]:
    """One row a metric of a server with these settings."""
    yield "| metric | | |"
    yield "|---|---|---|"
    for family in Metrics({}, settings()).collect():
        if family.name.startswith("tenfold_"):
            yield f"| `{family.name}{SUFFIXES.get(family.type, '')}` | {family.type} | {family.documentation} |"


def aliases_table(known: Iterable[Alias]) -> Iterator[str]:
    """One row a name of vLLM's that renames one of ours."""
    yield "| name | the same as |"
    yield "|---|---|"
    for alias in known:
        yield f"| `{alias.name}` | `{alias.source}` |"


TABLES: dict[str, dict[str, tuple[Any, Any]]] = {
    "api.md": {
        "Chat completions": (field_table, ChatRequest),
        "Completions": (field_table, CompletionRequest),
        "Responses": (field_table, ResponsesRequest),
        "Messages": (field_table, MessagesRequest),
        "Embeddings": (field_table, EmbeddingRequest),
        "Decisions": (field_table, DecisionRequest),
        "Classes": (field_table, ClassifyRequest),
        "Tokens": (field_table, TokenizeRequest),
    },
    "cli.md": {"Engine settings": (settings_table, EngineConfig)},
    "serving.md": {
        "Every setting of the server": (settings_table, ServeConfig),
        "Every metric": (metrics_table, ServeConfig),
        "Names of vLLM": (aliases_table, ALIASES),
    },
}


def renewed(name: str, text: str) -> str:
    """A page with the first table under each of its headings in TABLES made anew."""
    for heading, (make, of) in TABLES[name].items():
        start = text.index("\n|", text.index(f"\n## {heading}\n")) + 1
        end = text.find("\n\n", start)
        end = end if end >= 0 else len(text) - 1  # the page ends with the table and a newline
        text = text[:start] + "\n".join(make(of)) + text[end:]
    return text


def main() -> None:
    for name in TABLES:
        page = DOCS / name
        page.write_text(renewed(name, page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
