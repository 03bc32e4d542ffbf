"""Read and write torch files of plain data; reading executes nothing in a file.

A file's limits are checked before it is loaded, so a small file cannot take much memory or crash
Python.
"""

import io
import os
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import torch

from utils import InputError, atomic_write, brief, is_memory_error, printable

_ZIP_MAGIC = b"PK\x03\x04"
_LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # of files written before torch 1.6
# torch interprets a pickle in Python, and about 10^5 nested tuples crash Python itself. A file of
# 1,000 tensors and their optimizer has a tenth of these.
_MAX_INSTRUCTIONS, _MAX_TUPLES = 500_000, 50_000


class DoesNotFitError(InputError):
    """A file takes more memory than there is."""


def is_torch_file(path: str | os.PathLike) -> bool:
    """Return whether a file begins as a torch file does, whatever its name."""
    with open(path, "rb") as file:
        return file.read(len(_LEGACY_MAGIC)).startswith((_ZIP_MAGIC, _LEGACY_MAGIC))


def load_torch_file(path: str | os.PathLike) -> dict[str, Any]:
    """Return the dict in a torch file, with tensors on the CPU.

    Raises OSError if the file cannot be opened and InputError with its name if it is damaged, holds
    anything except plain data and dense tensors, or declares far more memory than it has bytes. Its
    subclass DoesNotFitError leaves open whether the file or the memory is at fault.
    """
    try:
        with warnings.catch_warnings():  # torch warns of odd tensors, Python of escapes in a pickle
            warnings.simplefilter("ignore")
            _require_bounded(path)
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, KeyError and others
        if isinstance(error, OSError) and error.filename is not None:
            raise
        if is_memory_error(error):
            raise DoesNotFitError(
                f"{path}: does not fit in the free memory, or is damaged"
            ) from error
        raise InputError(f"{path}: {_reason(error)}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}, not a checkpoint's dict")
    _require_dense(path, content)
    return content


def save_torch_file(path: str | os.PathLike, content: dict[str, Any]) -> None:
    """Write a dict of tensors and plain data; after an error `path` is unchanged."""
    with atomic_write(path, "wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # torch hides a full disk and Ctrl-C behind its own
            if isinstance(error.__context__, (OSError, KeyboardInterrupt)):
                raise error.__context__ from None
            raise


def listed(names: Iterable[Any]) -> str:
    """Return at most 50 names for a message, each shortened: a file may declare any names."""
    parts = [printable(n[:100]) if isinstance(n, str) else brief(n) for n in names]
    more = f" and {len(parts) - 50} more" if len(parts) > 50 else ""
    return ", ".join(parts[:50]) + more


def _require_bounded(path: str | os.PathLike) -> None:
    """Raise InputError if a zip unpacks to more than its size, or a pickle is too long."""
    with open(path, "rb") as file:
        is_zip = file.read(4) == _ZIP_MAGIC
        file.seek(0)
        if not is_zip:  # magic number, version, system, content, names of the storages
            _require_short_pickles(file, 5)
            return
        with zipfile.ZipFile(file) as archive:
            members, size = archive.infolist(), Path(path).stat().st_size
            unpacked = sum(member.file_size for member in members)
            if unpacked > size:  # torch compresses nothing
                raise InputError(f"unpacks to {unpacked:,} bytes from {size:,}; download it again")
            for member in members:
                if member.filename.lower().endswith(".pkl"):
                    _require_short_pickles(io.BytesIO(archive.read(member)), 1)


def _require_short_pickles(file: IO[bytes], n_pickles: int) -> None:
    n_instructions, n_tuples = 0, 0
    for _ in range(n_pickles):
        for opcode, _, _ in pickletools.genops(file):
            n_instructions += 1
            n_tuples += "TUPLE" in opcode.name
            if n_instructions > _MAX_INSTRUCTIONS or n_tuples > _MAX_TUPLES:
                raise InputError("has more pickle instructions than any checkpoint; not loaded")


def _reason(error: Exception) -> str:
    """Return why a file does not load; torch's own message advises to switch the safety off."""
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, zipfile.BadZipFile):
        return "is truncated or damaged; delete it and download it again"
    refused = re.search(r"GLOBAL ([\w.]{1,100})", str(error))
    if refused is None:
        return "is not a torch file, or is damaged; nothing in it was executed"
    reason = f"holds {refused[1]}, which is not plain data; nothing in it was executed"
    if refused[1].startswith(("argparse.", "types.SimpleNamespace", "numpy.")):
        reason += "; the assignment's original run_llama.py saves such files: finetune again here"
    return reason


def _require_dense(path: str | os.PathLike, content: dict) -> None:
    """Raise InputError for a sparse, nested, meta, complex or quantized tensor.

    Also for views that declare more than twice the file's size (a tied matrix is stored once).
    """
    stack: list[tuple[Any, Any]] = [("", content)]
    seen: set[int] = set()  # a container may hold itself
    declared = 0
    while stack:
        name, value = stack.pop()
        if isinstance(value, torch.Tensor):
            is_array = value.layout == torch.strided and not (value.is_nested or value.is_meta)
            if not is_array or value.is_complex() or value.is_quantized:
                raise InputError(f"{path}: {listed([name])} is not a dense tensor of real numbers")
            declared += value.nbytes
        elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            stack += value.items() if isinstance(value, dict) else [(name, item) for item in value]
    if declared > 2 * (size := Path(path).stat().st_size):
        raise InputError(f"{path}: declares tensors of {declared:,} bytes, it has {size:,}")
