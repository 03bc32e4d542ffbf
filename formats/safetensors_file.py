"""The safetensors format (github.com/huggingface/safetensors), by hand: files of named tensors.

    8 bytes   n, the length of the header, little-endian
    n bytes   JSON, padded with spaces: {"__metadata__": {"format": "pt"}, "norm.weight":
              {"dtype": "F32", "shape": [64], "data_offsets": [begin, end]}, ...}
    the rest  the tensors' numbers, little-endian, row by row; offsets count from here

What is read may be anyone's. It is held against the format and against the file's size before a
tensor is made, so a small file cannot ask for much memory.
"""

import json
import math
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch

import cli
from config import shown
from formats.checkpoint import listed
from utils import atomic_write, is_file

# A header of 1,000 tensors has 2**17 bytes; in Python's memory this many become 100 MB at most.
MAX_JSON = 2**22
_DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}  # NumPy lacks bfloat16
_ENTRY = {"dtype", "shape", "data_offsets"}


def write_safetensors(path: str | os.PathLike, tensors: dict[str, torch.Tensor]) -> None:
    """Writes float32 tensors of the CPU, in their order, whole or not at all."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + 4 * tensor.numel()
        entries[name] = {"dtype": "F32", "shape": [*tensor.shape], "data_offsets": [begin, end]}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # so that the numbers can be mapped where they lie
    with atomic_write(path, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for tensor in tensors.values():
            file.write(np.ascontiguousarray(tensor.numpy(), "<f4"))


def read_safetensors(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """The tensors of a file that holds F32, F16 and BF16, all as float32 on the CPU.

    A ValueError names the file, and what in it is not as the format has it.
    """
    path = Path(path)
    size = _require_file(path).stat().st_size
    with open(path, "rb") as file:
        n = int.from_bytes(file.read(8), "little")
        if n > min(size - 8, MAX_JSON):
            raise ValueError(
                f"{path}: is no safetensors file, or was cut off: its header is to have {n:,} "
                f"bytes, the file has {size:,} and a header at most {MAX_JSON:,}"
            )
        header = file.read(n)
    entries = _parse_json(header, path)
    entries.pop("__metadata__", None)
    try:
        placed = {name: _require_entry(name, entry) for name, entry in entries.items()}
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    end = 0
    for name, (_, _, offsets) in sorted(placed.items(), key=lambda item: item[1][2]):
        if offsets[0] != end:
            raise ValueError(f"{path}: {shown(name)} begins at {offsets[0]:,} instead of {end:,}")
        end = offsets[1]
    if end != size - 8 - n:
        raise ValueError(f"{path}: has {size - 8 - n:,} bytes of numbers, its header wants {end:,}")
    return {
        name: _read_tensor(path, dtype, shape, 8 + n + begin)
        for name, (dtype, shape, (begin, _)) in placed.items()
    }


def read_folder(folder: Path) -> dict[str, torch.Tensor]:
    """Of model.safetensors, or of the files that model.safetensors.index.json tells of."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.exists():
        return read_safetensors(whole)
    if not index.exists():
        raise ValueError(f"{folder}: has no {whole.name} and no {index.name}; others are not read")
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(p, str) for p in places.values()):
        raise ValueError(f"{index}: has no weight_map from names to files")
    names = sorted(set(places.values()))
    for name in names:
        if Path(name).name != name or not is_file(folder / name):
            raise ValueError(f"{index}: {shown(name)} is no file in its folder")
    tensors = {}
    for name in names:
        part = read_safetensors(folder / name)
        differing = part.keys() ^ {tensor for tensor, place in places.items() if place == name}
        if differing:
            those = listed(map(cli.shown, sorted(differing)))
            raise ValueError(f"{folder / name}: it and {index.name} differ in {those}")
        tensors |= part
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of limited size in which no object has a key twice."""
    with open(_require_file(path), "rb") as file:
        return _parse_json(file.read(MAX_JSON + 1), path)


def _require_file(path: Path) -> Path:
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: is not a file")
    return path


def _parse_json(content: bytes, path: Path) -> dict[str, Any]:
    if len(content) > MAX_JSON:
        raise ValueError(f"{path}: has more than {MAX_JSON:,} bytes, which no such file has")
    try:
        value = json.loads(content.decode(), object_pairs_hook=_without_twins)
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, _TwinError) else "is damaged, or no JSON in UTF-8"
        raise ValueError(f"{path}: {reason}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds no JSON object")
    return value


class _TwinError(ValueError):
    pass


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for key, item in pairs:
        if key in value:
            raise _TwinError(f"has {shown(key)} twice")
        value[key] = item
    return value


def _require_entry(name: str, entry: Any) -> tuple[str, list[int], list[int]]:
    """(dtype, shape, [begin, end]) of a tensor that has some number, and these fit each other."""
    if not isinstance(entry, dict) or entry.keys() != _ENTRY:
        raise ValueError(f"{shown(name)} is {shown(entry)}, not dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"{shown(name)} is of {shown(dtype)}; {', '.join(_DTYPES)} are read")
    if not _are_sizes(shape, at_most=8) or not _are_sizes(offsets, at_most=2) or len(offsets) < 2:
        raise ValueError(f"{shown(name)} has shape {shown(shape)}, offsets {shown(offsets)}")
    n_bytes = math.prod(shape) * np.dtype(_DTYPES[dtype]).itemsize
    if n_bytes == 0 or offsets[1] - offsets[0] != n_bytes:
        raise ValueError(
            f"{shown(name)} of shape {shape} in {dtype} has {n_bytes:,} bytes, its offsets are "
            f"{offsets}"
        )
    return dtype, shape, offsets


def _are_sizes(values: Any, at_most: int) -> bool:
    is_short = isinstance(values, list) and len(values) <= at_most
    return is_short and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _read_tensor(path: Path, dtype: str, shape: list[int], begin: int) -> torch.Tensor:
    numbers = np.fromfile(path, _DTYPES[dtype], count=math.prod(shape), offset=begin)
    if dtype == "BF16":  # the upper half of a float32
        numbers = (numbers.astype(np.uint32) << 16).view(np.float32)
    return torch.from_numpy(numbers.astype(np.float32, copy=False)).view(shape)
