"""Every command with its options, on one page. What a command does lies behind one table, so that help and
completion stay quick.
"""

import gc
from dataclasses import replace
from typing import Annotated, Any

import typer
from typer import Argument, Option

import tenfold
from tenfold.base.config import EngineConfig
from tenfold.base.table import entry
from tenfold.serve.cli.flags import parse_size, settings
from tenfold.serve.cli.terminal import read_prompt
from tenfold.serve.settings import ServeConfig

BODIES = {
    "run": "tenfold.serve.cli.run:run",
    "chat": "tenfold.serve.cli.chat:chat",
    "serve": "tenfold.serve.cli.server:serve",
    "models": "tenfold.serve.cli.models:models",
    "plan": "tenfold.serve.cli.plan:plan",
    "doctor": "tenfold.serve.cli.doctor:doctor",
    "explain": "tenfold.serve.cli.choices:explain",
    "tune": "tenfold.serve.cli.choices:tune",
    "bench": "tenfold.bench.cli:app",
    "start templates": "tenfold.engine.template:start",
}

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help='Run large language models. Start with: tenfold run "Why is the sky blue?"',
    epilog="Options of engine and server are also read from the environment: --max-batch from TENFOLD_MAX_BATCH.",
)


def body(name: str) -> Any:
    """What `name` does. What importing PyTorch makes stays for good: looking for garbage among it would cost 0.1 s here
    and 0.25 s while a model loads (2-core EPYC, processor time, November 2026).
    """
    gc.disable()
    try:
        return entry(BODIES, name, "command")
    finally:
        gc.freeze()
        gc.enable()


def named(config: EngineConfig, model: str | None) -> EngineConfig:
    """`config` for a model given as an argument, where one was."""
    return replace(config, model=model) if model else config


def show_version(wanted: bool) -> None:
    if wanted:
        print(f"tenfold {tenfold.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, Option("--version", callback=show_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[
        bool, Option("--debug", envvar="TENFOLD_DEBUG", help="Show a trace when something fails.")
    ] = False,
) -> None:
    """What holds for every command."""


Model = Annotated[str | None, Argument(metavar="[MODEL]", show_default=False, help="The model; the same as --model.")]
MaxTokens = Annotated[int, Option(min=1, help="Longest answer in tokens.")]
Temperature = Annotated[float, Option(help="0 takes the likeliest token; higher is more varied.")]
TopP = Annotated[float, Option(help="Keep the likeliest tokens that together have this probability.")]
TopK = Annotated[int, Option(help="Keep this many likeliest tokens; 0 keeps all.")]
RepetitionPenalty = Annotated[float, Option(help="Above 1 makes repeating less likely.")]
Seed = Annotated[int | None, Option(help="Makes sampling reproducible.")]
System = Annotated[str, Option(help="System message.")]
Quiet = Annotated[bool, Option("--quiet", "-q", help="Print the answer only.")]


@app.command("run")
@settings(config=EngineConfig)
def run_command(
    config: EngineConfig,
    prompt: Annotated[str | None, Argument(help="The prompt; '-' or nothing reads it from standard input.")] = None,
    raw: Annotated[
        bool, Option("--raw", help="Continue the text as it stands, without the model's chat template.")
    ] = False,
    system: System = "",
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Seed = None,
    stop: Annotated[list[str] | None, Option(help="A text that ends the answer; may be given several times.")] = None,
    quiet: Quiet = False,
) -> None:
    """Answer one prompt: the text on standard output, times on standard error."""
    text = read_prompt(prompt)  # and what is wrong with it is told before PyTorch is imported
    if raw and system:
        raise ValueError("--raw continues the prompt as it stands, so there is no place for --system; leave one out.")
    if not raw:
        body("start templates")()  # their process starts while this one imports PyTorch
    given = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed}
    sampling = given | {"repetition_penalty": repetition_penalty, "stop": tuple(stop or ())}
    body("run")(config, text, raw=raw, system=system, sampling=sampling, quiet=quiet)


@app.command("chat")
@settings(config=EngineConfig)
def chat_command(
    config: EngineConfig,
    model_name: Model = None,
    system: System = "",
    max_tokens: MaxTokens = 1024,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.95,
    top_k: TopK = 0,
    repetition_penalty: RepetitionPenalty = 1.05,
    seed: Seed = None,
    quiet: Quiet = False,
) -> None:
    """Talk with the model in the terminal. Ctrl-C stops an answer; /help lists what else there is."""
    body("start templates")()  # their process starts while this one imports PyTorch
    given = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed}
    body("chat")(
        named(config, model_name),
        system=system,
        sampling=given | {"repetition_penalty": repetition_penalty},
        quiet=quiet,
    )


@app.command("serve")
@settings(config=EngineConfig, server=ServeConfig)
def serve_command(config: EngineConfig, server: ServeConfig, model_name: Model = None) -> None:
    """Serve the model over HTTP, as OpenAI's API."""
    server.check()  # before PyTorch is imported: a wrong option should not take seconds to be told
    body("serve")(named(config, model_name), server)


@app.command("models")
def models_command(
    as_json: Annotated[bool, Option("--json", help="For programs.")] = False,
) -> None:
    """List the models that are on this machine."""
    body("models")(as_json)


@app.command("plan")
@settings(config=EngineConfig)
def plan_command(
    config: EngineConfig,
    model_name: Model = None,
    memory: Annotated[
        int,
        Option(
            parser=parse_size, metavar="SIZE", help="Plan for this much free memory, e.g. 8G (0: what is free here)."
        ),
    ] = 0,
) -> None:
    """Show what a model needs of memory, before loading it. Exit status 3: it does not fit; the plan says what
    would.
    """
    body("plan")(named(config, model_name), memory)


@app.command("doctor")
def doctor_command(
    build: Annotated[bool, Option("--build", help="Compile the CPU kernels now if they are not.")] = False,
    as_json: Annotated[bool, Option("--json", help="For programs.")] = False,
) -> None:
    """Show which fast paths are on, which are not, why, and how to get them."""
    body("doctor")(build, as_json)


@app.command("explain")
@settings(config=EngineConfig)
def explain_command(config: EngineConfig) -> None:
    """Show what runs each linear operation of a model, and why."""
    body("explain")(config)


@app.command("tune")
@settings(config=EngineConfig)
def tune_command(config: EngineConfig) -> None:
    """Measure the ways to run each linear operation of a model on this machine, and remember the fastest."""
    body("tune")(config)


@app.command(
    "bench",
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def bench_command(context: typer.Context) -> Any:
    """Measure this machine: speed against peers, start-up, quality."""
    command = typer.main.get_command(body("bench"))
    return command.main(list(context.args), prog_name="tenfold bench", standalone_mode=False)
