"""What every request body is made of: fields that say what becomes of them, and errors that name them.

Invariant: every request field says what becomes of it, `honoured`, `ignored` or `refused` with a reason;
`docs/api.md` is checked against these models. A name that is not here is refused, so a misspelt field never silently
does nothing.
"""

from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tenfold.engine.request import LONGEST_AIM, check_targets
from tenfold.serve.errors import from_validation, from_value_error, invalid

MOST = 2**31 - 1  # no count is larger


def honoured(default: Any, help: str, shows: dict[str, Any] | None = None, **rules: Any) -> Any:
    """A field that does what the API says. rules: what pydantic checks; shows: what is checked elsewhere, for the
    description of the API.
    """
    return Field(default, description=help, json_schema_extra={"x-tenfold": "honoured"} | (shows or {}), **rules)


def _aim(help: str) -> Any:
    """Checked by `Terms`."""
    return honoured(None, help, shows={"minimum": 0, "maximum": LONGEST_AIM}, allow_inf_nan=True)


def seconds_to_first() -> Any:
    return _aim("extension: seconds to the first token to aim at, where the schedule is phases; --ttft where absent")


def seconds_per_token() -> Any:
    return _aim("extension: seconds per token after the first to aim at, likewise; --tpot where absent")


def ignored(why: str) -> Any:
    """A field that is accepted and changes nothing; a response names the ignored fields of its request in
    `x-tenfold-ignored`.
    """
    return Field(None, description=why, json_schema_extra={"x-tenfold": "ignored"})


def refused(why: str, *neutral: Any) -> Any:
    """A field whose effect is not offered: any value but null and the `neutral` ones gets a 400 with the reason."""
    return Field(None, description=why, json_schema_extra={"x-tenfold": "refused", "x-tenfold-neutral": list(neutral)})


class Body(BaseModel):
    """Types are taken strictly ("5" is not 5) and NaN and infinity are not numbers."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)

    @classmethod
    def treatment(cls, name: str) -> str:
        """ "honoured", "ignored" or "refused"."""
        return str(_extra(cls, name)["x-tenfold"])

    def ignored(self) -> list[str]:
        """The fields of this request that change nothing."""
        return sorted(name for name in self.model_fields_set if self.treatment(name) == "ignored")

    def check_refused(self) -> None:
        """Raises ApiError (400) for the first field whose effect is not offered."""
        for name in sorted(self.model_fields_set):
            value = getattr(self, name)
            if (
                value is None
                or self.treatment(name) != "refused"
                or value in _extra(type(self), name)["x-tenfold-neutral"]
            ):
                continue
            raise invalid(
                f"{name} is not supported: {type(self).model_fields[name].description}", name, "unsupported_parameter"
            )


def _extra(model: type[BaseModel], name: str) -> dict[str, Any]:
    extra = model.model_fields[name].json_schema_extra
    assert isinstance(extra, dict), f"{name} does not say what becomes of it"
    return extra


B = TypeVar("B", bound=Body)


def parse(model: type[B], body: bytes) -> B:
    """The request in a body. Raises ApiError (400) naming the first wrong field."""
    try:
        request = model.model_validate_json(body)
    except ValidationError as error:
        raise from_validation(error) from None
    request.check_refused()
    return request


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorDetail


@dataclass(frozen=True, slots=True)
class Terms:
    """On what terms a request runs, as far as its sender says: how urgent, for whom, sharing caches with whom, and how
    fast it had better be, see `Request`. Raises ApiError (400) for what a request cannot aim at.
    """

    priority: int = 0
    user: str = ""
    cache_salt: str = ""
    ttft: float = 0.0
    tpot: float = 0.0

    def __post_init__(self) -> None:
        try:
            check_targets(self.ttft, self.tpot)
        except ValueError as error:
            raise from_value_error(error, ("ttft", "tpot")) from None
