"""Seeds, the device, memory, and writing a file whole or not at all."""

import ctypes
import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch


def seed_everything(seed: int = 11711) -> None:
    """Seeds Python, NumPy and every PyTorch device, and asks cuDNN for repeatable kernels."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True


def pick_device(use_gpu: bool) -> torch.device:
    """The CPU, or with `use_gpu` a CUDA device, else Apple's MPS, else a ValueError."""
    if not use_gpu:
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    raise ValueError("--use_gpu: this PyTorch sees neither a CUDA nor an MPS device; leave it out")


def allow_tf32() -> None:
    """Lets CUDA multiply float32 matrices in TF32, which reads 10 of their 23 bits of fraction.

    For training: its results then differ from a CPU's in the third digit. Not measured here.
    """
    torch.backends.cuda.matmul.fp32_precision = "tf32"


@contextmanager
def atomic_write(path: str | os.PathLike, mode: str = "w") -> Iterator[IO]:
    """Opens a temporary neighbor of `path` and renames it to `path` when the block ends well.

    Text is UTF-8 with newlines as `\\n` everywhere. After an exception in the block `path` is as
    it was. A link is followed, not replaced. What lies in /dev, or is a pipe, has no content to
    protect and is opened as it is.
    """
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    is_device = Path("/dev") in Path(path).absolute().parents
    path = Path(path).resolve()
    if is_device or (path.exists() and not path.is_file() and not path.is_dir()):
        with open(path, mode, **text) as file:
            yield file
        return
    # The name is cut because a file system bounds its length.
    temporary = path.with_name(f".{path.name[:40]}.{os.getpid()}.tmp")
    try:
        with open(temporary, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename == str(temporary):
            error.filename = str(path)  # the name that the caller knows
        raise


def save_torch_file(path: str | os.PathLike, content: dict[str, Any]) -> None:
    """A dict of tensors and plain data, which `checkpoint.load_torch_file` reads again."""
    with atomic_write(path, "wb") as file:
        torch.save(content, file)


def keep_freed_memory() -> None:
    """Lets the C library keep what is freed, for the next batch: PyTorch frees and takes large
    buffers all the time, and on Linux the kernel hands each out page by page, zeroed.

    Only buffers of up to 32 MiB, glibc's own limit: kept without one, large and small lie mixed and
    the process grows without end. All threads share one arena, so what one frees another can use.
    Without effect elsewhere. For programs that train.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        trim_threshold, mmap_threshold, arena_max = -1, -3, -8  # malloc.h
        mallopt(mmap_threshold, 32 * 2**20)
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(arena_max, 1)
