"""Memory: keep what is freed for the next training step, and measure the peak."""

import contextlib
import ctypes
import gc
import sys
from pathlib import Path


def keep_freed_memory() -> None:
    """Let the C library keep freed buffers for the next step. Call it before training.

    PyTorch frees and takes large buffers in every step, and Linux zeroes each page again, which a
    small model's step notices. Only buffers of up to 32 MiB are kept, glibc's own limit; one arena
    serves all threads. Nothing happens without glibc.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        trim_threshold, mmap_threshold, arena_max = -1, -3, -8  # malloc.h
        mallopt(mmap_threshold, 32 * 2**20)
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(arena_max, 1)


def reset_peak_memory() -> None:
    """Restart the measurement of the peak (Linux; elsewhere it counts from the process's start)."""
    gc.collect()
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # kept buffers would count as held
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def peak_memory_mb() -> float:
    """Return the most memory that this process held since `reset_peak_memory`, in MiB."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux: getrusage would count the parent's memory before exec
        lines = status.read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # macOS counts bytes
