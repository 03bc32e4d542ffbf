"""What the strategies of the fuzz targets share: a small model, odd values, edits of bytes."""

import json
import math
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

from hypothesis import strategies as st

import cli
import hostile
from conftest import random_llama, train_tokenizer
from fuzz import Inputs
from tokenizer import Tokenizer

ODD_INTS = (0, 1, 2, 3, 7, 8, 9, 16, 255, 4096, 2**16, 2**28, 2**30, 2**31 - 1, -1, -8, -(2**31))
ODD_FLOATS = (0.0, -0.0, 0.5, 1.0, 1e-45, 1e38, -1e38, 1e300, math.nan, math.inf, -math.inf)


_HOLDER = tempfile.TemporaryDirectory()  # as long as the process lives


@cache
def assets() -> Path:
    """A folder with a tokenizer and a small model that fits it, made once in a process."""
    folder = Path(_HOLDER.name)
    train_tokenizer(folder)
    model = random_llama(dim=8, n_layers=1, n_heads=2, n_kv_heads=1, scale=1.0)
    content = {"model": model.state_dict(), "model_args": model_args(model)}
    (folder / "model.pt").write_bytes(hostile.torch_file(content))
    (folder / "two.txt").write_text(
        "0 ||| this movie is bad\n1 ||| a good film\n", encoding="utf-8"
    )
    return folder


def model_args(model) -> dict:
    return {key: value for key, value in model.config.to_dict().items() if key != "attention"}


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer(tokenizer_model=assets() / "tokenizer.model")


def guarded(main: Callable[[], int | None]) -> Callable[[], None]:
    return lambda: cli.run(main)


def mutated(whole: bytes) -> st.SearchStrategy[bytes]:
    """`whole` after a few edits; positions near both ends are as likely as all the others."""
    near_end = st.integers(1, min(len(whole), 600)).map(lambda back: len(whole) - back)
    place = st.integers(0, len(whole) - 1) | st.integers(0, min(len(whole) - 1, 64)) | near_end
    kind = st.sampled_from(["set", "set", "flip", "cut", "insert", "truncate", "zero"])
    edit = st.tuples(kind, place, st.binary(min_size=1, max_size=8))
    return st.lists(edit, min_size=1, max_size=4).map(lambda edits: _edited(whole, edits))


def _edited(whole: bytes, edits: list[tuple[str, int, bytes]]) -> bytes:
    for kind, at, value in edits:
        end = at + len(value)
        if kind == "set":
            whole = whole[:at] + value + whole[end:]
        elif kind == "flip":
            whole = (
                whole[:at]
                + bytes(b ^ 1 << value[0] % 8 for b in whole[at : at + 1])
                + whole[at + 1 :]
            )
        elif kind == "cut":
            whole = whole[:at] + whole[end:]
        elif kind == "insert":
            whole = whole[:at] + value + whole[at:]
        elif kind == "zero":
            whole = whole[:at] + bytes(len(value)) + whole[end:]
        else:
            whole = whole[:at]
    return whole


JSON_TEXTS = [
    *(b"[" * 900 + b"]" * 900, b"[" * 100_000, b'{"a":' * 100_000, b'["bad", "good"]'),
    *(b"[1e999, 2]", b"[" + b"9" * 5000 + b"]", b"NaN", b'["\\ud800", "good"]', b""),
    *(b'["bad", "\\udc80\\ud83d"]', b'["\\u0000", "good"]', b'["a\\nb", "good"]', b"\xff[]"),
    json.dumps([f"name {i}" for i in range(30_000)]).encode(),
    json.dumps(["a" * 10**6, "good"]).encode(),
]
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)


def named(strategy: st.SearchStrategy[bytes], *names: str) -> st.SearchStrategy[Inputs]:
    return st.tuples(st.sampled_from(names), strategy).map(lambda pair: {pair[0]: pair[1]})
