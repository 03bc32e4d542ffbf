"""Seeds, the device, memory, files (written whole or not at all, told apart by content), and in
what two settings differ."""

import contextlib
import ctypes
import gc
import hashlib
import os
import random
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch


class InputError(ValueError):
    """Something the user can mend: its message names the value, the place and the remedy."""


def seed_everything(seed: int = 11711) -> None:
    """Seeds Python, NumPy and every PyTorch device, and asks cuDNN for repeatable kernels."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True


def random_state() -> dict[str, Any]:
    """Where every generator that `seed_everything` seeds is, as plain data."""
    name, keys, *rest = np.random.get_state()
    version, numbers, gauss = random.getstate()
    state = {
        "python": [version, list(numbers), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Goes back to what `random_state` gave."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        for index, of_device in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(of_device, index)  # there may be fewer devices now
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])


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

    For training: its results then differ from a CPU's in the third digit. What that does to
    accuracy stands in results/README.md: `plain_gpu` beside `plain`.
    """
    torch.backends.cuda.matmul.fp32_precision = "tf32"


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike, mode: str = "w") -> Iterator[IO]:
    """Opens a temporary neighbor of `path` and renames it to `path` when the block ends well.

    Text is UTF-8 with newlines as `\\n` everywhere. After an exception in the block `path` is as
    it was. A link is followed, not replaced. What lies in /dev, or is a pipe, has no content to
    protect and is opened as it is.
    """
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    if has_no_content(path):
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
            error.filename = str(path)  # the name that the caller knows; a full disk gives none
        raise


def has_no_content(path: str | os.PathLike) -> bool:
    """Whether `path` is in /dev, or a pipe or the like: nothing there to replace or to protect."""
    is_device = Path("/dev") in Path(path).absolute().parents
    path = real_path(path)
    return is_device or (path.exists() and not path.is_file() and not path.is_dir())


def real_path(path: str | os.PathLike) -> Path:
    """Absolute, links followed. One that leads in a circle stays as it is, where Path.resolve
    raises a RuntimeError before Python 3.13."""
    return Path(os.path.realpath(path))


def is_file(path: str | os.PathLike) -> bool:
    """False also of a name, from a file, that is longer than any a system takes."""
    return os.path.isfile(path)  # noqa: PTH113 - Path.is_file raises an OSError there


def hidden_neighbor(path: Path, ending: str) -> Path:
    """A neighbor for temporary use, named after `path`; file systems bound a name's length."""
    name = path.name
    if len(os.fsencode(name)) > 200:
        name = f"{name[:40]}-{zlib.crc32(os.fsencode(name)):08x}"
    return path.with_name(f".{name}.{ending}")


def save_torch_file(path: str | os.PathLike, content: dict[str, Any]) -> None:
    """A dict of tensors and plain data, which `checkpoint.load_torch_file` reads again."""
    with atomic_write(path, "wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # torch hides what the disk said behind words of its own
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def differences(saved: dict[str, Any], settings: dict[str, Any]) -> str:
    """What differs, as "lr: 0.1 there, 0.2 here; ...", settings within settings by their key."""
    parts = []
    for key, value in settings.items():
        there = saved.get(key)
        if isinstance(there, dict) and isinstance(value, dict):
            parts.append(differences(there, {**dict.fromkeys(there), **value}))
        elif there != value:
            parts.append(f"{key}: {_cut(there)} there, {_cut(value)} here")
    return "; ".join(part for part in parts if part)


def _cut(value: object) -> str:
    text = str(value)
    return text if len(text) <= 200 else f"{text[:197]}..."


def sha256_of(path: str | os.PathLike) -> str:
    """The sha256 of a file of any size, as 64 hex digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


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


def return_freed_memory() -> None:
    """Gives what the C library keeps of freed memory back to the system; without effect where that
    is not glibc."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def forget_peak_memory() -> None:
    """Linux: the most memory held is what is held now. Elsewhere the peak keeps the building's."""
    gc.collect()
    return_freed_memory()  # which would count as held
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def peak_memory_mb() -> float:
    """The most memory this process held since `forget_peak_memory`, else since its start."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux: getrusage would count the parent's memory before exec
        line = next(
            line
            for line in status.read_text(encoding="utf-8").splitlines()
            if line.startswith("VmHWM")
        )
        return int(line.split()[1]) / 1024
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # macOS: bytes
