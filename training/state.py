"""Save and resume interrupted runs: state files, signals, file locks.

A state is saved after each epoch, every few minutes, and on Ctrl-C or SIGTERM. It is plain data,
replaced whole, and holds the random generators' states, so a run that continues from it ends in the
same bits as an uninterrupted one (in one process on the same machine, with as many threads and the
same matrix library).
"""

import contextlib
import glob
import hashlib
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout

from formats.torch_file import DoesNotFitError, load_torch_file, save_torch_file
from training import distributed
from utils import InputError, hidden_neighbor, is_device, real_path, sha256_of

ROOT = Path(__file__).resolve().parent.parent
HASHED_ROOMS = ("formats", "fast", "training", "pretraining", "advanced")  # and the top level
UNHASHED_FILES = ("prepare_submit.py", "sanity_check.py", "optimizer_test.py", "rope_test.py")


def state_path(checkpoint: str | os.PathLike) -> Path:
    """finetune-sst-5-2e-05.pt -> finetune-sst-5-2e-05.state.pt"""
    return Path(f"{os.fspath(checkpoint).removesuffix('.pt')}.state.pt")


class StateFile:
    """The saved state of one run, at `path`.

    `settings` are the options and file hashes that determine the result, as plain data.
    `mode` decides about a state that is already there:

    - "auto": continue if its settings and our source code are the same; otherwise start over and
      keep it as `....state.old.pt`.
    - "resume": continue even if the code changed (with a warning). Changed settings, or no state,
      raise InputError.
    - "restart": start over and keep it as `....state.old.pt`.

    One old state is kept, the last one.

    `saved` is the state to resume from, or None. All processes read the file; only rank 0 writes
    and renames it.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        settings: dict[str, Any],
        mode: str = "auto",
        minutes: float = 5.0,
    ):
        self.path, self.mode = Path(path), mode
        self.settings = {**settings, "source": source_digest()}
        self.minutes = minutes
        self.saved_at = time.monotonic()
        found = sha256_of(self.path) if self.path.exists() else None
        distributed.require_same({**self.settings, "mode": mode, "state": found})
        self.saved, why_not = self._read()
        distributed.barrier()  # rank 0 renames nothing before all have read
        if why_not is not None:
            old = self._old_path()
            distributed.say(f"{self.path} is not resumed ({why_not}); it is renamed to {old.name}")
            if distributed.is_main():
                self.path.replace(old)

    def _old_path(self) -> Path:
        return self.path.with_name(f"{self.path.name.removesuffix('.pt')}.old.pt")

    def _read(self) -> tuple[dict[str, Any] | None, str | None]:
        """Return the state, or None and the reason why the existing state is not resumed."""
        if not self.path.exists():
            if self.mode == "resume":
                old = self._old_path()
                renamed = f", or rename {old.name}, an older one" if old.exists() else ""
                raise InputError(
                    f"{self.path}: no saved state to --resume; leave that option out{renamed}"
                )
            return None, None
        if self.mode == "restart":
            return None, "--restart"
        try:
            saved = load_torch_file(self.path)
            changed = differences(saved["settings"], self.settings)
        except DoesNotFitError:  # it may be whole: neither rename nor replace it
            raise
        except (InputError, LookupError, TypeError, AttributeError) as error:
            if self.mode == "resume":
                raise self.damaged() from error
            return None, "it is damaged or of another version"
        source = changed.pop("source", None)
        what = "; ".join(f"{key}: {words}" for key, words in changed.items())
        if changed and self.mode == "resume":
            raise InputError(
                f"{self.path}: is the state of another run ({what}); use that run's options, or "
                "--restart to start over"
            )
        if changed or (source and self.mode == "auto"):
            return None, what or "the source code has changed"
        if source:
            distributed.say(f"warning: {self.path} was saved by other source code")
        return saved, None

    def damaged(self) -> InputError:
        return InputError(f"{self.path}: is damaged or of another version; --restart starts over")

    def is_due(self) -> bool:
        """Return whether the last save is `minutes` or more ago; rank 0's clock decides."""
        due = distributed.is_main() and time.monotonic() - self.saved_at >= 60 * self.minutes
        return bool(distributed.all_sum(torch.tensor(float(due))))

    def save(self, **content: Any) -> None:
        """Replace the file with the settings and `content`, plain data and tensors."""
        if distributed.is_main():
            save_torch_file(self.path, {"settings": self.settings, **content})
        self.saved_at = time.monotonic()

    def delete(self) -> None:
        if distributed.is_main():
            self.path.unlink(missing_ok=True)


