"""canitoolcall's recorded outputs of real models through Tenfold's parser: `toolcall_check.py PYTHON`, with an
interpreter that has Tenfold.

Passes where nothing fails but the fixtures of `BROKEN_OFF`, which the adapter explains. Families that Tenfold does not
serve are counted as unsupported.
"""

import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
ENGINE = "conformance.toolcall_adapter:TenfoldAdapter"
EXPECTED = "import json; from conformance.toolcall_adapter import BROKEN_OFF; print(json.dumps(sorted(BROKEN_OFF)))"


def main() -> None:
    interpreter = sys.argv[1]
    # The tool's worker runs where Tenfold is, and finds the tool where it was installed.
    path = os.pathsep.join((str(ROOT), sysconfig.get_path("purelib")))
    command = ["canitoolcall", "run", "--engine", ENGINE, "--python", interpreter, "--env", f"PYTHONPATH={path}"]
    environment = os.environ | {"PYTHONPATH": path}
    with tempfile.TemporaryDirectory() as folder:
        # The tool's own exit status says whether anything failed; which did is what counts here.
        subprocess.run([*command, "--out", folder], stdout=sys.stderr)
        (found,) = Path(folder).glob("*.json")
        cases: list[dict[str, Any]] = json.loads(found.read_text())["cases"]
    told = subprocess.run([interpreter, "-c", EXPECTED], env=environment, check=True, capture_output=True, text=True)
    expected = set(json.loads(told.stdout))
    by_status: dict[str, set[str]] = {}
    for case in cases:
        by_status.setdefault(case["status"], set()).add(case["fixture_id"])
    failed = by_status.get("fail", set()) | by_status.get("error", set())
    for case in sorted(failed ^ expected):
        print("FAILED", case)
    summary = ", ".join(f"{len(ids)} {status}" for status, ids in sorted(by_status.items()))
    print(f"canitoolcall run: {summary}; {len(failed - expected)} unexpected")
    sys.exit(failed != expected)


if __name__ == "__main__":
    main()
