"""Errors for users, the entry point of every script, seeds, the device, and atomic writes."""

import argparse
import contextlib
import errno
import hashlib
import importlib.util
import os
import random
import reprlib
import signal
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np
import torch


class InputError(ValueError):
    """An error that the user can fix. The message names the value, the place and the remedy.

    `run_script` shows it as one line. Every other exception is a bug and keeps its traceback.
    """


class ArgumentParser(argparse.ArgumentParser):
    """argparse with one-line usage errors and a help text from the script's docstring.

    The first paragraph of `doc` describes the command; the second one holds example commands.
    """

    def __init__(self, doc: str, prog: str | None = None):
        description, examples, *_ = doc.split("\n\n")
        super().__init__(
            prog=prog,
            description=description,
            epilog=f"examples:\n{examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,  # keeps the lines of examples
        )

    def error(self, message: str) -> NoReturn:
        spelled = {option.replace("-", "_"): option for option in self._option_string_actions}
        for word in message.split():  # --pretrained_model_path for --pretrained-model-path
            name = word.split("=")[0]
            meant = spelled.get(name.replace("-", "_"), name)
            if meant != name and message.startswith("unrecognized"):
                message = f"unknown option {word}; did you mean {meant}?"
                break
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def run_script(main: Callable[[], int | None]) -> NoReturn:
    """Call `main` and exit with its return value (None is 0).

    Exit codes: 0 done; 1 a check failed, or the reader of the output is gone; 2 usage or input
    error; 130 Ctrl-C; 143 SIGTERM. An InputError, an OSError that names a file, a full disk and too
    little memory become one line on standard error; `python -X dev script.py` shows their
    tracebacks, too.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the parent process
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    if hasattr(sys.stdout, "reconfigure"):  # a terminal may lack a letter of generated text
        sys.stdout.reconfigure(errors="backslashreplace")
    if "WORLD_SIZE" not in os.environ:  # torchrun ends its processes at once
        signal.signal(signal.SIGTERM, _terminate)
    try:
        code = main()
        sys.stdout.flush()  # a reader that closed the pipe is noticed here, not at exit
        sys.exit(code)
    except BrokenPipeError:  # `run_llama.py ... | head`
        _end_output()
        sys.exit(1)
    except KeyboardInterrupt as stop:
        message, code = str(stop) or "interrupted", getattr(stop, "exit_code", 130)
    except (InputError, OSError, MemoryError, RuntimeError) as error:
        message, code = _line_for(error), 2
        if message is None or sys.flags.dev_mode:
            raise
    _end_output()
    print(f"{command_name()}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


def _terminate(signum: int, _frame: object) -> NoReturn:
    """End as Ctrl-C does, so that temporary files and locks are removed."""
    stop = KeyboardInterrupt("terminated")
    stop.exit_code = 128 + signum
    raise stop


def command_name() -> str:
    """Return what was started: run_llama.py, or python -m tools.predict."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)  # of a module started by -m
    return f"python -m {spec.name}" if spec else Path(sys.argv[0]).name


def _end_output() -> None:
    """Flush standard output, or drop what cannot be written: Python would try again at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _line_for(error: Exception) -> str | None:
    """Return the line that a user sees, or None for a bug."""
    if isinstance(error, InputError):
        return f"error: {error}"
    if isinstance(error, OSError) and error.filename is not None:
        return f"error: {error.filename}: {error.strerror or error}"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:  # files have their names
        return f"error: standard output: {error.strerror}"
    if is_memory_error(error):
        return "error: out of memory; use smaller batches or shorter sentences"
    return None


def is_memory_error(error: Exception) -> bool:
    """Return whether an error says that memory is too small, in Python's words or PyTorch's."""
    is_one = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return is_one or "can't allocate memory" in str(error)  # PyTorch's RuntimeError on a CPU


def require_package(name: str) -> None:
    """Raise InputError if a development package is missing."""
    if importlib.util.find_spec(name) is None:
        raise InputError(f"{name} is missing; `bash setup.sh --dev` installs it")


def seed_everything(seed: int = 11711) -> None:
    """Seed Python, NumPy and every PyTorch device, ask cuDNN for deterministic kernels, and
    `flush_denormals`."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    flush_denormals()


def flush_denormals() -> None:
    """Let the CPU round denormal numbers (below 1.2e-38) to 0.

    AdamW's m of an embedding row falls below that some 700 steps after its last gradient, and many
    processors compute with denormals ten times as slowly. PyTorch's threads inherit the setting, so
    call this before the first large operation starts them.
    """
    for dtype in (np.float32, np.float64):
        np.finfo(dtype)  # NumPy keeps it; afterwards scikit-learn's import would warn of it
    torch.set_flush_denormal(True)


def pick_device(use_gpu: bool) -> torch.device:
    """Return the CPU, or with `use_gpu` CUDA, else Apple's MPS, else raise InputError."""
    if not use_gpu:
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    raise InputError("--use_gpu: this PyTorch sees neither a CUDA nor an MPS device; leave it out")


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike, mode: str = "w") -> Iterator[IO]:
    """Open a temporary file beside `path` and rename it to `path` if the block raises nothing.

    Text is UTF-8 with "\\n" for newlines. After an exception `path` is unchanged. Links are
    followed. Devices and pipes, such as /dev/null, are opened directly.
    """
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    if is_device(path):
        with open(path, mode, **text) as file:
            yield file
        return
    path = real_path(path)
    temporary = hidden_neighbor(path, f"{os.getpid()}.tmp")
    try:
        with open(temporary, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(temporary)):
            error.filename = str(path)  # a full disk names no file
        raise


def hidden_neighbor(path: Path, ending: str) -> Path:
    """Return a hidden path beside `path`, named after it; file systems bound a name's length."""
    name = path.name
    if len(os.fsencode(name)) > 200:
        name = f"{name[:40]}-{zlib.crc32(os.fsencode(name)):08x}"
    return path.with_name(f".{name}.{ending}")


def is_device(path: str | os.PathLike) -> bool:
    """Whether `path` is in /dev, a pipe or the like: it has no content to protect."""
    real = real_path(path)
    parents = Path(path).absolute().parents
    in_dev = Path("/dev") in parents and Path("/dev/shm") not in parents  # that is a RAM disk
    return in_dev or (real.exists() and not real.is_file() and not real.is_dir())


def real_path(path: str | os.PathLike) -> Path:
    """Return the absolute path with links followed."""
    return Path(os.path.realpath(path))  # Path.resolve raises on a circle before Python 3.13


def sha256_of(path: str | os.PathLike) -> str:
    """Return the SHA-256 of a file as 64 hex digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = 80


def brief(value: Any) -> str:
    """Return a short repr for a message: a value from a file may be endlessly long or deep."""
    return _BRIEF.repr(value)


def printable(text: str, kept: str = "") -> str:
    """Escape control characters of terminals; keep `kept` and U+200C and U+200D, which Persian and
    composed emoji need."""
    kept += "\u200c\u200d"
    return "".join(c if c.isprintable() or c in kept else ascii(c)[1:-1] for c in text)


def on_one_line(text: str) -> str:
    """Return a text fit for one line of a terminal."""
    return printable(" ".join(text.split()))
