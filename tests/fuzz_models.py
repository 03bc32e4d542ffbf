"""Fuzz targets that hold weights: checkpoints of every form, finetuned classifiers."""

import contextlib
import copy
import struct
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import torch
from hypothesis import strategies as st

import hostile
from classifier import LlamaEmbeddingClassifier
from conftest import random_llama
from formats.checkpoint import _count, bin_layout
from fuzz import Inputs
from fuzz_shared import JSON_VALUES, ODD_FLOATS, ODD_INTS, model_args, mutated
from llama import load_pretrained
from training.loop import load_classifier

TINY = {"vocab_size": 16, "dim": 8, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "max_seq_len": 16}
TOKENS = torch.tensor([[1, 2, 3]])

# ---------------------------------------------------------------- checkpoints


def act_model() -> None:
    model = load_pretrained(next(name for name in ("model.pt", "model.bin") if Path(name).exists()))
    if model.config.vocab_size > int(TOKENS.max()):
        model.generate(TOKENS, 2, temperature=1.0)


@cache
def tiny():
    return random_llama(**TINY)


def tiny_content() -> dict:
    return {"model": dict(tiny().state_dict()), "model_args": model_args(tiny())}


def tiny_bin(header: list[int] | None = None, body: bytes | None = None) -> bytes:
    """llama2.c's layout of the tiny model: any order will do, as only sizes and values matter."""
    model = tiny()
    hidden_dim = model.layers[0].feed_forward.w1.out_features
    if header is None:
        header = [8, hidden_dim, 1, 2, 1, 16, 16]
    if body is None:
        weights = {k: v for k, v in model.state_dict().items() if k != "output.weight"}
        numbers = torch.cat(
            [weight.flatten() for weight in weights.values()] + [torch.ones(2 * 16 * 2)]
        )
        body = numbers.numpy().astype("<f4").tobytes()
    return struct.pack("<7i", *header) + body


@cache
def whole_files() -> list[bytes]:
    content = tiny_content()
    return [hostile.torch_file(content), hostile.torch_file(content, zipped=False), tiny_bin()]


ODD_TENSORS: list[Callable[[], object]] = [
    lambda: torch.ones(1).expand(2**31),
    lambda: torch.ones(1, dtype=torch.float16).expand(2**28),
    lambda: torch.ones(1, 1).expand(2**20, 2**20),
    lambda: torch.empty(0, 2**40),
    lambda: torch.empty(0),
    lambda: torch.tensor(1.0),
    lambda: torch.ones(8, 8),
    lambda: torch.ones(8, dtype=torch.int32),
    lambda: torch.ones(8, dtype=torch.bool),
    lambda: torch.ones(8, dtype=torch.complex64),
    lambda: torch.ones(8, dtype=torch.bfloat16),
    lambda: torch.ones(8, device="meta"),
    lambda: torch.ones(8).to_sparse(),
    lambda: torch.nested.nested_tensor([torch.ones(8)]),
    lambda: torch.quantize_per_tensor(torch.ones(8), 0.1, 0, torch.qint8),
    lambda: torch.nn.Parameter(torch.ones(8)),
    lambda: torch.ones(16)[::2],
    lambda: [1.0] * 8,
    lambda: "norm",
    lambda: None,
]
ODD_VALUES = st.one_of(
    st.sampled_from([*ODD_INTS, 2**40, 2**62, 10**100, *ODD_FLOATS]),
    st.sampled_from([None, True, "full", "causal", "a" * 10**5, "\ud800", [1], {"a": 1}, (1, 2)]),
    st.sampled_from(ODD_TENSORS).map(lambda make: make()),
    JSON_VALUES,
)
KEYS = st.sampled_from([*model_args(tiny()), "attention", "rope_theta", "self", "a" * 10**4, "\n"])
STRANGE_NAMES = st.sampled_from(
    [
        *("norm.bias", "layers.1.ffn_norm.weight", "_orig_mod.norm.weight", "freqs_cos", "\ud800"),
        *("layers.0.attention.wq.weight", "layers.99999999999.ffn_norm.weight", "a" * 10**5, ""),
        *(7, ()),
    ]
)


