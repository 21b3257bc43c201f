"""Every example runs and prints what its docstring promises."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
EXPECTED = {
    "offline.py": ["The capital of France is Paris", "[12 tokens, the first after"],
    "stream.py": ["urr"],
    "async_chat.py": ["Name three colours.\n  ", "steps for"],
    "embed.py": ["1.000  A cat", "My kitten"],
}


@pytest.mark.real_model
@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_example(name, smollm2_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", [name, str(smollm2_path)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    printed = capsys.readouterr().out
    for part in EXPECTED[name]:
        assert part in printed


def test_every_example_is_tested():
    own = {path.name for path in EXAMPLES.glob("*.py") if not path.name.startswith("server_")}  # those: tests/e2e
    assert own == set(EXPECTED)
