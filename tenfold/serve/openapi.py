"""What /openapi.json tells beyond what FastAPI finds by itself: request bodies, which the routes read on their own,
keys, and the errors that can meet any request.

Invariant: one name stands for one schema.
"""

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from tenfold.serve.guard import OPEN_PATHS

SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "Authorization: Bearer KEY"},
    "apiKey": {"type": "apiKey", "in": "header", "name": "x-api-key"},
}
OPENAPI_PATH = "/openapi.json"


def complete(schema: dict[str, Any], bodies: Sequence[type[BaseModel]], keyed: bool) -> dict[str, Any]:
    """`schema` with all of it, changed in place. keyed: whether this server asks for keys."""
    _describe_bodies(schema, bodies)
    for path, methods in schema["paths"].items():
        for operation in methods.values():
            operation.pop("security", None)
            responses = operation["responses"]
            responses.pop("422", None)  # FastAPI's own shape of error, which no route gives
            if path in OPEN_PATHS:
                operation["security"] = []
                for status in ("401", "404"):
                    responses.pop(status, None)
    if keyed:
        schema["components"]["securitySchemes"] = SCHEMES
        schema["security"] = [{name: []} for name in SCHEMES]
    return schema


def _describe_bodies(schema: dict[str, Any], bodies: Sequence[type[BaseModel]]) -> None:
    modes: Any = [(model, "validation") for model in bodies]
    _, found = models_json_schema(modes, ref_template="#/components/schemas/{model}")
    schemas = schema["components"]["schemas"]
    for name, described in found.get("$defs", {}).items():
        assert schemas.get(name, described) == described, f"two models are called {name}"
        schemas[name] = described
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