def filled(like: torch.Tensor, value: float) -> torch.Tensor:
    """Float64 holds all of ODD_FLOATS and is read as float32. `like` may itself be a huge view, or
    have no shape."""
    is_plain = not like.is_nested and like.numel() < 10**5
    return torch.full(like.shape if is_plain else (8,), value, dtype=torch.float64)


@st.composite
def model_contents(draw: st.DrawFn) -> dict:
    """The tiny checkpoint with a few of its entries other than they should be."""
    content = tiny_content()
    weights, args = content["model"], content["model_args"]
    names = list(weights)
    for _ in range(draw(st.integers(1, 3))):
        name, other = draw(st.sampled_from(names)), draw(st.sampled_from(names))
        change = draw(st.integers(0, 8))
        if change == 0:
            weights.pop(name, None)
        elif change == 1 and name in weights and other in weights:
            weights[name], weights[other] = weights[other], weights[name]
        elif change == 2:
            weights[draw(STRANGE_NAMES)] = weights.get(name, torch.ones(8))
        elif change == 3 and name in weights:
            weights[name] = filled(tiny().state_dict()[name], draw(st.sampled_from(ODD_FLOATS)))
        elif change == 4:
            weights[name] = draw(st.sampled_from(ODD_TENSORS))()
        elif change == 5:
            args[draw(KEYS)] = draw(ODD_VALUES)
        elif change == 6:
            content[draw(st.sampled_from(["model", "model_args", "optimizer", 3]))] = draw(
                ODD_VALUES
            )
            break
        elif change == 7:
            args["n_layers"] = n = draw(st.sampled_from([50, 1000, 100_000]))
            weights.update(
                {f"layers.{i}.x": weights.get(name, torch.ones(1)) for i in range(min(n, 1000))}
            )
        else:
            content["optimizer"] = draw(st.sampled_from([hostile.MakesFolder(), {"step": 1}]))
    return content


def as_torch_file(content: object, zipped: bool) -> bytes:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return hostile.torch_file(content, zipped)
    except Exception:  # a kind of tensor that the form cannot hold
        return hostile.torch_file(None, zipped)


