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


def read_checkpoint(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The LlamaConfig arguments and the float32 CPU weights, under the CMU names, of a file.

    Nothing in the file is executed (`weights_only=True`). Raises FileNotFoundError or a ValueError
    that begins with the file's name.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            2, "no such checkpoint; `bash setup.sh` downloads stories42M.pt", str(path)
        )
    if not path.is_file():
        raise ValueError(f"{path}: is not a file")
    with open(path, "rb") as file:
        head = file.read(512)
    if not head:
        raise ValueError(f"{path}: is empty; delete it and download it again")
    if zipfile.is_zipfile(path) or head.startswith(b"\x80"):  # the zip or a pickle of older torch
        return _read_torch(path)
    if head.startswith(b"PK"):
        raise ValueError(f"{path}: is truncated; delete it and download it again")
    if head.lstrip()[:1] == b"<" or head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path}: is a text page, not a checkpoint; download it again")
    return _read_bin(path)


def load_torch_file(path: str | os.PathLike) -> dict[str, Any]:
    """A dict of plain data from a torch file, on the CPU; a ValueError names the file."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except (
        Exception
    ) as error:  # torch raises RuntimeError, UnpicklingError, EOFError, KeyError, ...
        reason = str(error).strip().split("\n")[0][:200]
        raise ValueError(f"{path}: cannot be read as a checkpoint: {reason}") from error
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
        if not _DERIVED.fullmatch(name):
            weights[name] = tensor.float()
    return {str(key): value for key, value in content["model_args"].items()}, weights


def _cmu_name(name: str) -> str:
    """_orig_mod.layers.0.attention.wq.weight -> layers.0.attention.compute_query.weight"""
    name = name.removeprefix("_orig_mod.")  # left by torch.compile
    return re.sub(r"(?<=\.attention\.)w[qkvo](?=\.)", lambda match: _CMU_NAMES[match[0]], name)


def _read_bin(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    size = path.stat().st_size
    no_checkpoint = f"{path}: is neither a torch file nor a llama2.c .bin"
    if size < _BIN_HEADER.size:
        raise ValueError(f"{no_checkpoint}: it has {size} bytes")
    with open(path, "rb") as file:
        header = _BIN_HEADER.unpack(file.read(_BIN_HEADER.size))
    if header[0] == _VERSIONED_BIN_MAGIC:
        raise ValueError(f"{path}: is a versioned llama2.c export; only the fp32 .bin is read")
    dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, max_seq_len = header
    if min(*header[:5], abs(vocab_size), max_seq_len) < 1 or dim % n_heads or n_heads % n_kv_heads:
        raise ValueError(f"{no_checkpoint}: its first seven numbers {header} describe no model")

    shapes = _bin_layout(*header)
    sizes = [math.prod(shape) for _, shape in shapes]
    expected = _BIN_HEADER.size + 4 * sum(sizes)
    if size != expected:  # known before anything is allocated
        raise ValueError(
            f"{no_checkpoint} whole: its header {header} wants {expected:,} bytes, it has {size:,}"
        )
    data = torch.from_numpy(np.fromfile(path, dtype="<f4", offset=_BIN_HEADER.size))
    weights = {
        name: part.view(shape)
        for (name, shape), part in zip(shapes, torch.split(data, sizes), strict=True)
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


def _bin_layout(
    dim: int,
    hidden_dim: int,
    n_layers: int,
    n_heads: int,
    n_kv_heads: int,
    vocab_size: int,
    max_seq_len: int,
) -> list[tuple[str, tuple[int, ...]]]:
    """(name, shape) of every tensor of a `.bin`, in the order of the file."""
    head_dim = dim // n_heads
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
    layout = [("tok_embeddings.weight", (abs(vocab_size), dim))]
    for name, shape in per_layer:
        layout += [(f"layers.{i}.{name}.weight", shape) for i in range(n_layers)]
    layout += [
        ("norm.weight", (dim,)),
        ("freqs_cos", (max_seq_len, head_dim // 2)),
        ("freqs_sin", (max_seq_len, head_dim // 2)),
    ]
    if vocab_size < 0:
        layout.append(("output.weight", (-vocab_size, dim)))
    return layout
