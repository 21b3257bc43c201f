"""The command line. Invariant: `tenfold --help` and a wrong option answer without importing PyTorch; a mistake of
the user gets
one line on standard error and exit status 2, never a trace."""

import os
import sys


def main() -> None:
    """The `tenfold` program."""
    fill_standard_files()
    # Not at the top: importing this package must cost nothing to whoever needs one of its modules.
    from tenfold.serve.cli.commands import app
    from tenfold.serve.cli.failures import run_reporting

    sys.exit(
        run_reporting(app, debug="--debug" in sys.argv[1:] or os.environ.get("TENFOLD_DEBUG", "") not in ("", "0"))
    )


def fill_standard_files() -> None:
    """Where standard input, output or error is closed, put nothing there: else the next socket or file that is opened
    would get its number, and what is printed would go into it.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115  for as long as the process lives