def source_digest() -> str:
    """Return the SHA-256 of the project's modules that a training may run."""
    digest = hashlib.sha256()
    in_rooms = [path for room in HASHED_ROOMS for path in ROOT.glob(f"{room}/**/*.py")]
    for path in sorted([*ROOT.glob("*.py"), *in_rooms]):
        if path.name not in UNHASHED_FILES:
            digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def differences(saved: dict[str, Any], settings: dict[str, Any]) -> dict[str, str]:
    """Return the settings that differ, such as {"lr": "saved 0.1, now 0.2"}."""

    def cut(value: Any) -> str:
        text = str(value)
        return text if len(text) <= 60 else f"{text[:57]}..."

    return {
        key: f"saved {cut(saved.get(key))}, now {cut(settings.get(key))}"
        for key in {**settings, **saved}
        if saved.get(key) != settings.get(key)
    }


# ---------------------------------------------------------------- random generators


def random_state() -> dict[str, Any]:
    """Return the states of the generators that `utils.seed_everything` seeds, as plain data."""
    name, keys, *rest = np.random.get_state()
    version, numbers, gauss = random.getstate()
    state = {
        "python": [version, list(numbers), gauss],
        "numpy": [name, keys.tolist(), *rest],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Restore what `random_state` returned."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])


# ---------------------------------------------------------------- signals


class Stopped(KeyboardInterrupt):
    """SIGINT or SIGTERM ended a run whose state is saved."""

    def __init__(self, signum: int, state_file: StateFile):
        word = "interrupted" if signum == signal.SIGINT else "terminated"
        command = "the same command"
        if state_file.mode == "restart":
            command += " without --restart"
        super().__init__(f"{word}; {command} continues from {state_file.path}")
        self.exit_code = 128 + signum


class StopRequests:
    """The first SIGINT or SIGTERM since `stop_requests` began, if any."""

    signum: int | None = None

    def handle(
        self, save: Callable[[], None], state_file: StateFile | None, is_due: bool = False
    ) -> None:
        """Call `save` if it is due or a signal came; then raise for the signal.

        Raises `Stopped`, or KeyboardInterrupt without a `state_file`.
        """
        signum = self.signum  # read once: a signal may arrive on any line
        if is_due or signum is not None:
            save()
        if signum is not None:
            raise KeyboardInterrupt if state_file is None else Stopped(signum, state_file)


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequests]:
    """Note the first SIGINT or SIGTERM instead of ending at once; a second one ends the process.

    An ignored signal (`nohup`) stays ignored. With several processes a signal ends all at once,
    because they would stop at different batches; the last saved state counts.
    """
    requests = StopRequests()
    handlers = {}

    def note(signum: int, _frame: object) -> None:
        requests.signum = signum
        restore()

    def restore() -> None:
        while handlers:
            signal.signal(*handlers.popitem())

    is_main_thread = threading.current_thread() is threading.main_thread()
    if is_main_thread and distributed.world_size() == 1:
        for signum in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(signum) is not signal.SIG_IGN:
                handlers[signum] = signal.signal(signum, note)
    try:
        yield requests
    finally:
        restore()


# ---------------------------------------------------------------- files


@contextlib.contextmanager
def only_writer(*paths: str | os.PathLike) -> Iterator[None]:
    """Hold a lock on each file or folder; raise InputError if another run holds one.

    The lock is a hidden file beside it, and ends with the process that holds it. In a run of
    several processes, rank 0 holds the locks.
    """
    with contextlib.ExitStack() as stack:
        written = [real_path(path) for path in paths if not is_device(path)]
        for path in dict.fromkeys(written if distributed.is_main() else ()):
            lock = hidden_neighbor(path, "lock")
            try:
                stack.enter_context(FileLock(lock).acquire(timeout=0))
            except Timeout as error:
                raise InputError(
                    f"{path}: another process is writing it; wait, or name another output"
                ) from error
            stack.callback(_remove, lock)
            begin = glob.escape(hidden_neighbor(path, "").name)
            inside = path.glob(".*.[0-9]*.tmp") if path.is_dir() else ()
            for leftover in (*path.parent.glob(f"{begin}[0-9]*.tmp"), *inside):  # of killed runs
                leftover.unlink(missing_ok=True)
        yield


def _remove(lock: Path) -> None:
    with contextlib.suppress(OSError):  # Windows removes no open file
        lock.unlink()


def require_space(checkpoint: str | os.PathLike, n_parameters: int, n_kept: int = 1) -> None:
    """Raise InputError if the disk has too little space for the files of a run.

    The files are `n_kept` checkpoints, the state (weights and AdamW's m and v), and the next state
    before it replaces the last one, all in float32.
    """
    checkpoint = real_path(checkpoint)
    held = [path for path in (checkpoint, state_path(checkpoint)) if path.is_file()]
    needed = 4 * n_parameters * (n_kept + 3 + 3) - sum(path.stat().st_size for path in held)
    free = shutil.disk_usage(checkpoint.parent).free
    if free < needed:
        raise InputError(
            f"{checkpoint.parent}: has {free / 1e6:,.0f} MB free, training needs "
            f"{needed / 1e6:,.0f} MB for its checkpoint and state; make room"
        )
