"""Which process may write which file: one at a time."""

import contextlib
import errno
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from utils import has_no_content, hidden_neighbor, real_path

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt

    fcntl = None


@contextmanager
def sole_writer(*paths: str | os.PathLike) -> Iterator[None]:
    """Holds `paths` for this process: a ValueError names the process that holds one already.

    Each is held by a lock of the operating system on a hidden neighbor that tells the process id.
    Such a lock ends with its process however that ended, so the file of a killed run bars nobody;
    nor does what it was writing, which is removed. What has no content is shared.
    """
    with contextlib.ExitStack() as held:
        for path in dict.fromkeys(real_path(p) for p in paths if not has_no_content(p)):
            held.enter_context(_locked(path))
            remove_leftovers(path)
        yield


def remove_leftovers(path: str | os.PathLike) -> None:
    """Removes what killed processes were writing for `path`; call it as its sole writer."""
    begin = hidden_neighbor(real_path(path), "")
    for neighbor in list(begin.parent.iterdir()):
        if re.fullmatch(re.escape(begin.name) + r"[0-9]+\.tmp", neighbor.name):
            neighbor.unlink(missing_ok=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    lock = hidden_neighbor(path, "lock")
    file = _open_locked(lock, path)
    try:
        _sign(file, path)
        yield
    finally:
        if sys.platform == "win32":  # where a file that is open cannot be removed
            file.close()
        lock.unlink(missing_ok=True)
        file.close()


def _sign(file: IO, path: Path) -> None:
    try:
        file.truncate(0)
        file.write(str(os.getpid()).encode())
    except OSError as error:
        error.filename = str(path)  # a full disk gives none
        raise


def _open_locked(lock: Path, path: Path) -> IO:
    while True:
        file = open(lock, "a+b", buffering=0)  # noqa: SIM115, its lock outlives this call
        if not _try_lock(file):
            with file:
                file.seek(0)
                owner = file.read(20).decode(errors="replace")
            raise ValueError(
                f"{path}: process {owner} is writing it; wait for that, or name another output"
            )
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), lock.stat()):
                return file
        file.close()  # its last holder removed it since it was opened


def _try_lock(file: IO) -> bool:
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            file.seek(2**20)  # beyond the process id, which others may read
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except OSError as error:
        # A file system without locks protects nothing, but is no reason not to run.
        return error.errno not in (errno.EAGAIN, errno.EACCES)
    return True
