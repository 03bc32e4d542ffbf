"""Weight files as they occur in the wild, read into one form: (model_args, weights).

Two formats are known, told apart by their content and never by their name:

- a torch file holding {"model": state dict, "model_args": LlamaConfig arguments}, as llama2.c's
  training and the assignment write it, with the attention matrices called wq/wk/wv/wo (llama2.c) or
  compute_query/key/value/output (CMU);
- llama2.c's fp32 `.bin`: seven int32 (dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size,
  max_seq_len; a negative vocab_size says that the output matrix is separate), then the matrices,
  each kind for all layers in a row.
"""

import errno
import io
import math
import mmap
import os
import pickletools
import re
import reprlib
import struct
import warnings
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

Shapes = list[tuple[str, tuple[int, ...]]]

_CMU_NAMES = {
    "wq": "compute_query",
    "wk": "compute_key",
    "wv": "compute_value",
    "wo": "compute_output",
}
# Tables that some releases store beside the weights; they follow from the config.
_DERIVED = re.compile(r"freqs_cos|freqs_sin|rope\.freqs|layers\.\d+\.attention\.mask")
BIN_HEADER = struct.Struct("<7i")
_VERSIONED_BIN_MAGIC = 0x616B3432  # "ak42": llama2.c's later exports
_LEGACY_TORCH_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # before torch 1.6's zip files
_TEXT_BEGINNINGS = (b"<", b"{", b"version https://git-lfs")
# torch reads a pickle's instructions one by one in Python, and tuples within tuples crash Python
# itself from about 10^5 on. A checkpoint of 1,000 tensors and their optimizer has a tenth of these.
_MAX_INSTRUCTIONS, _MAX_TUPLES = 500_000, 50_000
# The assignment's LlamaConfig has these too; nothing reads them.
_UNREAD_ARGS = ("position_embedding_type", "use_cache")


def read_checkpoint(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The LlamaConfig arguments and the float32 CPU weights, under the CMU names, of a file.

    Nothing in the file is executed (`weights_only=True`). Raises FileNotFoundError or a ValueError
    that begins with the file's name.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            2, "no such checkpoint; `bash setup.sh` downloads the published weights", str(path)
        )
    if not path.is_file():
        raise ValueError(f"{path}: is not a file")
    with open(path, "rb") as file:
        head = file.read(512)
    if not head:
        raise ValueError(f"{path}: is empty; delete it and download it again")
    if _is_zip(path) or head.startswith(_LEGACY_TORCH_MAGIC):
        return _read_torch(path)
    if head.startswith(b"PK"):
        raise ValueError(f"{path}: is truncated; delete it and download it again")
    try:
        return _read_bin(path, head)
    except ValueError as error:
        reason = str(error)
        if head.lstrip().startswith(_TEXT_BEGINNINGS):  # only now: a .bin may begin with any byte
            reason = "is a text page, not a checkpoint; download it again"
        raise ValueError(f"{path}: {reason}") from error


def load_torch_file(path: str | os.PathLike) -> dict[str, Any]:
    """A dict of plain data from a torch file, on the CPU; a ValueError names the file.

    Tensors are mapped from the file, not copied: it may be replaced or deleted while they live, but
    not written in place (`cp` onto it), as the operating system would end the program. What the
    file declares is held against its size, so that a small file cannot ask for much memory.
    """
    is_zip = _is_zip(path)
    try:
        bomb = _unpacked_bomb(path) if is_zip else None
        if bomb is None:
            with warnings.catch_warnings():  # torch's of tensors, Python's of escapes in a pickle
                warnings.simplefilter("ignore")
                _require_modest_pickles(path, is_zip)
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # RuntimeError, UnpicklingError, EOFError, KeyError, ...
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # that: a position below 0
            raise
        # Not torch's own words: they advise to load it without weights_only.
        raise ValueError(
            f"{path}: cannot be read as a checkpoint: it is no torch file, or damaged, or holds "
            "more than tensors and plain data (none of it was executed)"
        ) from error
    if bomb is not None:
        raise ValueError(f"{path}: {bomb}; no checkpoint is compressed, download it again")
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not a checkpoint's dict")
    _require_kinds(path, content)
    _require_backed(path, content)
    return content


def _is_zip(path: str | os.PathLike) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # its end says zip64, and nonsense
        return True


