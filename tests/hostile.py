"""Builders of hostile files: pickles, torch files, SentencePiece models."""

import io
import os
import pickle
import struct
import zipfile
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import torch

MADE = "made-by-the-file"  # what a pickle would make in the current folder, were it executed


class MakesFolder:
    """Unpickling it runs os.mkdir."""

    def __reduce__(self):
        return os.mkdir, (MADE,)


def torch_file(content: Any, zipped: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def repacked(torch_zip: bytes, replaced: Mapping[str, bytes], deflate: bool = False) -> bytes:
    """Return the same zip with other members; keys are the ends of their names."""
    buffer = io.BytesIO()
    kind = zipfile.ZIP_DEFLATED if deflate else zipfile.ZIP_STORED
    with zipfile.ZipFile(io.BytesIO(torch_zip)) as old, zipfile.ZipFile(buffer, "w", kind) as new:
        for info in old.infolist():
            ends = [end for end in replaced if info.filename.endswith(end)]
            new.writestr(info.filename, replaced[ends[0]] if ends else old.read(info))
    return buffer.getvalue()


@cache
def bomb(megabytes: int, member: str) -> bytes:
    """Return a small torch zip one member of which unpacks to megabytes of zeros."""
    whole = torch_file({"model": {"norm.weight": torch.ones(8)}, "model_args": {}})
    return repacked(whole, {member: bytes(megabytes * 2**20)}, deflate=True)


def legacy_file(content: bytes) -> bytes:
    """Return a torch file of the old form around any pickle."""
    begin = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
    head = b"".join(pickle.dumps(part, protocol=2) for part in begin)
    return head + content + pickle.dumps([], protocol=2)


def text(value: str) -> bytes:
    """Return the instruction that pushes a short text, in a pickle."""
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def varint(number: int) -> bytes:
    number &= 2**64 - 1
    out = b""
    while number > 127:
        out += bytes([number & 127 | 128])
        number >>= 7
    return out + bytes([number])


def field(key: int, value: int | float | bytes) -> bytes:
    """Return one field of a protobuf message."""
    if isinstance(value, float):
        return varint(key << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return varint(key << 3) + varint(value)
    return varint(key << 3 | 2) + varint(len(value)) + value


def sentencepiece_model(
    pieces: Iterable[tuple[bytes, float, int]],
    trainer: Iterable[tuple[int, int | bytes]],
    normalizer: Iterable[tuple[int, int | bytes]],
) -> bytes:
    """Return a ModelProto: pieces (text, score, type), then the two specs as (field, value)."""
    listed = [
        field(1, field(1, text) + field(2, score) + field(3, kind)) for text, score, kind in pieces
    ]
    specs = [b"".join(field(*pair) for pair in spec) for spec in (trainer, normalizer)]
    return b"".join(listed) + field(2, specs[0]) + field(3, specs[1])
