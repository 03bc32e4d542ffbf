"""How a run is stopped from outside: Ctrl-C (SIGINT) and SIGTERM, told apart and let in where it
does no harm."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """SIGINT or SIGTERM came. `is_resumable` says that the run was saved and goes on by `option`,
    or where that is None by the same command."""

    def __init__(self, signum: int = signal.SIGINT):
        super().__init__(signum)
        self.signum = signum
        self.is_resumable = False
        self.option: str | None = "--resume"

    @property
    def exit_code(self) -> int:
        """What a shell reports of a process that a signal ended."""
        return 128 + self.signum

    def __str__(self) -> str:
        return "interrupted" if self.signum == signal.SIGINT else "terminated"


@contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """A signal that is ignored (as `nohup` does) stays ignored, and so does one that `ignore_all`
    took in this context; only a main thread has handlers."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        for signum in SIGNALS:
            if signal.getsignal(signum) is not signal.SIG_IGN:
                before[signum] = signal.signal(signum, handler)
    try:
        yield
    finally:
        for signum, old in before.items():
            if signal.getsignal(signum) is handler:
                signal.signal(signum, old)


def ignore_all() -> None:
    """From here on this process ends by a reason of its own, which no signal hides."""
    if threading.current_thread() is threading.main_thread():
        for signum in SIGNALS:
            signal.signal(signum, signal.SIG_IGN)


def raised() -> AbstractContextManager[None]:
    """In this context a signal raises `Stopped` at once; while one is on its way out, another
    changes nothing: torchrun sends SIGTERM to those who already heed a Ctrl-C."""

    def stop(signum: int, _frame: FrameType | None) -> None:
        if not isinstance(sys.exc_info()[1], Stopped):
            raise Stopped(signum)

    return _handled_by(stop)


@contextmanager
def held_back() -> Iterator[list[int]]:
    """In this context a signal waits until its end, so that what is in it happens whole; yields the
    signals that wait."""
    waiting: list[int] = []
    with _handled_by(lambda signum, _frame: waiting.append(signum)):
        yield waiting
    if waiting:
        raise Stopped(waiting[0])