def _unpacked_bomb(path: str | os.PathLike) -> str | None:
    """What is wrong where a zip unpacks to more than it is: torch writes its zips uncompressed."""
    size = Path(path).stat().st_size
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(info.file_size for info in archive.infolist())
    return f"unpacks to {unpacked:,} bytes and has {size:,}" if unpacked > size else None


def _require_modest_pickles(path: str | os.PathLike, is_zip: bool) -> None:
    """ValueError where torch would take long over a file's pickles, or crash, executing nothing."""
    if is_zip:
        with zipfile.ZipFile(path) as archive:
            pickles = [archive.read(n) for n in archive.namelist() if n.lower().endswith(".pkl")]
        for content in pickles:
            _require_modest(io.BytesIO(content), 1)
        return
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        _require_modest(content, 5)  # magic number, version, system, content, names of the storages


def _require_modest(stream: Any, n_pickles: int) -> None:
    n_instructions, n_tuples = 0, 0
    for _ in range(n_pickles):
        for opcode, _, _ in pickletools.genops(stream):
            n_instructions += 1
            n_tuples += "TUPLE" in opcode.name
            if n_instructions > _MAX_INSTRUCTIONS or n_tuples > _MAX_TUPLES:
                raise ValueError("more instructions than any checkpoint has")


def _require_kinds(path: str | os.PathLike, content: dict) -> None:
    """ValueError where an entry that every reader knows is of another kind than they expect."""
    for key in ("model", "model_args", "model_config"):
        if key in content and not isinstance(content[key], dict):
            raise ValueError(f"{path}: has no dict {key}; it holds {listed(content)}")
    for key in ("model_args", "model_config"):
        for name in content.get(key, {}):
            if not isinstance(name, str):
                raise ValueError(f"{path}: {key}[{reprlib.repr(name)}] has no string for a key")
    for name, tensor in content.get("model", {}).items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{path}: model[{reprlib.repr(name)}] is not a named tensor")
        is_dense = tensor.layout == torch.strided and not (tensor.is_nested or tensor.is_meta)
        if not is_dense or tensor.is_complex() or tensor.is_quantized:
            raise ValueError(f"{path}: {_cut(name)} is no dense tensor of real numbers")
    for key in ("label_names", "methods"):
        names = content.get(key, [])
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{path}: {key} is not a list of strings")
    for key in ("tokenizer_path", "tokenizer_sha256"):
        if not isinstance(content.get(key, ""), str):
            raise ValueError(f"{path}: {key} is not a string")


def _require_backed(path: str | os.PathLike, content: dict) -> None:
    """ValueError where tensors, by views that repeat their numbers, declare more than the file.

    Twice its size is allowed, as an embedding may be stored once under two names.
    """
    size = Path(path).stat().st_size
    inner = [
        value for entry in content.values() if isinstance(entry, dict) for value in entry.values()
    ]
    declared = sum(
        tensor.numel() * tensor.element_size()
        for tensor in [*content.values(), *inner]
        if isinstance(tensor, torch.Tensor) and not tensor.is_nested and not tensor.is_meta
    )
    if declared > 2 * size:
        raise ValueError(f"{path}: declares tensors of {declared:,} bytes, it has {size:,}")


