"""Every command with its options, on one page. What a command does lies behind one table, so that help and
completion stay quick.
"""

import gc
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

import tenfold
from tenfold.base.config import EngineConfig
from tenfold.base.table import entry
from tenfold.serve.cli.flags import ARGUMENT, SEVERAL, parse_size, settings
from tenfold.serve.cli.sources import Settled
from tenfold.serve.cli.terminal import read_prompt
from tenfold.serve.settings import ServeConfig

BODIES = {
    "run": "tenfold.serve.cli.run:run",
    "chat": "tenfold.serve.cli.chat:chat",
    "serve": "tenfold.serve.cli.server:serve",
    "models": "tenfold.serve.cli.models:models",
    "plan": "tenfold.serve.cli.plan:plan",
    "config show": "tenfold.serve.cli.config:show",
    "config path": "tenfold.serve.cli.config:path",
    "config init": "tenfold.serve.cli.config:init",
    "doctor": "tenfold.serve.cli.doctor:doctor",
    "explain": "tenfold.serve.cli.choices:explain",
    "tune": "tenfold.serve.cli.choices:tune",
    "quantize": "tenfold.serve.cli.quantize:run",
    "calibrate softmax": "tenfold.serve.cli.calibrate:softmax",
    "calibrate kv": "tenfold.serve.cli.calibrate_kv:kv",
    "classify": "tenfold.serve.cli.classify:classify",
    "train sentiment": "tenfold.serve.cli.train:sentiment",
    "bench": "tenfold.bench.cli:app",
    "start templates": "tenfold.engine.template:start",
}

EPILOG = (
    "Every option of engine and server is also read from the environment (--max-batch from TENFOLD_MAX_BATCH) and from "
    "a configuration file (max_batch = 8). A flag comes before the environment, the environment before the file."
)


def examples(*lines: str) -> str:
    """The end of a help text: what settings are read from, and commands to copy."""
    return "\n\n".join([EPILOG, "[bold]Examples[/bold]", *lines])


app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help='Run large language models. Start with: tenfold run "Why is the sky blue?"',
    epilog=EPILOG,
)
config_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Show where settings come from, and write a file to keep them in.",
)
app.add_typer(config_app, name="config")
calibrate_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Measure a model on a text, for what runs faster when it is known.",
)
app.add_typer(calibrate_app, name="calibrate")
train_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Make a model of your own from data.",
)
app.add_typer(train_app, name="train")


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


def _answer(text: str, **rest: Any) -> Any:
    """An option that says what to generate."""
    return Option(help=text, rich_help_panel="Answer", **rest)


MaxTokens = Annotated[int, _answer("Longest answer in tokens.", min=1)]
Temperature = Annotated[float, _answer("0 takes the likeliest token; higher is more varied.")]
TopP = Annotated[float, _answer("Keep the likeliest tokens that together have this probability.")]
TopK = Annotated[int, _answer("Keep this many likeliest tokens; 0 keeps all.")]
RepetitionPenalty = Annotated[float, _answer("Above 1 makes repeating less likely.")]
Seed = Annotated[int | None, _answer("Makes sampling reproducible.")]
System = Annotated[str, _answer("System message.")]
Images = Annotated[
    list[str] | None,
    Option("--image", metavar="FILE", help="A picture to ask about; may be given several times."),
]
Stop = Annotated[list[str] | None, _answer("A text that ends the answer; may be given several times.")]
Quiet = Annotated[bool, Option("--quiet", "-q", help="Print the answer only.")]


