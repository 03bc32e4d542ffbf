"""Weight files as they occur in the wild, read into one form: (model_args, weights).

Two formats are known, told apart by their content and never by their name:

- a torch file holding {"model": state dict, "model_args": LlamaConfig arguments}, as llama2.c's
  training and the assignment write it, with the attention matrices called wq/wk/wv/wo (llama2.c) or
  compute_query/key/value/output (CMU);
- llama2.c's fp32 `.bin`: seven int32 (dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size,
  max_seq_len; a negative vocab_size says that the output matrix is separate), then the matrices,
  each kind for all layers in a row.
"""

import math
import os
import re
import struct
import zipfile
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
_BIN_HEADER = struct.Struct("<7i")
_VERSIONED_BIN_MAGIC = 0x616B3432  # "ak42": llama2.c's later exports
_LEGACY_TORCH_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # before torch 1.6's zip files
_TEXT_BEGINNINGS = (b"<", b"{", b"version https://git-lfs")
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
    if zipfile.is_zipfile(path) or head.startswith(_LEGACY_TORCH_MAGIC):
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
    not written in place (`cp` onto it), as the operating system would end the program.
    """
    try:
        content = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except OSError:
        raise
    except Exception as error:  # RuntimeError, UnpicklingError, EOFError, KeyError, ...
        # Not torch's own words: they advise to load it without weights_only.
        raise ValueError(
            f"{path}: cannot be read as a checkpoint: it is damaged, or holds more than tensors "
            "and plain data (none of it was executed)"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not a checkpoint's dict")
    return content


def _read_torch(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    content = load_torch_file(path)
    absent = [key for key in ("model", "model_args") if not isinstance(content.get(key), dict)]
    if absent:
        keys = ", ".join(map(str, content)) or "nothing"
        raise ValueError(f"{path}: has no dict {' and no '.join(absent)}; it holds {keys}")
    weights = {}
    for name, tensor in content["model"].items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{path}: model[{name!r}] is not a named tensor")
        name = _cmu_name(name)
        if name in weights:
            raise ValueError(f"{path}: holds {name} twice, under two names")
        if _DERIVED.fullmatch(name):
            continue
        if not tensor.is_floating_point() or tensor.layout != torch.strided or tensor.is_meta:
            raise ValueError(f"{path}: {name} is no dense tensor of real numbers")
        weights[name] = tensor.float()
    model_args = {str(key): value for key, value in content["model_args"].items()}
    return {key: model_args[key] for key in model_args if key not in _UNREAD_ARGS}, weights


def _cmu_name(name: str) -> str:
    """_orig_mod.layers.0.attention.wq.weight -> layers.0.attention.compute_query.weight"""
    name = name.removeprefix("_orig_mod.")  # left by torch.compile
    return re.sub(r"(?<=\.attention\.)w[qkvo](?=\.)", lambda match: _CMU_NAMES[match[0]], name)


def _read_bin(path: Path, head: bytes) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A llama2.c `.bin`; its ValueErrors leave the file's name to the caller."""
    size = path.stat().st_size
    no_checkpoint = "is neither a torch file nor a llama2.c .bin"
    if size < _BIN_HEADER.size:
        raise ValueError(f"{no_checkpoint}: it has {size} bytes")
    header = _BIN_HEADER.unpack_from(head)
    if header[0] == _VERSIONED_BIN_MAGIC:
        raise ValueError("is a versioned llama2.c export; only the fp32 .bin is read")
    dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, max_seq_len = header
    if min(*header[:5], abs(vocab_size), max_seq_len) < 1 or dim % n_heads or n_heads % n_kv_heads:
        raise ValueError(f"{no_checkpoint}: its first seven numbers {header} describe no model")

    before, per_layer, after = _bin_layout(*header)
    n_numbers = _count(before) + n_layers * _count(per_layer) + _count(after)
    expected = _BIN_HEADER.size + 4 * n_numbers
    if size != expected:  # known before anything is allocated
        raise ValueError(
            f"{no_checkpoint} whole: its header {header} wants {expected:,} bytes, it has {size:,}"
        )
    layers = [
        (f"layers.{i}.{name}.weight", shape) for name, shape in per_layer for i in range(n_layers)
    ]
    layout = [*before, *layers, *after]
    data = torch.from_numpy(np.fromfile(path, dtype="<f4", offset=_BIN_HEADER.size))
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


def _bin_layout(
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