def _read_torch(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    content = load_torch_file(path)
    absent = [key for key in ("model", "model_args") if key not in content]
    if absent:
        held = listed(content) or "nothing"
        raise ValueError(f"{path}: has no dict {' and no '.join(absent)}; it holds {held}")
    weights = {}
    for name, tensor in content["model"].items():
        name = _cmu_name(name)
        if name in weights:
            raise ValueError(f"{path}: holds {_cut(name)} twice, under two names")
        if _DERIVED.fullmatch(name):
            continue
        if not tensor.is_floating_point():
            raise ValueError(f"{path}: {_cut(name)} is no dense tensor of real numbers")
        weights[name] = tensor.float()
    model_args = content["model_args"]
    return {key: model_args[key] for key in model_args if key not in _UNREAD_ARGS}, weights


def require_finite(
    weights: dict[str, torch.Tensor], remedy: str = "the file is damaged, or its training diverged"
) -> None:
    """Raises one ValueError that lists every tensor with a NaN or an infinity in it.

    With those a model computes nothing but more of them, and says so late: where a token is drawn.
    """
    with torch.no_grad():
        faulty = [
            name
            for name, tensor in weights.items()
            if tensor.numel() and not all(bound.isfinite() for bound in tensor.aminmax())
        ]
    if faulty:
        raise ValueError(f"NaN or infinite numbers in {listed(faulty)}; {remedy}")


def listed(keys: Iterable[Any]) -> str:
    """Keys for a message, each cut and at most 50: a file may declare any."""
    shown = [_cut(key) if isinstance(key, str) else reprlib.repr(key) for key in keys]
    more = f" and {len(shown) - 50} more" if len(shown) > 50 else ""
    return ", ".join(shown[:50]) + more


def _cut(name: str) -> str:
    return name if len(name) <= 100 else f"{name[:97]}..."


def _cmu_name(name: str) -> str:
    """_orig_mod.layers.0.attention.wq.weight -> layers.0.attention.compute_query.weight"""
    name = name.removeprefix("_orig_mod.")  # left by torch.compile
    return re.sub(r"(?<=\.attention\.)w[qkvo](?=\.)", lambda match: _CMU_NAMES[match[0]], name)


def _read_bin(path: Path, head: bytes) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A llama2.c `.bin`; its ValueErrors leave the file's name to the caller."""
    size = path.stat().st_size
    no_checkpoint = "is neither a torch file nor a llama2.c .bin"
    if size < BIN_HEADER.size:
        raise ValueError(f"{no_checkpoint}: it has {size} bytes")
    header = BIN_HEADER.unpack_from(head)
    if header[0] == _VERSIONED_BIN_MAGIC:
        raise ValueError("is a versioned llama2.c export; only the fp32 .bin is read")
    dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, max_seq_len = header
    if min(*header[:5], abs(vocab_size), max_seq_len) < 1 or dim % n_heads or n_heads % n_kv_heads:
        raise ValueError(f"{no_checkpoint}: its first seven numbers {header} describe no model")

    before, per_layer, after = bin_layout(*header)
    n_numbers = _count(before) + n_layers * _count(per_layer) + _count(after)
    expected = BIN_HEADER.size + 4 * n_numbers
    if size != expected:  # known before anything is allocated
        raise ValueError(
            f"{no_checkpoint} whole: its header {header} wants {expected:,} bytes, it has {size:,}"
        )
    layers = [
        (f"layers.{i}.{name}.weight", shape) for name, shape in per_layer for i in range(n_layers)
    ]
    layout = [*before, *layers, *after]
    data = torch.from_numpy(np.fromfile(path, dtype="<f4", offset=BIN_HEADER.size))
    parts = torch.split(data, [math.prod(shape) for _, shape in layout])
    weights = {
        name: part.view(shape)
        for (name, shape), part in zip(layout, parts, strict=True)
        if not _DERIVED.fullmatch(name)
    }
    model_args = {
        "dim": dim,
        "hidden_dim": hidden_dim,
        "n_layers": n_layers,
        "n_heads": n_heads,
        "n_kv_heads": n_kv_heads,
        "vocab_size": abs(vocab_size),
        "max_seq_len": max_seq_len,
    }
    return model_args, weights


def _count(shapes: Shapes) -> int:
    return sum(math.prod(shape) for _, shape in shapes)


def bin_layout(
    dim: int,
    hidden_dim: int,
    n_layers: int,
    n_heads: int,
    n_kv_heads: int,
    vocab_size: int,
    max_seq_len: int,
) -> tuple[Shapes, Shapes, Shapes]:
    """What a `.bin` holds, in its order: before the layers, each kind in a layer, and after."""
    head_dim = dim // n_heads
    before = [("tok_embeddings.weight", (abs(vocab_size), dim))]
    per_layer = [
        ("attention_norm", (dim,)),
        ("attention.compute_query", (dim, dim)),
        ("attention.compute_key", (n_kv_heads * head_dim, dim)),
        ("attention.compute_value", (n_kv_heads * head_dim, dim)),
        ("attention.compute_output", (dim, dim)),
        ("ffn_norm", (dim,)),
        ("feed_forward.w1", (hidden_dim, dim)),
        ("feed_forward.w2", (dim, hidden_dim)),
        ("feed_forward.w3", (hidden_dim, dim)),
    ]
    after = [
        ("norm.weight", (dim,)),
        ("freqs_cos", (max_seq_len, head_dim // 2)),
        ("freqs_sin", (max_seq_len, head_dim // 2)),
    ]
    if vocab_size < 0:
        after.append(("output.weight", (-vocab_size, dim)))
    return before, per_layer, after
