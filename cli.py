"""How every script here fails: one line on standard error and an exit code, no traceback.

Exit codes: 0 done; 1 a check failed; 2 usage or input error; 130 stopped by Ctrl-C.
`python -X dev script.py ...` shows the traceback behind an input error.
"""

import argparse
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn


class ArgumentParser(argparse.ArgumentParser):
    """argparse, but a usage error is the one line that says what is wrong."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def run(main: Callable[[], int | None]) -> NoReturn:
    """Calls `main` and exits with its return value (None is 0).

    By the rule of this project a ValueError or OSError is something the user can mend: its message
    names the value, the place and the remedy, so the message is all that is shown.
    """
    if hasattr(sys.stdout, "reconfigure"):  # generated text on a terminal that lacks a letter
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        sys.exit(main())
    except BrokenPipeError:  # the reader of our output left: `run_llama.py ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        _exit_with_line("interrupted", 130)
    except OSError as error:
        where = f"{error.filename}: " if error.filename is not None else ""
        _exit_with_line(f"{where}{error.strerror or error}", 2, error)
    except ValueError as error:
        _exit_with_line(str(error), 2, error)


def _exit_with_line(message: str, code: int, cause: Exception | None = None) -> NoReturn:
    if cause is not None and sys.flags.dev_mode:
        raise cause
    program = Path(sys.argv[0]).name
    print(f"{program}: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


def positive_int(text: str) -> int:
    """An argparse type: 1, 2, 3, ..."""
    return _number(text, int, lambda value: value >= 1, "an integer of at least 1")


def seed_int(text: str) -> int:
    """An argparse type: what NumPy and PyTorch both take as a seed."""
    return _number(text, int, lambda value: 0 <= value < 2**32, "an integer in [0, 2**32)")


def positive_float(text: str) -> float:
    """An argparse type: a finite number above zero."""
    return _number(text, float, lambda value: 0 < value < math.inf, "a number above 0")


def probability_below_one(text: str) -> float:
    """An argparse type: a dropout probability."""
    return _number(text, float, lambda value: 0 <= value < 1, "a number in [0, 1)")


def _number(text: str, kind: type, is_valid: Callable, wanted: str):
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not is_valid(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    return value
