"""Objects inside a request body that are read on their own, with errors that name the whole path."""

from collections.abc import Iterable
from typing import Any, TypeVar

from pydantic import ValidationError

from tenfold.serve.errors import ApiError, from_validation, invalid
from tenfold.serve.protocol.body import Body

B = TypeVar("B", bound=Body)


def read(model: type[B], value: Any, path: str) -> B:
    """`value` as a `model`. Raises ApiError (400) that names the field at fault, beginning with `path`."""
    try:
        nested = model.model_validate(value)
    except ValidationError as error:
        raise _within(from_validation(error), path) from None
    check_refused(nested, path)
    return nested


def check_refused(nested: Body, path: str) -> None:
    """Raises ApiError (400) for the first field of `nested` whose effect is not offered."""
    try:
        nested.check_refused()
    except ApiError as error:
        raise _within(error, path) from None


def check_type(value: dict[str, Any], path: str, allowed: Iterable[str], why: str) -> str:
    """The `type` of an object, if it is one that is allowed. Raises ApiError (400) naming it otherwise."""
    kind = value.get("type")
    if not isinstance(kind, str) or kind not in allowed:
        message = f"{path} has the type {str(kind)[:64]!r}; allowed: {', '.join(allowed)}. {why}"
        raise invalid(message, path, "unsupported_value")
    return kind


def _within(error: ApiError, path: str) -> ApiError:
    if error.param is None:
        return invalid(f"{path} must be an object.", path, "invalid_type")
    return invalid(f"{path}.{error.message}", f"{path}.{error.param}", error.code or "invalid_value")
