"""What no module of the package does: run code that came as data, or call out."""

import ast
from pathlib import Path

import tenfold

ROOT = Path(tenfold.__file__).parent
RUNS_DATA = {"pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve"}
YAML_THAT_RUNS = (".Loader", "FullLoader", "UnsafeLoader", ".full_load", "unsafe_load")
CALLS_OUT = {
    "requests",
    "httpx",
    "aiohttp",
    "urllib3",
    "ftplib",
    "smtplib",
    "telnetlib",
    "http.client",
    "urllib.request",
}
# The benchmark that talks to a server it is told, and downloads of a model by name.
MAY_CALL_OUT = {"bench", "weights/hub.py"}


def trees():
    for path in sorted(ROOT.rglob("*.py")):
        yield path.relative_to(ROOT).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{name.name}" for name in node.names)


def called(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}


def test_nothing_runs_data():
    found = []
    for path, tree in trees():
        found += [(path, name) for name in imported(tree) if name.partition(".")[0] in RUNS_DATA]
        for name, keywords in called(tree):
            if name in ("eval", "exec", "compile", "__import__"):
                found.append((path, name))
            if name == "torch.load" or keywords.get("trust_remote_code", "False") != "False":
                found.append((path, name))
            if keywords.get("shell", "False") != "False" or name in ("os.system", "send_pyobj", "recv_pyobj"):
                found.append((path, name))
        names = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
        found += [(path, name) for name in names if name.startswith("yaml.") and name.endswith(YAML_THAT_RUNS)]
    assert found == []


def test_the_server_and_the_engine_never_call_out():
    found = [
        (path, name)
        for path, tree in trees()
        for name in imported(tree)
        if name in CALLS_OUT and not any(path.startswith(place) for place in MAY_CALL_OUT)
    ]
    assert found == []