OPCODES = [
    *(
        b"}",
        b"]",
        b")",
        b"(",
        b"u",
        b"s",
        b"e",
        b"a",
        b"t",
        b"\x85",
        b"\x86",
        b"\x87",
        b"N",
        b"K\1",
    ),
    *(b"\x88", b"q\0", b"h\0", b"q\1", b"h\1", b"R", b"b", b"Q", b"\x81", b".", b"0", b"1", b"2"),
    *(b"J\xff\xff\xff\x7f", b"\x8a\x09" + b"\xff" * 9, b"G" + b"\x7f\xf8" * 4, b"U\4abcd"),
    *(b"X\xff\xff\xff\xff", b"cos\nmkdir\n", b"cposix\nsystem\n", b"cbuiltins\neval\n"),
    *(b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n", b"cbuiltins\nset\n"),
    *(b"cbuiltins\nbytearray\n", b"ctorch\nSize\n", b"ctorch\nFloatStorage\n"),
    b"ccollections\nCounter\n",
    *map(hostile.text, ("model", "model_args", "dim", "storage", "cpu", "0", hostile.MADE)),
]
EVIL = b"\x80\x02cos\nmkdir\n" + hostile.text(hostile.MADE) + b"\x85R."
OPEN = b"\x80\x02}(" + hostile.text("model") + b"}" + hostile.text("model_args") + b"}"
DIM = OPEN + hostile.text("dim")  # then one value, then CLOSE
CLOSE = b"su."
DOUBLINGS = b"".join(b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(40))
NESTED = [
    *(
        OPEN + b")" + b"\x85" * n + b"K\1" + CLOSE for n in (900, 49_000, 10**6)
    ),  # a tuple for a key
    *(DIM + b")" + b"\x85" * n + CLOSE for n in (900, 49_000)),
    *(DIM + b"]" * n + b"a" * (n - 1) + CLOSE for n in (900, 5000, 100_000)),
    DIM + b"]q\0" + DOUBLINGS + CLOSE,  # 2^40 lists, where they are printed
]
PICKLES = st.one_of(
    st.lists(st.sampled_from(OPCODES), max_size=30).map(
        lambda ops: b"\x80\x02" + b"".join(ops) + b"."
    ),
    st.sampled_from([EVIL, *NESTED]),
    mutated(OPEN + b"u."),
)


@st.composite
def model_files(draw: st.DrawFn) -> Inputs:
    kind = draw(st.integers(0, 9))
    name = draw(st.sampled_from(["model.pt", "model.bin"]))
    if kind <= 2:
        return {name: draw(mutated(draw(st.sampled_from(whole_files()))))}
    if kind <= 6:
        return {name: as_torch_file(draw(model_contents()), draw(st.booleans()))}
    content = draw(PICKLES)
    form = draw(st.integers(0, 2))
    if form == 0:
        return {
            name: hostile.repacked(whole_files()[0], {"data.pkl": content}, draw(st.booleans()))
        }
    return {name: hostile.legacy_file(content) if form == 1 else content}


BOMBS = st.one_of(
    st.tuples(
        st.sampled_from([1, 64, 600]),
        st.sampled_from(["data.pkl", "data/0", "version", "byteorder"]),
    ).map(lambda pair: hostile.bomb(*pair)),
    mutated(hostile.bomb(1, "data.pkl")),
).map(lambda content: {"model.pt": content})


@st.composite
def bin_files(draw: st.DrawFn) -> Inputs:
    header = [8, 24, 1, 2, 1, 16, 16]
    for _ in range(draw(st.integers(0, 3))):
        any_int = st.integers(-(2**31), 2**31 - 1)
        header[draw(st.integers(0, 6))] = draw(
            st.sampled_from(ODD_INTS) | any_int | st.integers(1, 20)
        )
    body = tiny_bin()[28:]
    kind = draw(st.integers(0, 4))
    if kind == 1:  # as many bytes as the header asks for
        with contextlib.suppress(ZeroDivisionError):
            before, layer, after = bin_layout(*header)
            wanted = 4 * (_count(before) + header[2] * _count(layer) + _count(after))
            body = (body * 40)[:wanted] if 0 < wanted < 40 * len(body) else body
    elif kind == 2:
        number = struct.pack("<f", draw(st.sampled_from([f for f in ODD_FLOATS if f != 1e300])))
        at = 4 * draw(st.integers(0, len(body) // 4 - 1))
        body = body[:at] + number + body[at + 4 :]
    elif kind == 3:
        body = draw(mutated(body))
    return {"model.bin": tiny_bin(header, body)}


# ---------------------------------------------------------------- a finetuned classifier


@cache
def classifier_content() -> dict:
    config = SimpleNamespace(
        num_labels=2, option="finetune", hidden_dropout_prob=0.3, pretrained_model_path="model.pt"
    )
    model = LlamaEmbeddingClassifier(config, random_llama(**TINY))
    return {
        "model": dict(model.state_dict()),
        "model_args": model.llama.config.to_dict(),
        "model_config": {**vars(config), "pooling": model.pooling},
        "label_names": ["bad", "good"],
    }


@st.composite
def classifier_files(draw: st.DrawFn) -> Inputs:
    content = copy.deepcopy(classifier_content())
    if draw(st.integers(0, 4)) == 0:
        return {"best.pt": draw(mutated(hostile.torch_file(content)))}
    for _ in range(draw(st.integers(1, 3))):
        part = draw(st.sampled_from(list(content)))
        entry = content[part]
        kind = draw(st.integers(0, 5))
        if kind == 0:
            content[part] = draw(ODD_VALUES)
        elif isinstance(entry, dict) and entry:
            key = draw(st.sampled_from(list(entry)))
            if kind == 1:
                del entry[key]
            elif kind == 2:
                entry[draw(st.sampled_from(["x", 7, "\ud800", "attention"]))] = entry[key]
            elif kind == 3 and isinstance(entry[key], torch.Tensor):
                entry[key] = filled(entry[key], draw(st.sampled_from(ODD_FLOATS)))
            else:
                entry[key] = draw(ODD_VALUES)
    return {"best.pt": as_torch_file(content, draw(st.booleans()))}


def act_classifier() -> None:
    model, saved = load_classifier("best.pt")
    str(saved.get("label_names"))
    with torch.no_grad():
        if model.llama.config.max_seq_len >= TOKENS.shape[1] and model.llama.config.vocab_size > 3:
            model(TOKENS, torch.tensor([3]))
