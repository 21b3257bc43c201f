"""The command line. Invariant: `tenfold --help` and a wrong option answer without importing PyTorch; a mistake of
the user gets
one line on standard error and exit status 2, never a trace."""

import os
import sys


def main() -> None:
    """The `tenfold` program."""
    # Not at the top: importing this package must cost nothing to whoever needs one of its modules.
    from tenfold.serve.cli.commands import app
    from tenfold.serve.cli.failures import run_reporting

    sys.exit(
        run_reporting(app, debug="--debug" in sys.argv[1:] or os.environ.get("TENFOLD_DEBUG", "") not in ("", "0"))
    )
