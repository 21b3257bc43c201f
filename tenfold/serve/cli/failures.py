"""How a command fails: what is printed and with which exit status.

0 done · 1 the machine or the engine failed · 2 what was asked for cannot be · 130 Ctrl-C · 141 nobody reads the
output any more.
"""

import os
import signal
import sys

import typer


def run_reporting(app: typer.Typer, debug: bool) -> int:
    """Run the command line and return its exit status."""
    try:
        status = typer.main.get_command(app).main(prog_name="tenfold", standalone_mode=False)
        sys.stdout.flush()
    except Exception as error:
        return report(error, debug)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 128 + signal.SIGINT
    return status if isinstance(status, int) else 0


def report(error: Exception, debug: bool) -> int:
    """Print an exception as a user should see it, and return the exit status for it."""
    if isinstance(error, BrokenPipeError):
        return _leave_quietly()
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # a wrong option; typer knows how to show it
        error.show() if hasattr(error, "show") else print(f"error: {error.format_message()}", file=sys.stderr)
        return int(error.exit_code)
    if isinstance(error, typer.Abort):
        return 128 + signal.SIGINT
    if debug or not isinstance(error, (ValueError, OSError, RuntimeError, ImportError)):
        raise error
    print(f"error: {error}", file=sys.stderr)
    return 2 if isinstance(error, ValueError) else 1


def _leave_quietly() -> int:
    """Whoever read our output is gone: keep the interpreter from complaining when it flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 128 + 13
