"""Seeds, the device, and writing a file whole or not at all."""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

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
