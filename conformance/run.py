"""Other people's clients and test tools, at pinned versions, against a running `tenfold serve`.

`scripts/conformance` runs all, `scripts/conformance openai-3 schemathesis` some; `--record` writes claim S1. Tools are
installed into `.conformance/`, each with its own pins, and never into the package's environment.
"""

import argparse
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import venv
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
TOOLS = ROOT / ".conformance"
KEY = "conformance-key-0123456789"
SERVE = (sys.executable, "-m", "tenfold.serve.cli", "serve", "--port", "{port}", "--api-key", KEY)
READY = 90.0  # seconds


@dataclass(frozen=True)
class Tool:
    """A tool: what pip installs into its own environment (none: npm, or ours), the command with {url} and {key} filled
    in, and the server it needs.
    """

    command: tuple[str, ...]
    packages: tuple[str, ...] = ()
    server: str = "smollm2"
    node: bool = False
    seconds: int = 400


def python(script: str, *packages: str, server: str = "smollm2") -> Tool:
    return Tool(("python", script, "{url}", "{key}"), packages, server)


def node(script: str) -> Tool:
    return Tool(("node", script, "{url}", "{key}"), node=True)


# Not checked: that whatever fits the schema is accepted. Schemas cannot say all that is wrong (either of two fields,
# ids within a vocabulary, a prompt within the context).
SCHEMATHESIS = (
    *("schemathesis", "run", "{url}/openapi.json", "-H", "Authorization: Bearer {key}", "--checks", "all"),
    *("--exclude-checks", "positive_data_acceptance", "--continue-on-failure", "--generation-deterministic"),
    *("-n", "40", "--no-color"),
)
PROBE = ("canitoolcall", "probe", "--base-url", "{url}/v1", "--model", "puppet")
TOOL_TABLE: dict[str, Tool] = {
    "openai-3": python("openai_client.py", "openai==3.54.0"),
    "openai-2": python("openai_client.py", "openai==2.54.0"),
    "anthropic": python("anthropic_client.py", "anthropic==2.12.0"),
    "openai-npm": node("openai.mjs"),
    "anthropic-npm": node("anthropic.mjs"),
    "ai-npm": node("ai.mjs"),
    "lm-eval": python("lm_eval_check.py", "lm_eval[api]==0.4.13"),
    "canitoolcall-run": Tool(("python", "toolcall_check.py", sys.executable), ("canitoolcall==0.1.1",), server=""),
    "canitoolcall-probe": Tool(PROBE, ("canitoolcall==0.1.1",), server="puppet"),
    "schemathesis": Tool(SCHEMATHESIS, ("schemathesis==4.32.5",), server="tiny"),
}
SUMMARY = re.compile(r"\d+ passed|\d+ pass\b|pass=\d+|\d+ unexpected")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("tools", nargs="*", help=f"of {', '.join(TOOL_TABLE)}; none: all")
    options.add_argument("--record", action="store_true", help="write claim S1")
    asked = options.parse_args()
    if unknown := set(asked.tools) - set(TOOL_TABLE):
        options.error(f"{sorted(unknown)[0]} is not a tool; allowed: {', '.join(TOOL_TABLE)}")
    chosen = asked.tools or list(TOOL_TABLE)
    TOOLS.mkdir(exist_ok=True)
    results: dict[str, tuple[bool, str]] = {}
    with ExitStack() as stack:
        urls: dict[str, str] = {"": ""}
        for name in chosen:
            kind = TOOL_TABLE[name].server
            if kind not in urls:
                urls[kind] = start(kind, stack)
            results[name] = run_tool(name, TOOL_TABLE[name], urls[kind])
            print(line(name, *results[name]), flush=True)
    if asked.record:
        record(results)
    sys.exit(not all(passed for passed, _ in results.values()))


def line(name: str, passed: bool, said: str) -> str:
    return f"{name:18}  {'passed' if passed else 'FAILED'}  {said}"


def smollm2() -> list[str]:
    return [*SERVE]


def tiny() -> list[str]:
    """A few random weights: what is fuzzed is the server, and answers without a limit should end soon."""
    sys.path.insert(0, str(ROOT))
    from tests.tiny import TINY, make_checkpoint

    folder = TOOLS / "tiny"
    make_checkpoint(TINY["llama"], folder)
    return [*SERVE, "--model", str(folder), "--served-name", "tiny"]


def puppet() -> list[str]:
    return [sys.executable, str(HERE / "puppet.py"), "{port}"]


SERVERS: dict[str, Callable[[], list[str]]] = {"smollm2": smollm2, "tiny": tiny, "puppet": puppet}


def start(kind: str, stack: ExitStack) -> str:
    """The URL of a server, which `stack` ends."""
    port = free_port()
    command = [part.format(port=port) for part in SERVERS[kind]()]
    log = stack.enter_context((TOOLS / f"{kind}.log").open("w"))
    process = subprocess.Popen(command, stderr=log, stdout=log, env=os.environ | {"PYTHONPATH": str(ROOT)})
    stack.callback(process.wait, 60)
    stack.callback(process.terminate)
    end = time.monotonic() + READY
    while not answers(port):
        if process.poll() is not None or time.monotonic() > end:
            raise RuntimeError(f"the {kind} server did not start; see {log.name}")
        time.sleep(0.1)
    return f"http://127.0.0.1:{port}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(port: int) -> bool:
    """Whether /ready says yes."""
    try:
        with socket.create_connection(("127.0.0.1", port), 5) as connection:
            connection.sendall(b"GET /ready HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
            return connection.recv(64).split(b" ")[1] == b"200"
    except (OSError, IndexError):
        return False


def run_tool(name: str, tool: Tool, url: str) -> tuple[bool, str]:
    """Whether it passed, and what it said last."""
    folder = prepare(name, tool)
    environment = {k: v for k, v in os.environ.items() if not k.endswith("_API_KEY")}
    environment["PATH"] = f"{folder / 'bin'}{os.pathsep}{environment['PATH']}"
    environment |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OPENAI_API_KEY": KEY}
    command = [part.format(url=url, key=KEY) for part in tool.command]
    started = time.monotonic()
    done = subprocess.run(
        command,
        cwd=folder if tool.node else HERE,
        env=environment,
        capture_output=True,
        text=True,
        timeout=tool.seconds,
    )
    (TOOLS / f"{name}.log").write_text(done.stdout + done.stderr)
    lines = [text.strip() for text in done.stdout.splitlines() if text.strip()]
    for text in lines:
        if text.startswith("FAILED"):
            print(f"{name}: {text}")
    said = next((text for text in reversed(lines) if SUMMARY.search(text)), lines[-1] if lines else "said nothing")
    return done.returncode == 0, f"{said[:120]} ({time.monotonic() - started:.0f} s)"


def prepare(name: str, tool: Tool) -> Path:
    """The tool's environment, made on first use."""
    if tool.node:
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
    """Claim S1: how many of the tools pass."""
    from tenfold.bench.claims import claim
    from tenfold.bench.claims import record as write

    note = "; ".join(f"{name}: {said}" for name, (_, said) in results.items())
    what = "clients and conformance tools that pass against tenfold serve"
    passed, total = sum(good for good, _ in results.values()), len(TOOL_TABLE)
    command = "scripts/conformance --record"
    write([claim("S1", what, passed, f"of {total}", command, at_least=total, kind="correctness", note=note)])


if __name__ == "__main__":
    main()
