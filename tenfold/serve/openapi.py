"""What /openapi.json tells beyond what FastAPI finds by itself: request bodies, which the routes read on their own,
with the models and the limits of this server; keys; and the errors that can meet any request.

Invariant: one name stands for one schema.
"""

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from tenfold.serve.guard import OPEN_PATHS
from tenfold.serve.service import DEFAULT_NAME, Service
from tenfold.serve.settings import ServeConfig

SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "Authorization: Bearer KEY"},
    "apiKey": {"type": "apiKey", "in": "header", "name": "x-api-key"},
}
# Field of a request: the setting that caps it, and what the cap is in JSON Schema.
CAPPED = {
    "n": ("max_n", "maximum"),
    "logprobs": ("max_logprobs", "maximum"),
    "top_logprobs": ("max_logprobs", "maximum"),
    "stop": ("max_stop", "maxItems"),
    "questions": ("max_questions", "maxItems"),
    "messages": ("max_messages", "maxItems"),
    "tools": ("max_tools", "maxItems"),
}

EVENT = {"event": {"type": "string"}, "data": {"type": "string", "description": "an object of JSON, or [DONE]"}}
EVENTS = {"schema": {"type": "object", "properties": EVENT, "required": ["data"]}}  # of each server-sent event

Schema = dict[str, Any]


def complete(schema: Schema, bodies: Sequence[type[BaseModel]], service: Service) -> Schema:
    """`schema` with all of it, changed in place."""
    _describe_bodies(schema, bodies, service)
    for path, operations in schema["paths"].items():
        for operation in operations.values():
            _complete_operation(path, operation)
            if _streams(operation, schema["components"]["schemas"]):
                operation["responses"]["200"].setdefault("content", {})["text/event-stream"] = EVENTS
    settings = service.settings
    if settings.api_key or settings.api_key_file or settings.admin_key:
        schema["components"]["securitySchemes"] = SCHEMES
        schema["security"] = [{name: []} for name in SCHEMES]
    return schema


def _complete_operation(path: str, operation: Schema) -> None:
    operation["responses"].pop("422", None)  # FastAPI's own shape of error, which no route gives
    if path in OPEN_PATHS:
        operation["security"] = []
        operation["responses"].pop("401", None)


def _streams(operation: Schema, schemas: Schema) -> bool:
    """Whether the answer may be events: where the request has a field, or the query a parameter, `stream`."""
    if any(parameter["name"] == "stream" for parameter in operation.get("parameters", ())):
        return True
    content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
    name = content.get("schema", {}).get("$ref", "").rpartition("/")[2]
    return "stream" in schemas.get(name, {}).get("properties", {})


def _describe_bodies(schema: Schema, bodies: Sequence[type[BaseModel]], service: Service) -> None:
    modes: Any = [(model, "validation") for model in bodies]
    _, found = models_json_schema(modes, ref_template="#/components/schemas/{model}")
    schemas = schema["components"]["schemas"]
    for name, described in found.get("$defs", {}).items():
        assert schemas.get(name, described) == described, f"two models are called {name}"
        schemas[name] = described
    for model in bodies:
        for name, field in schemas[model.__name__]["properties"].items():
            _narrow(name, field, service)
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)


def _narrow(name: str, field: Schema, service: Service) -> None:
    """Say what the type of a field cannot: the values of a refused one, the names of models, caps."""
    if field.get("x-tenfold") == "refused":
        for key in ("anyOf", "type", "items", "$ref", "additionalProperties"):
            field.pop(key, None)
        field["enum"] = [None, *field["x-tenfold-neutral"]]
    elif name == "model":
        names = [DEFAULT_NAME, *service.models, *service.classifiers]
        field["enum"] = [*dict.fromkeys(names), *([None] if "anyOf" in field else [])]
    elif name in CAPPED:
        _cap(field, *CAPPED[name], service.settings)


def _cap(field: Schema, setting: str, keyword: str, settings: ServeConfig) -> None:
    """A keyword of JSON Schema concerns values of its own type only, so it may stand beside a union."""
    field[keyword] = getattr(settings, setting)
