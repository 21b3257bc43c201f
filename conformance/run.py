"""Other people's clients and test tools, at pinned versions, against a running `tenfold serve` with a real model.

`scripts/conformance` runs all, `scripts/conformance openai-3 schemathesis` some; `--record` writes claim S1. Tools are
installed into `.conformance/`, each with its own pins, and never into the package's environment.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
TOOLS = ROOT / ".conformance"
KEY = "conformance-key"


@dataclass(frozen=True)
class Tool:
    """A tool: what pip installs into its own environment (or npm), and the command, with {url} and {key} filled in."""

    packages: tuple[str, ...]
    command: tuple[str, ...]
    seconds: int = 300


def python_tool(*packages: str, command: tuple[str, ...], seconds: int = 300) -> Tool:
    return Tool(packages, command, seconds)


LM_EVAL = (
    *("lm_eval", "run", "--include_path", str(HERE / "lm_eval_tasks"), "--num_fewshot", "0", "--output_path", "{out}"),
    *("--tokenizer_backend", "none"),
)
TOOL_TABLE: dict[str, Tool] = {
    "openai-3": python_tool("openai==3.54.0", command=("python", "openai_client.py", "{url}", "{key}")),
    "openai-2": python_tool("openai==2.54.0", command=("python", "openai_client.py", "{url}", "{key}")),
    "anthropic": python_tool("anthropic==2.12.0", command=("python", "anthropic_client.py", "{url}", "{key}")),
    "openai-npm": Tool((), ("node", "openai.mjs", "{url}", "{key}")),
    "anthropic-npm": Tool((), ("node", "anthropic.mjs", "{url}", "{key}")),
    "ai-npm": Tool((), ("node", "ai.mjs", "{url}", "{key}")),
}
SUMMARY = re.compile(r"(\d+) passed, (\d+) failed")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("tools", nargs="*", help=f"of {', '.join(TOOL_TABLE)}; none: all")
    options.add_argument("--record", action="store_true", help="write claim S1")
    asked = options.parse_args()
    chosen = asked.tools or list(TOOL_TABLE)
    TOOLS.mkdir(exist_ok=True)
    results: dict[str, tuple[bool, str]] = {}
    with server() as url:
        for name in chosen:
            results[name] = run_tool(name, TOOL_TABLE[name], url)
    width = max(map(len, results))
    for name, (passed, said) in results.items():
        print(f"{name:{width}}  {'passed' if passed else 'FAILED'}  {said}")
    if asked.record:
        record(results)
    sys.exit(not all(passed for passed, _ in results.values()))


@contextmanager
def server() -> Iterator[str]:
    """The URL of a server with the default model and one key."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tenfold.serve.cli", "serve", "--port", "0", "--api-key", KEY],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    log = open(TOOLS / "server.log", "w")  # noqa: SIM115 - closed below, after the process
    try:
        for line in process.stderr:
            log.write(line)
            if found := re.search(r"on (http://\S+)/v1", line):
                break
        else:
            raise RuntimeError(f"the server did not start; see {log.name}")
        copier = subprocess.Popen(["cat"], stdin=process.stderr, stdout=log)
        yield found[1]
    finally:
        process.terminate()
        process.wait(60)
        log.close()
    copier.wait(10)


def run_tool(name: str, tool: Tool, url: str) -> tuple[bool, str]:
    """Whether it passed, and its last line."""
    folder = prepare(name, tool)
    environment = {k: v for k, v in os.environ.items() if not k.endswith("_API_KEY")}
    environment["PATH"] = f"{folder / 'bin'}{os.pathsep}{environment['PATH']}"
    environment |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OPENAI_API_KEY": KEY}
    command = [part.format(url=url, key=KEY, out=str(TOOLS / f"{name}.out")) for part in tool.command]
    started = time.monotonic()
    done = subprocess.run(
        command,
        cwd=TOOLS / "node" if tool.command[0] == "node" else HERE,
        env=environment,
        capture_output=True,
        text=True,
        timeout=tool.seconds,
    )
    output = done.stdout + done.stderr
    (TOOLS / f"{name}.log").write_text(output)
    for line in output.splitlines():
        if line.startswith("FAILED"):
            print(f"{name}: {line}")
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    said = next((line for line in reversed(lines) if SUMMARY.search(line)), lines[-1] if lines else "said nothing")
    return done.returncode == 0, f"{said.strip()[:120]} ({time.monotonic() - started:.0f} s)"


def prepare(name: str, tool: Tool) -> Path:
    """The tool's environment, made on first use."""
    if tool.command[0] == "node":
        target = TOOLS / "node"
        shutil.copytree(HERE / "node", target, dirs_exist_ok=True)
        subprocess.run(["npm", "install", "--no-audit", "--no-fund", "--silent"], cwd=target, check=True)
        return target
    folder = TOOLS / name
    stamp = folder / "installed"
    wanted = "\n".join(tool.packages)
    if not stamp.exists() or stamp.read_text() != wanted:
        venv.create(folder, with_pip=True, clear=True)
        pip = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "-qq", "install"]
        subprocess.run([*pip, *tool.packages], check=True)
        stamp.write_text(wanted)
    return folder


def record(results: dict[str, tuple[bool, str]]) -> None:
    """Claim S1: the share of tools that pass."""
    from tenfold.bench.claims import claim
    from tenfold.bench.claims import record as write

    passed = [name for name, (good, _) in results.items() if good]
    note = "; ".join(f"{name}: {said}" for name, (_, said) in results.items())
    what = "clients and conformance tools that pass against tenfold serve with SmolLM2-135M-Instruct"
    write(
        [
            claim(
                "S1",
                what,
                len(passed),
                f"of {len(TOOL_TABLE)}",
                "scripts/conformance --record",
                at_least=len(TOOL_TABLE),
                kind="correctness",
                note=note,
            )
        ]
    )


if __name__ == "__main__":
    main()
