"""lm-eval's harness against a running server, on tasks of its own files: `lm_eval_check.py URL KEY`.

The harness tokenises through /tokenizer_info, /tokenize and /detokenize, scores choices by echoed log-probabilities,
and generates through both completions endpoints.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

TASKS = Path(__file__).parent / "lm_eval_tasks"
LEAST = 0.9  # accuracy on capitals of well-known countries; SmolLM2-135M-Instruct has 1.0, guessing 0.25


def run(model: str, path: str, tasks: str, url: str, key: str, *options: str) -> dict[str, dict[str, float]]:
    """Results by task. Raises CalledProcessError."""
    arguments = [f"model=default,base_url={url}{path},num_concurrent=4,max_retries=1,auth_token={key}", *options]
    with tempfile.TemporaryDirectory() as folder:
        command = ["lm_eval", "run", "--model", model, "--model_args", ",".join(arguments), "--include_path", "."]
        chat = ["--apply_chat_template"] if "chat" in path else []
        subprocess.run([*command, "--tasks", tasks, "--output_path", folder, *chat], cwd=TASKS, check=True)
        (found,) = Path(folder).rglob("results*.json")
        results: dict[str, dict[str, float]] = json.loads(found.read_text())["results"]
    return results


def main() -> None:
    url, key = sys.argv[1:]
    both = "tenfold_capitals,tenfold_echo"
    scored = run("local-completions", "/v1/completions", both, url, key, "tokenizer_backend=remote")
    chat = run("local-chat-completions", "/v1/chat/completions", "tenfold_echo", url, key)
    accuracy = scored["tenfold_capitals"]["acc,none"]
    checks = {"capitals": accuracy >= LEAST, "completions": "tenfold_echo" in scored, "chat": "tenfold_echo" in chat}
    passed = sum(checks.values())
    print(f"lm-eval: accuracy {accuracy:.2f} on capitals; {passed} passed, {len(checks) - passed} failed")
    sys.exit(passed < len(checks))


if __name__ == "__main__":
    main()
