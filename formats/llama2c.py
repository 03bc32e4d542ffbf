"""Read llama2.c's float32 `.bin` files, and write them and the tokenizer.

`read_bin` reads version 0 (legacy) and 1, `write_bin` writes version 0. The layouts are defined by
`export.py` and `tokenizer.py` of github.com/karpathy/llama2.c:

    version 0   7 int32: dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size (negative if the
                output matrix is separate), max_seq_len; then weights and rotary tables
    version 1   "ak42", int32 1, the 7 int32, a byte (1 if tied), zeros up to byte 256; then weights
"""

import math
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch

from utils import InputError, atomic_write

EPS, THETA = 1e-5, 10000.0  # run.c's constants; a .bin records neither
SIZES = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len")
_HEADER = struct.Struct("<7i")
_MAGIC = struct.pack("<I", 0x616B3432)
_TABLES = ("freqs_cos", "freqs_sin")
_OUTSIDE_LAYERS = ("tok_embeddings", "norm", *_TABLES, "output")
_NOT_A_BIN = "is neither a torch file nor a llama2.c .bin"


def read_bin(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return model_args and the weights under CMU names, all views of one array."""
    path = Path(path)
    with open(path, "rb") as file:
        head = file.read(256)
    n_header, version, sizes, is_tied = _parse_header(path, head)
    shapes = shapes_of(version, sizes, is_tied)
    n_numbers = sum(
        math.prod(shape) * (1 if kind in _OUTSIDE_LAYERS else sizes["n_layers"])
        for kind, shape in shapes.items()
    )
    size, expected = path.stat().st_size, n_header + 4 * n_numbers
    if size != expected:  # known before anything is allocated
        raise InputError(
            f"{path}: {_NOT_A_BIN}, or is truncated: its header {tuple(sizes.values())} needs "
            f"{expected:,} bytes, it has {size:,}"
        )
    numbers = torch.from_numpy(np.fromfile(path, dtype="<f4", offset=n_header))
    weights, at = {}, 0
    for kind, shape in shapes.items():
        for name in names_of(kind, sizes["n_layers"]):
            end = at + math.prod(shape)
            if kind not in _TABLES:
                weights[name] = numbers[at:end].view(shape)
            at = end
    return sizes, weights


def sizes_of(config: Any, weights: dict[str, torch.Tensor]) -> dict[str, int]:
    """Return the numbers of a header for a LlamaConfig, whose hidden_dim may be derived."""
    hidden_dim = len(weights["layers.0.feed_forward.w1.weight"])
    return {key: getattr(config, key) for key in SIZES} | {"hidden_dim": hidden_dim}


def write_bin(path: str | os.PathLike, sizes: dict[str, int], weights: dict) -> None:
    """Write a version 0 file of float32 weights under CMU names.

    Without output.weight in `weights` the output layer is tied to the embedding.
    """
    is_tied = "output.weight" not in weights
    head_dim = sizes["dim"] // sizes["n_heads"]
    # In float32 as llama2.c's export.py, so that the file is the published one byte for byte.
    frequencies = 1.0 / THETA ** (torch.arange(0, head_dim, 2).float() / head_dim)  # (D/2,)
    angles = torch.outer(torch.arange(sizes["max_seq_len"]).float(), frequencies)  # (length, D/2)
    weights = {**weights, "freqs_cos.weight": angles.cos(), "freqs_sin.weight": angles.sin()}
    signed = {**sizes, "vocab_size": sizes["vocab_size"] * (1 if is_tied else -1)}
    with atomic_write(path, "wb") as file:
        file.write(_HEADER.pack(*(signed[key] for key in SIZES)))
        for kind in shapes_of(0, sizes, is_tied):
            for name in names_of(kind, sizes["n_layers"]):
                file.write(np.ascontiguousarray(weights[name].numpy(), "<f4"))


def write_tokenizer(path: str | os.PathLike, tokenizer: Any) -> None:
    """Write tokenizer.bin: int32 max_token_length, then each token's float32 score, int32 length
    and bytes. Spaces are plain; bos and eos stand between newlines, as in llama2.c."""
    sp = tokenizer.sp_model
    tokens = [sp.id_to_piece(i).replace("▁", " ") for i in range(len(sp))]
    for i in (tokenizer.bos_id, tokenizer.eos_id):
        tokens[i] = f"\n{tokens[i]}\n"
    encoded = [token.encode() for token in tokens]
    with atomic_write(path, "wb") as file:
        file.write(struct.pack("<i", max(map(len, encoded))))
        for i, token in enumerate(encoded):
            file.write(struct.pack("<fi", sp.get_score(i), len(token)) + token)


def _parse_header(path: Path, head: bytes) -> tuple[int, int, dict[str, int], bool]:
    """Return (bytes of the header, version, sizes, whether the output matrix is tied)."""
    version, start, n_header = 0, 0, _HEADER.size
    if head.startswith(_MAGIC):
        version, start, n_header = int.from_bytes(head[4:8], "little"), 8, 256
        if version != 1:
            reason = f"is a version {version} export of llama2.c, which is not float32"
            raise InputError(f"{path}: {reason}; export it with `--version 0`")
    if len(head) < n_header:
        raise InputError(f"{path}: {_NOT_A_BIN}: it has {len(head)} bytes")
    numbers = _HEADER.unpack_from(head, start)
    sizes = dict(zip(SIZES, numbers, strict=True))
    is_tied = head[start + _HEADER.size] == 1 if version else sizes["vocab_size"] > 0
    if version == 0:
        sizes["vocab_size"] = abs(sizes["vocab_size"])
    n_heads, n_kv_heads = sizes["n_heads"], sizes["n_kv_heads"]
    if min(sizes.values()) < 1 or sizes["dim"] % n_heads or n_heads % n_kv_heads:
        raise InputError(f"{path}: {_NOT_A_BIN}: its header {numbers} describes no model")
    return n_header, version, sizes, is_tied


def shapes_of(version: int, sizes: dict[str, int], is_tied: bool) -> dict[str, tuple[int, ...]]:
    """Return {kind: shape} in the order of a file, which holds a kind of all layers in a row."""
    dim, hidden_dim, _, n_heads, n_kv_heads, vocab_size, length = (sizes[key] for key in SIZES)
    head_dim = dim // n_heads
    shapes: dict[str, tuple[int, ...]] = {
        "tok_embeddings": (vocab_size, dim),
        "attention_norm": (dim,),
        "attention.compute_query": (dim, dim),
        "attention.compute_key": (n_kv_heads * head_dim, dim),
        "attention.compute_value": (n_kv_heads * head_dim, dim),
        "attention.compute_output": (dim, dim),
        "ffn_norm": (dim,),
        "feed_forward.w1": (hidden_dim, dim),
        "feed_forward.w2": (dim, hidden_dim),
        "feed_forward.w3": (hidden_dim, dim),
        "norm": (dim,),
    }
    if version == 0:
        shapes |= dict.fromkeys(_TABLES, (length, head_dim // 2))
    else:  # the norms first
        shapes = dict(sorted(shapes.items(), key=lambda item: not item[0].endswith("norm")))
    return shapes if is_tied else {**shapes, "output": (vocab_size, dim)}


def names_of(kind: str, n_layers: int) -> list[str]:
    if kind in _OUTSIDE_LAYERS:
        return [f"{kind}.weight"]
    return [f"layers.{i}.{kind}.weight" for i in range(n_layers)]
