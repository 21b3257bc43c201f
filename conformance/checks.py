"""Runs checks of a client one after another; the exit status says whether all passed."""

import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn


def run(title: str, checks: Sequence[Callable[[Any], None]], client: Any) -> NoReturn:
    failed = 0
    for check in checks:
        try:
            check(client)
            print(f"ok {check.__name__}")
        except Exception as error:
            failed += 1
            print(f"FAILED {check.__name__}: {type(error).__name__}: {error}")
    print(f"{title}: {len(checks) - failed} passed, {failed} failed")
    sys.exit(failed > 0)