@app.command(
    "run",
    epilog=examples(
        'tenfold run "Why is the sky blue?"',
        "git diff | tenfold run --max-tokens 200 -",
        'tenfold run -m ./model.gguf --raw --temperature 0.8 "Once upon a time"',
        'tenfold run -m ./vision-model --image photo.jpg "What is this?"',
    ),
)
@settings(EngineConfig)
def run_command(
    settled: Settled,
    prompt: Annotated[str | None, Argument(help="The prompt; '-' or nothing reads it from standard input.")] = None,
    raw: Annotated[
        bool, Option("--raw", help="Continue the text as it stands, without the model's chat template.")
    ] = False,
    system: System = "",
    image: Images = None,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Seed = None,
    stop: Stop = None,
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
    images = image or []
    body("run")(settled.config, text, raw=raw, system=system, images=images, sampling=sampling, quiet=quiet)


@app.command(
    "chat",
    epilog=examples(
        "tenfold chat",
        'tenfold chat ./model.gguf --system "Answer in one sentence." --temperature 0',
    ),
)
@settings(EngineConfig, models=ARGUMENT)
def chat_command(
    settled: Settled,
    system: System = "",
    image: Images = None,
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
        settled.config,
        system=system,
        images=image or [],
        sampling=given | {"repetition_penalty": repetition_penalty},
        quiet=quiet,
    )


@app.command(
    "serve",
    epilog=examples(
        "tenfold serve",
        "tenfold serve ./model.gguf --port 8001 --max-queue 64",
        "tenfold serve --model small=default --model big=./model.gguf",
        "TENFOLD_API_KEY=... tenfold serve --host 0.0.0.0 --log-format json --access-log",
    ),
)
@settings(ServeConfig, EngineConfig, models=SEVERAL)
def serve_command(settled: Settled) -> int:
    """Serve models over HTTP, as OpenAI's and Anthropic's APIs.

    The first SIGTERM or Ctrl-C lets running requests end, the second does not.
    """
    settled.server.check()  # before PyTorch is imported: a wrong option should not take seconds to be told
    status: int = body("serve")(settled)
    return status


@config_app.command(
    "show",
    epilog=examples("tenfold config show --origin", "TENFOLD_PORT=8001 tenfold config show --json --max-batch 8"),
)
@settings(ServeConfig, EngineConfig, models=SEVERAL)
def config_show_command(
    settled: Settled,
    origin: Annotated[bool, Option("--origin", help="Say for each setting where it comes from.")] = False,
    as_json: Annotated[bool, Option("--json", help="For programs.")] = False,
) -> None:
    """Show all settings as `tenfold serve` with the same options would use them. Keys are never shown."""
    body("config show")(settled, origin, as_json)


@config_app.command("path")
def config_path_command() -> None:
    """Show which file is read where none is given. Exit status 1: there is none; the place for it is shown."""
    body("config path")()


@config_app.command("init")
def config_init_command() -> None:
    """Write a file with every setting, its default and its meaning, for you to change."""
    body("config init")()


@app.command("models")
def models_command(
    as_json: Annotated[bool, Option("--json", help="For programs.")] = False,
) -> None:
    """List the models that are on this machine."""
    body("models")(as_json)


@app.command(
    "plan",
    epilog=examples(
        "tenfold plan ./model.gguf --max-model-len 8192",
        "tenfold plan ./model.gguf --memory 8G",
        "tenfold plan small.gguf big.gguf",
    ),
)
@settings(EngineConfig, models=SEVERAL)
def plan_command(
    settled: Settled,
    memory: Annotated[
        int,
        Option(
            parser=parse_size, metavar="SIZE", help="Plan for this much free memory, e.g. 8G (0: what is free here)."
        ),
    ] = 0,
) -> None:
    """Show what models need of memory, before loading them.

    Exit status 3: they do not fit; the plan says what would.
    """
    body("plan")(settled, memory)


@app.command("doctor")
def doctor_command(
    build: Annotated[bool, Option("--build", help="Compile the CPU kernels now if they are not.")] = False,
    as_json: Annotated[bool, Option("--json", help="For programs.")] = False,
) -> None:
    """Show which fast paths are on, which are not, why, and how to get them."""
    body("doctor")(build, as_json)


@app.command(
    "explain",
    epilog=examples(
        "tenfold explain ./model.gguf",
    ),
)
@settings(EngineConfig, models=ARGUMENT)
def explain_command(settled: Settled) -> None:
    """Show what runs each linear operation of a model, and why."""
    body("explain")(settled.config)


@app.command(
    "tune",
    epilog=examples(
        "tenfold tune ./model.gguf --threads 4",
        "tenfold tune ./model --schedule phases",
    ),
)
@settings(EngineConfig, models=ARGUMENT)
def tune_command(settled: Settled) -> None:
    """Measure the ways to run each linear operation of a model on this machine, and remember the fastest."""
    body("tune")(settled.config)


Sample = Annotated[
    Path, Option("--text", exists=True, dir_okay=False, help="Text of the usual kind, such as an encyclopedia's.")
]


@calibrate_app.command("softmax", epilog=examples("tenfold calibrate softmax ./model --text wiki.txt --windows 64"))
@settings(EngineConfig, models=ARGUMENT)
def calibrate_softmax_command(
    settled: Settled,
    text: Sample,
    window: Annotated[int, Option("--window", min=2, help="Tokens of one sequence at most.")] = 1024,
    windows: Annotated[int, Option("--windows", min=1, help="Sequences at most.")] = 16,
    as_json: Annotated[bool, Option("--json", help="For programs.")] = False,
) -> None:
    """Measure how large attention scores get, so that attention can use a maximum that is known beforehand.

    The result is written beside the model. An interrupted run goes on where it stopped.
    """
    body("calibrate softmax")(settled.config, text, window, windows, as_json)


@calibrate_app.command("kv", epilog=examples("tenfold calibrate kv ./model --text wiki.txt --format k2v1.5g64"))
@settings(EngineConfig, models=ARGUMENT)
def calibrate_kv_command(
    settled: Settled,
    text: Sample,
    format: Annotated[str, Option("--format", help="As kv_cache names it: skvq, or bits and channels.")] = "skvq",
    window: Annotated[int, Option("--window", min=2, help="Tokens of one sequence at most.")] = 512,
    windows: Annotated[int, Option("--windows", min=1, help="Sequences at most.")] = 16,
    as_json: Annotated[bool, Option("--json", help="For programs.")] = False,
) -> None:
    """Measure keys and values, for a KV cache of few bits: which channels are stored together, and how far clipped.

    The result is written beside the model, for --kv-cache with the same format. An interrupted run goes on where it
    stopped.
    """
    body("calibrate kv")(settled.config, text, format, window, windows, as_json)


@app.command(
    "quantize",
    epilog=examples(
        "tenfold quantize ./qwen3-30b-a3b --text wiki.txt --bits 4.25 --out ./qwen3-mixed",
        "tenfold quantize ./mixtral --text wiki.txt --bytes 20GiB --scope layer --out ./mixtral-3",
        "tenfold quantize ./qwen2-vl-7b --method mbq --data pairs.jsonl --scheme w3g128z --out ./qwen2-vl-3",
        "tenfold quantize ./qwen2-vl-7b --data pairs.jsonl --compare w3g128z,w4a8",
    ),
)
@settings(EngineConfig, models=ARGUMENT)
def quantize_command(
    settled: Settled,
    text: Annotated[
        Path | None, Option("--text", exists=True, dir_okay=False, help="Text to measure on, of the usual kind.")
    ] = None,
    data: Annotated[
        Path | None, Option("--data", exists=True, help="Pairs of pictures and texts: JSON lines, or a folder.")
    ] = None,
    out: Annotated[Path | None, Option("--out", help="Folder to write, new or empty.")] = None,
    method: Annotated[
        str,
        Option("--method", help="mxmoe (experts), mbq, awq, smoothquant or rtn; auto: mxmoe, mbq or awq by the model."),
    ] = "auto",
    rounding: Annotated[
        str, Option("--rounding", help="gptq, rtn (to nearest) or, of experts, awq (rtn, scaled); auto: the method's.")
    ] = "auto",
    layout: Annotated[str, Option("--layout", help="Of the files: tenfold, or compressed-tensors.")] = "tenfold",
    recipe: Annotated[
        Path | None, Option("--recipe", exists=True, dir_okay=False, help="Follow this recipe.json, measure nothing.")
    ] = None,
    bits: Annotated[
        float | None, Option("--bits", help="Of a weight of experts, scales and zeros included; unset: 4.25.")
    ] = None,
    most_bytes: Annotated[
        int | None,
        Option("--bytes", parser=parse_size, metavar="SIZE", help="Of all experts instead of --bits, e.g. 3.5GiB."),
    ] = None,
    schemes: Annotated[
        str,
        Option(
            "--schemes",
            help="That blocks may get, from w1g128z on, w4g128a8 and fp8a8 for activations of 8 bits; unset: w2g128z "
            "to w8g128z, or w4g128,w8g128 for others.",
        ),
    ] = "",
    scope: Annotated[str, Option("--scope", help="What keeps to the bits: model as a whole, or each layer.")] = "model",
    tie: Annotated[
        str, Option("--tie", help="What has one scheme: block, expert, or layer as other engines want it.")
    ] = "block",
    rotate: Annotated[bool, Option("--rotate", help="Turn the residual stream first (QuaRot).")] = False,
    sensitivity: Annotated[
        str,
        Option("--sensitivity", help="What losses are of: each layer's output, or the model's end; unset: by --scope."),
    ] = "",
    r: Annotated[float, Option("--r", help="1: accuracy alone counts, 0: speed alone.")] = 1.0,
    tokens: Annotated[int, Option("--tokens", help="Of a step, whose time counts where --r is below 1.")] = 64,
    window: Annotated[int, Option("--window", help="Tokens of one sequence of the text.")] = 512,
    windows: Annotated[int, Option("--windows", help="Sequences of the text at most.")] = 64,
    samples: Annotated[int, Option("--samples", help="Pairs of the data at most, spread over it.")] = 128,
    scheme: Annotated[
        str,
        Option("--scheme", help="Of dense models, or all experts: w4g128z, w3g128z, w4a8, fp8a8, ... for every layer."),
    ] = "w4g128z",
    tower: Annotated[
        str, Option("--tower", help="Scheme of what looks at pictures: fp8a8, w4a8; unset: as it is.")
    ] = "",
    norm: Annotated[str, Option("--norm", help="Of differences: mae, mse or fisher; unset: the method's.")] = "",
    weigh: Annotated[
        str, Option("--weigh", help="What tokens count: alike, answers, kinds, squares; unset: the method's.")
    ] = "",
    propagate: Annotated[
        bool | None,
        Option("--propagate/--exact", help="Search with what rounded layers give, or exact ones; unset: the method's."),
    ] = None,
    floor: Annotated[str, Option("--floor", help="Of what kinds count: median or none; unset: as published.")] = "",
    alpha: Annotated[float, Option("--alpha", help="Of smoothquant: how much goes over into weights.")] = 0.5,
    compare: Annotated[
        str, Option("--compare", help="Write nothing: methods side by side at these schemes, on pairs held out.")
    ] = "",
    held_out: Annotated[
        Path | None, Option("--held-out", exists=True, help="Pairs to judge on; unset: one in five of the data.")
    ] = None,
    as_json: Annotated[bool, Option("--json", help="Print the recipe, or the comparison.")] = False,
) -> None:
    """Write a model of few bits: experts by MxMoE, models that see by MBQ, others by AWQ.

    MxMoE gives every block of every expert the bits it deserves, measured on a text, the best choice under the bits
    found exactly. MBQ scales a dense model's channels by what tokens of pictures and of answers are worth to its
    answers. An interrupted run goes on where it stopped.
    """
    from tenfold.serve.cli.quantize import Asked

    mixed = (bits, most_bytes, schemes, scope, r, tie, rotate, sensitivity, tokens)
    scaled = (scheme, norm, weigh, propagate, floor, alpha, tower)
    files = (text, data, out, recipe, held_out)
    asked = Asked(method, rounding, layout, *files, window, windows, samples, compare, as_json)
    body("quantize")(settled.config, asked, mixed, scaled)


@app.command(
    "classify",
    epilog=examples(
        'tenfold classify "What a lovely day!"',
        'tenfold classify "What a lovely day!" --image rain.png --json',
        "tenfold classify --classifier ./mine --image face.jpg",
    ),
)
def classify_command(
    text: Annotated[str, Argument(help="The text; '-' reads it from standard input.", show_default=False)] = "",
    image: Annotated[
        Path | None, Option("--image", dir_okay=False, help="A picture (PNG, JPEG, WebP, GIF or BMP).")
    ] = None,
    classifier: Annotated[
        str, Option("--classifier", help="'default', or a folder that `tenfold train sentiment` wrote.")
    ] = "default",
    device: Annotated[str, Option("--device", help="auto, cpu, cuda or cuda:N.")] = "auto",
    as_json: Annotated[bool, Option("--json", help="For programs.")] = False,
) -> None:
    """Say what a text, a picture, or both together feel like, with a probability for each label."""
    given = read_prompt(text) if text == "-" else text
    if not given.strip() and image is None:
        raise ValueError("There is nothing to classify; give a text, --image, or both.")
    body("classify")(classifier, given, image, device, as_json)


def _part(text: str, *names: str) -> Any:
    """An option about what the classifier is made of."""
    return Option(*names, help=text, rich_help_panel="Model")


def _learning(text: str, *names: str) -> Any:
    return Option(*names, help=text, rich_help_panel="Learning")


@train_app.command(
    "sentiment",
    epilog=examples(
        "tenfold train sentiment ./mine --data incongruity",
        "tenfold train sentiment ./mine --data mvsa-single=./MVSA_Single --text ./bert-base-uncased "
        "--image resnet50 --size 224 --image-weights ./resnet50.safetensors --device cuda --precision bfloat16",
        "tenfold train sentiment ./plain --data incongruity --bilstm 0 --no-cnn --cbam none",
    ),
)
def train_sentiment_command(
    out: Annotated[Path, Argument(metavar="OUT", file_okay=False, help="New folder for the classifier.")],
    data: Annotated[str, Option("--data", help="A data set, or NAME=FOLDER; an unknown name lists them.")],
    text: Annotated[
        str, _part("Text encoder to begin with: new, default, a classifier's folder, or a BERT's.", "--text")
    ] = "default",
    tokens: Annotated[int | None, _part("Word pieces kept of a BERT, or of a new encoder.", "--tokens")] = None,
    width: Annotated[int | None, _part("Channels likewise.", "--width")] = None,
    layers: Annotated[int | None, _part("Layers likewise.", "--layers")] = None,
    image: Annotated[str, _part("Picture encoder: small, resnet18, resnet50 or vit.", "--image")] = "small",
    size: Annotated[int, _part("Pixels of each side that it sees.", "--size")] = 56,
    image_weights: Annotated[
        str,
        _part(
            "Where it begins: new, default, a classifier's folder, or a safetensors file, and then it is frozen; auto "
            "is default where text and sizes are, else new.",
            "--image-weights",
        ),
    ] = "auto",
    bilstm: Annotated[int, _part("Layers of the bidirectional LSTM, 0 to 2.", "--bilstm")] = 2,
    cnn: Annotated[bool, _part("A convolution over the spliced features.", "--cnn/--no-cnn")] = True,
    cbam: Annotated[str, _part("Gates: none, channel, spatial or both.", "--cbam")] = "both",
    layout: Annotated[str, _part("The spliced features as tokens or as a picture.", "--layout")] = "tokens",
    cross: Annotated[int, _part("Layers of cross-attention, 0 to 3.", "--cross")] = 0,
    contrastive: Annotated[bool, _part("Learn with contrastive losses too.", "--contrastive")] = False,
    modalities: Annotated[str, _part("What counts: both, text or image.", "--modalities")] = "both",
    max_tokens: Annotated[int, _part("Word pieces of a text that are read.", "--max-tokens")] = 64,
    dropout: Annotated[float, _part("Share of channels hidden while learning.", "--dropout")] = 0.1,
    epochs: Annotated[int, _learning("Times all posts are seen, at most.", "--epochs")] = 20,
    batch: Annotated[int, _learning("Posts of a step.", "--batch")] = 64,
    rate: Annotated[float, _learning("Learning rate.", "--rate")] = 1e-3,
    encoder_rate: Annotated[float, _learning("Of encoders that know something already.", "--encoder-rate")] = 2e-4,
    frozen: Annotated[int, _learning("Epochs in which such a text encoder stays as it is.", "--frozen")] = 2,
    patience: Annotated[int, _learning("Epochs without progress on dev after which it ends.", "--patience")] = 8,
    seed: Annotated[int, _learning("Of everything that is left to chance.", "--seed")] = 0,
    data_seed: Annotated[int, _learning("Of data that is made up, or split by chance.", "--data-seed")] = 0,
    precision: Annotated[str, _learning("float32, bfloat16 or float16 (mixed).", "--precision")] = "float32",
    device: Annotated[str, _learning("auto, cpu, cuda or cuda:N.", "--device")] = "auto",
    half: Annotated[bool, Option("--half", help="Store weights in 16 bits.")] = False,
    as_json: Annotated[bool, Option("--json", help="Print the card.")] = False,
    quiet: Quiet = False,
) -> None:
    """Train the CBAM and BiLSTM classifier of text and pictures (arXiv 2303.14708), and say how good it is.

    An interrupted run goes on where it stopped. What has been learnt lies in OUT: weights, settings, tokenizer, and a
    card with the data's digest, scores and the confusion matrix.
    """
    from tenfold.classify.encoder import Size
    from tenfold.classify.recipe import Recipe
    from tenfold.models.sentiment.config import ImageShape, Parts

    shape = ImageShape(image, size)
    if image_weights == "auto":
        image_weights = "default" if text == "default" and shape == ImageShape() else "new"
    recipe = Recipe(
        parts=Parts(bilstm, cnn, cbam, layout, cross, contrastive, modalities),
        text=text,
        size=Size(tokens, width, layers),
        image=shape,
        image_weights="" if image_weights == "new" else image_weights,
        max_tokens=max_tokens,
        dropout=dropout,
        epochs=epochs,
        batch=batch,
        rate=rate,
        encoder_rate=encoder_rate,
        frozen=frozen,
        patience=patience,
        precision=precision,
        seed=seed,
    )
    body("train sentiment")(out, data, data_seed, recipe, device, half, as_json, quiet)


@app.command(
    "bench",
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def bench_command(context: typer.Context) -> Any:
    """Measure this machine: speed against peers, start-up, quality."""
    command = typer.main.get_command(body("bench"))
    return command.main(list(context.args), prog_name="tenfold bench", standalone_mode=False)
