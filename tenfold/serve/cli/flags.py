"""Command line options made from a settings dataclass: one option a field, its name in kebab case, also read from
TENFOLD_<FIELD>.
"""

import inspect
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from functools import wraps
from typing import Any

import typer

UNITS = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
SIZES = frozenset({"kv_memory", "max_body"})  # fields that count bytes, where 2G is easier to read than 2147483648


def parse_size(text: str | int) -> int:
    """Bytes: "4096", "512M", "1.5GiB". Raises typer.BadParameter."""
    number = str(text).strip().lower().removesuffix("ib").removesuffix("b") or "0"
    unit = number[-1] if number[-1] in UNITS else ""
    try:
        return int(float(number.removesuffix(unit)) * UNITS[unit])
    except (ValueError, OverflowError):
        raise typer.BadParameter(
            f"{text!r} is not a size; allowed: a number of bytes, also with K, M, G or T."
        ) from None


def settings(**kinds: type) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: the parameter `name` of each `name=Dataclass` is filled from options, one for each field."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        options = {name: _options(kind) for name, kind in kinds.items()}

        @wraps(function)
        def with_settings(**given: Any) -> Any:
            for name, kind in kinds.items():
                given[name] = kind(**{field: given.pop(field) for field in options[name]})
            return function(**given)

        own = [p for p in inspect.signature(function).parameters.values() if p.name not in kinds]
        added = [p for parameters in options.values() for p in parameters.values()]
        keyword = inspect.Parameter.KEYWORD_ONLY
        signature = inspect.Signature([p.replace(kind=keyword) for p in own] + added)
        with_settings.__signature__ = signature  # type: ignore[attr-defined]
        with_settings.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
        del with_settings.__wrapped__
        return with_settings

    return decorate


def _options(kind: type) -> dict[str, inspect.Parameter]:
    panel = kind.__name__.removesuffix("Config")
    return {f.name: _option(f, panel) for f in fields(kind)}


def _option(field: Field[Any], panel: str) -> inspect.Parameter:
    assert field.default is not MISSING
    name = field.name.replace("_", "-")
    spelling = f"--{name}/--no-{name}" if isinstance(field.default, bool) else f"--{name}"
    spellings = [spelling, "-m"] if name == "model" else [spelling]
    extra: dict[str, Any] = {"parser": parse_size, "metavar": "SIZE"} if field.name in SIZES else {}
    option = typer.Option(
        field.default,
        *spellings,
        help=field.metadata["help"],
        envvar=f"TENFOLD_{field.name.upper()}",
        show_envvar=False,
        rich_help_panel=panel,
        **extra,
    )
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=type(field.default))
