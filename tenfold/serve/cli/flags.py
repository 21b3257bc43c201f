"""Command line options made from settings dataclasses: one option a field, its name in kebab case, also read from
TENFOLD_<FIELD> and from the configuration file.
"""

import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import Field, fields
from functools import wraps
from typing import Annotated, Any

import typer

from tenfold.base.config import groups
from tenfold.serve.cli import sizes
from tenfold.serve.cli.config_file import ConfigFile, find, read
from tenfold.serve.cli.sources import Given, Settled, settle

Command = Callable[..., Any]
METAVARS = {"bytes": "SIZE", "seconds": "SECONDS", "list": "LIST", "tokens": "TOKENS", "requests": "REQUESTS"}
PLAIN_METAVARS = {int: "N", float: "N", str: "TEXT"}
ONE, ARGUMENT, SEVERAL = "one", "argument", "several"  # how a command names its model

ConfigOption = Annotated[
    str | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="Read settings from this TOML or YAML file, after flags and environment. "
        "`tenfold config path` says which is read where none is given; an empty name: none.",
        show_default=False,
    ),
]
Model = Annotated[str | None, typer.Argument(metavar="MODEL", show_default=False, help="The same as --model.")]
Models = Annotated[
    list[str] | None,
    typer.Argument(metavar="MODEL", show_default=False, help="The same as --model, which may be repeated."),
]


def parse_size(text: str | int) -> int:
    """As `sizes.parse_size`, for an option. Raises typer.BadParameter."""
    try:
        return sizes.parse_size(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def variable(name: str) -> str:
    """The environment variable of a setting."""
    return f"TENFOLD_{name.upper()}"


ORIGINS: dict[str, Callable[[str], str]] = {  # by click's name for where a parameter came from
    "COMMANDLINE": lambda name: f"--{name.replace('_', '-')}",
    "ENVIRONMENT": variable,
}


def settings(*kinds: type, models: str = ONE) -> Callable[[Command], Command]:
    """Decorator: the first parameter of a command is a `Settled`, filled from an option for each field of `kinds`, from
    the environment, and from the configuration file.

    models: ONE has --model; ARGUMENT also takes it as an argument; SEVERAL takes any number of both.
    """

    def decorate(function: Command) -> Command:
        options = [option for kind in kinds for option in _options(kind, models)]

        @wraps(function)
        def with_settings(context: typer.Context, config_file: str | None, **given: Any) -> Any:
            file = read(find(config_file))
            values = {option.name: given.pop(option.name) for option in options}
            named = given.pop("named_model", None)
            return function(settled(context, values, named, file), **given)

        own = list(inspect.signature(function).parameters.values())[1:]
        before = [_parameter("context", typer.Context), *_argument(models)]
        after = [*options, _parameter("config_file", ConfigOption, None)]
        signature = inspect.Signature([p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in before + own + after])
        with_settings.__signature__ = signature  # type: ignore[attr-defined]
        with_settings.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
        del with_settings.__wrapped__
        return with_settings

    return decorate


def settled(context: typer.Context, values: Mapping[str, Any], named: Any, file: ConfigFile) -> Settled:
    """The settings of a command: `values` of its options, `named` its model argument or arguments."""
    given = {}
    for name, value in values.items():
        source = context.get_parameter_source(name)
        if source is not None and source.name in ORIGINS:
            given[name] = Given(value, ORIGINS[source.name](name))
    return settle(given, _models(named, given.pop("model", None)), file)


def _models(named: Any, option: Given | None) -> list[Given]:
    """Models given as arguments and options; else the one of the environment."""
    arguments = [Given(model, "argument") for model in ([named] if isinstance(named, str) else named or [])]
    if option is not None and isinstance(option.value, list):
        return arguments + [Given(model, option.origin) for model in option.value]
    if option is not None and not (arguments and option.origin == variable("model")):
        if arguments and option.value != arguments[0].value:
            raise ValueError(
                f"Two models are named, {arguments[0].value} and {option.value}; allowed: one. Leave one of them out."
            )
        return arguments or [option]
    fallback = os.environ.get(variable("model")) if not arguments else None
    return [Given(fallback, variable("model"))] if fallback else arguments


def _argument(models: str) -> list[inspect.Parameter]:
    if models == ONE:
        return []
    return [_parameter("named_model", Model if models == ARGUMENT else Models, None)]


def _options(kind: type, models: str) -> list[inspect.Parameter]:
    panels = groups(kind)
    return [_option(f, panels[f.name], f.name == "model" and models == SEVERAL) for f in fields(kind)]


def _option(field: Field[Any], panel: str, repeated: bool) -> inspect.Parameter:
    """repeated: may be given several times; then the environment is read elsewhere, as it would be split at blanks."""
    name = field.name.replace("_", "-")
    spelling = f"--{name}/--no-{name}" if isinstance(field.default, bool) else f"--{name}"
    default: Any = field.default
    is_size = field.metadata["unit"] == "bytes"
    option = typer.Option(
        [default] if repeated else sizes.format_size(default) if is_size else default,
        *([spelling, "-m"] if name == "model" else [spelling]),
        help=field.metadata["help"] + ("; may be repeated, also as NAME=MODEL" if repeated else ""),
        metavar=_metavar(field),
        autocompletion=_completion(field),
        envvar=None if repeated else variable(field.name),
        show_envvar=False,  # the rule is told once, under all options
        parser=parse_size if is_size else None,
        rich_help_panel=panel,
    )
    return _parameter(field.name, list[str] if repeated else type(field.default), option)


def _metavar(field: Field[Any]) -> str | None:
    if field.metadata["choices"]:
        return "[" + "|".join(field.metadata["choices"]) + "]"
    return METAVARS.get(field.metadata["unit"]) or PLAIN_METAVARS.get(type(field.default))


def _completion(field: Field[Any]) -> Callable[[str], list[str]] | None:
    """What the shell offers after the option."""
    choices = field.metadata["choices"]
    return (lambda incomplete: [c for c in choices if c.startswith(incomplete)]) if choices else None


def _parameter(name: str, annotation: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
