"""How every script here fails: one line on standard error and an exit code, no traceback.

Exit codes: 0 done; 1 a check failed; 2 usage or input error; 130 stopped by Ctrl-C, 143 by SIGTERM.
`python -X dev script.py ...` shows the traceback behind an input error.
"""

import argparse
import importlib.util
import math
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, NoReturn

from training import interrupts


class ArgumentParser(argparse.ArgumentParser):
    """argparse, but a usage error is the one line that says what is wrong."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def run(main: Callable[[], int | None]) -> NoReturn:
    """Calls `main` and exits with its return value (None is 0).

    By the rule of this project a ValueError or OSError is something the user can mend: its message
    names the value, the place and the remedy, so the message is all that is shown.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who started this
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    if hasattr(sys.stdout, "reconfigure"):  # generated text on a terminal that lacks a letter
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with interrupts.raised():
            code = main()
        sys.stdout.flush()  # here, where a reader who left is handled, and not at exit
        sys.exit(code)
    except BrokenPipeError:  # the reader of our output left: `run_llama.py ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except interrupts.Stopped as stopped:
        go_on = f"; to go on: {resume_command(stopped.option)}" if stopped.is_resumable else ""
        _exit_with_line(f"{stopped}{go_on}", stopped.exit_code)
    except KeyboardInterrupt:  # raised by other means than a signal
        _exit_with_line("interrupted", 130)
    except OSError as error:
        where = f"{error.filename}: " if error.filename is not None else ""
        _exit_with_line(f"error: {where}{error.strerror or error}", 2, error)
    except ValueError as error:
        _exit_with_line(f"error: {error}", 2, error)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        _exit_with_line(
            "error: out of memory; make batches smaller, or sentences shorter", 2, error
        )


def _is_out_of_memory(error: Exception) -> bool:
    """As Python, PyTorch on a GPU, and PyTorch on a CPU say it; this file does without PyTorch."""
    is_of_pytorch = type(error).__name__ == "OutOfMemoryError"
    return isinstance(error, MemoryError) or is_of_pytorch or "can't allocate memory" in str(error)


def require_packages(*packages: str, or_else: str = "") -> None:
    """A ValueError that names the first development package which is absent, and the remedy."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"{package} is missing; `bash setup.sh --dev` installs it{or_else}")


def standard_input() -> BinaryIO:
    """Its bytes; a ValueError where the process was started without one."""
    if sys.stdin is None:
        raise ValueError("standard input is closed; give it a file or a pipe")
    return sys.stdin.buffer


def resume_command(option: str | None = "--resume") -> str:
    """The command that this process was started by, with the option that goes on, if need be.

    torchrun starts `python -u SCRIPT ...`; the dots stand for torchrun's own options.
    """
    command = sys.orig_argv
    if "TORCHELASTIC_RUN_ID" in os.environ and command[1:2] == ["-u"]:
        command = ["torchrun", "...", *command[2:]]
    return shlex.join(command if option is None or option in command else [*command, option])


def _exit_with_line(message: str, code: int, cause: Exception | None = None) -> NoReturn:
    if cause is not None and sys.flags.dev_mode:
        raise cause
    program = Path(sys.argv[0]).name
    print(f"{program}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


def shown(name: str) -> str:
    """A name from a file, fit for one line: no control characters, and not longer than a line."""
    name = name if len(name) <= 200 else f"{name[:197]}..."
    return name if name.isprintable() else ascii(name)


JOINERS = "\u200c\u200d"  # of letters in Persian, of people in an emoji


def printable(text: str, kept: str = "") -> str:
    """A text without what would steer a terminal or is no letter in UTF-8; `kept` stays."""
    joiners = JOINERS + kept
    return "".join(c if c.isprintable() or c in joiners else ascii(c)[1:-1] for c in text)


def on_one_line(text: str) -> str:
    return printable(" ".join(text.split()))


def positive_int(text: str) -> int:
    """An argparse type: 1, 2, 3, ..."""
    return _number(text, int, lambda value: value >= 1, "an integer of at least 1")


def non_negative_float(text: str) -> float:
    """An argparse type: a finite number of at least zero."""
    return _number(text, float, lambda value: 0 <= value < math.inf, "a number of at least 0")


def seed_int(text: str) -> int:
    """An argparse type: what NumPy and PyTorch both take as a seed."""
    return _number(text, int, lambda value: 0 <= value < 2**32, "an integer in [0, 2**32)")


def positive_float(text: str) -> float:
    """An argparse type: a finite number above zero."""
    return _number(text, float, lambda value: 0 < value < math.inf, "a number above 0")


def non_negative_int(text: str) -> int:
    """An argparse type: 0, 1, 2, ..."""
    return _number(text, int, lambda value: value >= 0, "an integer of at least 0")


def count(text: str) -> int:
    """An argparse type: a positive number of things, 1500000, 1.5e6 or 1.5M."""
    plain = text.strip().upper()
    for unit, factor in (("K", 10**3), ("M", 10**6), ("B", 10**9)):
        if plain.endswith(unit):
            plain = f"{plain[:-1]}e{len(str(factor)) - 1}"
    try:
        return round(
            _number(plain, float, lambda value: 1 <= value < math.inf and value % 1 == 0, "")
        )
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a count such as 1500000 or 1.5M"
        ) from None


def probability_below_one(text: str) -> float:
    """An argparse type: a probability or share in [0, 1)."""
    return _number(text, float, lambda value: 0 <= value < 1, "a number in [0, 1)")


def share(text: str) -> float:
    """An argparse type: a number in (0, 1]."""
    return _number(text, float, lambda value: 0 < value <= 1, "a number in (0, 1]")


def _number(text: str, kind: type, is_valid: Callable, wanted: str):
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not is_valid(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    return value
