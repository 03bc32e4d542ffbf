"""What the fuzzer feeds to what: checkpoints, .bin files, data, label names, tokenizers, states."""

import copy
import json
import math
import os
import struct
import tempfile
import warnings
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import strategies as st

import helpers
import hostile
import run_llama
from classifier import LlamaEmbeddingClassifier
from conftest import random_llama, train_tokenizer
from formats import llama2c
from formats.torch_file import load_torch_file
from fuzz import Inputs, Target
from llama import load_pretrained
from tokenizer import Tokenizer
from training.checkpoint import load_classifier, save_classifier
from training.dataset import Example, SentenceDataset, encode_examples
from training.labeled import read_label_names, read_sentences
from training.state import StateFile
from utils import run_script, seed_everything

TINY = {"vocab_size": 16, "dim": 8, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "max_seq_len": 16}
ODD_INTS = (0, 1, 2, 3, 8, 9, 255, 2**16, 2**28, 2**30, 2**31 - 1, -1, -8, -(2**31))
ODD_FLOATS = (0.0, 0.5, 1e-45, 1e38, -1e38, math.nan, math.inf, -math.inf)
ODD_TENSORS = (
    lambda: torch.ones(1).expand(2**31),
    lambda: torch.ones(1, 1).expand(2**20, 2**20),
    lambda: torch.empty(0, 2**40),
    lambda: torch.tensor(1.0),
    lambda: torch.ones(8, 8),
    lambda: torch.ones(8, dtype=torch.int32),
    lambda: torch.ones(8, dtype=torch.complex64),
    lambda: torch.ones(8, dtype=torch.bfloat16),
    lambda: torch.ones(8, device="meta"),
    lambda: torch.ones(8).to_sparse(),
    lambda: torch.nested.nested_tensor([torch.ones(8)]),
    lambda: torch.nn.Parameter(torch.ones(8)),
    lambda: torch.ones(16)[::2],
)
ODD_VALUES = st.one_of(
    st.sampled_from([*ODD_INTS, 2**62, 10**100, *ODD_FLOATS, None, True, "full", "a" * 10**5]),
    st.sampled_from(["\ud800", [1], {"a": 1}, (1, 2), [], {}]).map(copy.copy),  # may be edited
    st.sampled_from(ODD_TENSORS).map(lambda make: make()),
)
ODD_KEYS = st.sampled_from(
    [
        *("norm.bias", "layers.1.ffn_norm.weight", "_orig_mod.norm.weight", "freqs_cos", "\ud800"),
        *("layers.0.attention.wq.weight", "a" * 10**5, "", "attention", "rope_theta", "self", 7),
    ]
)


def mutated(whole: bytes) -> st.SearchStrategy[bytes]:
    """`whole` after a few edits, often near its ends."""
    last = len(whole) - 1
    place = (
        st.integers(0, last) | st.integers(0, min(last, 64)) | st.integers(max(last - 600, 0), last)
    )
    edit = st.tuples(place, st.integers(0, 8), st.binary(max_size=8))  # replaced, by what
    edits = st.lists(edit, min_size=1, max_size=4)
    cut = st.just(len(whole)) | st.just(len(whole)) | place
    return st.tuples(edits, cut).map(lambda drawn: _edited(whole, *drawn))


def _edited(whole: bytes, edits: list[tuple[int, int, bytes]], cut: int) -> bytes:
    for at, n, new in edits:
        whole = whole[:at] + new + whole[at + n :]
    return whole[:cut]


# ---------------------------------------------------------------- torch files


@cache
def tiny() -> Any:
    return random_llama(**TINY)


@cache
def checkpoint() -> dict[str, Any]:
    args = {key: value for key, value in tiny().config.to_dict().items() if key != "attention"}
    return {"model": dict(tiny().state_dict()), "model_args": args}


@cache
def whole_file(make: Any, zipped: bool) -> bytes:
    return hostile.torch_file(make(), zipped)


def as_torch_file(content: Any, zipped: bool) -> bytes:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return hostile.torch_file(content, zipped)
    except Exception:  # a kind of tensor that the form cannot hold
        return hostile.torch_file(None, zipped)


def places(content: Any, way: tuple = ()) -> list[tuple]:
    """The way to every entry of dicts and of the beginnings of lists."""
    items = content.items() if isinstance(content, dict) else []
    items = list(enumerate(content[:4])) if isinstance(content, list) else list(items)
    inner = [place for key, value in items for place in places(value, (*way, key))]
    return [(*way, key) for key, _ in items] + inner


@st.composite
def changed(draw: st.DrawFn, make: Any, depth: int = 9) -> bytes:
    """A torch file of make(), damaged, or with a few entries other than they should be."""
    content = copy.deepcopy(make())
    if draw(st.integers(0, 3)) == 0:
        return draw(mutated(whole_file(make, draw(st.booleans()))))
    for _ in range(draw(st.integers(1, 3))):
        ways = [way for way in places(content) if len(way) <= depth]
        if not ways:
            break
        *way, last = draw(st.sampled_from(ways))
        entry = content
        for key in way:
            entry = entry[key]
        old, kind = entry[last], draw(st.integers(0, 4))
        if kind == 0:
            del entry[last]
        elif kind == 1 and isinstance(entry, dict):
            entry[draw(ODD_KEYS)] = old
        elif kind == 2 and isinstance(old, torch.Tensor) and not old.is_nested:
            shape = old.shape if old.numel() < 10**5 else (8,)
            value = draw(st.sampled_from(ODD_FLOATS))
            entry[last] = torch.full(shape, value, dtype=torch.float64)
        else:
            entry[last] = draw(ODD_VALUES | st.builds(hostile.MakesFolder))
    return as_torch_file(content, draw(st.booleans()))


EVIL = b"\x80\x02cos\nmkdir\n" + hostile.text(hostile.MADE) + b"\x85R."
OPEN = b"\x80\x02}(" + hostile.text("model") + b"}" + hostile.text("model_args") + b"}"
DIM, CLOSE = OPEN + hostile.text("dim"), b"su."
DOUBLINGS = b"".join(b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(40))
OPCODES = (
    *(bytes([code]) for code in b"}])(usaet\x85\x86\x87NRbQ\x81.012\x88"),
    *(b"K\1", b"q\0", b"h\0", b"q\1", b"h\1", b"J\xff\xff\xff\x7f", b"\x8a\x09" + b"\xff" * 9),
    *(b"X\xff\xff\xff\xff", b"cos\nmkdir\n", b"cbuiltins\neval\n", b"cbuiltins\nbytearray\n"),
    *(b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n", b"ctorch\nSize\n"),
    *map(hostile.text, ("model", "model_args", "dim", "storage", "cpu", "0", hostile.MADE)),
)
PICKLES = st.one_of(
    st.lists(st.sampled_from(OPCODES), max_size=30).map(lambda o: b"\x80\x02" + b"".join(o) + b"."),
    st.sampled_from([EVIL, DIM + b"]q\0" + DOUBLINGS + CLOSE]),  # 2^40 lists, were they printed
    st.sampled_from([900, 49_000, 10**6]).map(lambda n: OPEN + b")" + b"\x85" * n + b"K\1" + CLOSE),
    st.sampled_from([900, 100_000]).map(lambda n: DIM + b"]" * n + b"a" * (n - 1) + CLOSE),
    mutated(OPEN + b"u."),
)


@st.composite
def pickles(draw: st.DrawFn) -> bytes:
    content, form = draw(PICKLES), draw(st.integers(0, 2))
    if form == 0:
        whole = whole_file(checkpoint, True)
        return hostile.repacked(whole, {"data.pkl": content}, draw(st.booleans()))
    return hostile.legacy_file(content) if form == 1 else content


BOMBS = st.builds(
    hostile.bomb, st.sampled_from([1, 64]), st.sampled_from(["data.pkl", "data/0", "version"])
)
MODELS = st.one_of(*[changed(checkpoint)] * 6, *[pickles()] * 3, BOMBS)


def read_model() -> None:
    model = load_pretrained("model.pt")
    if model.config.vocab_size > 3:
        model.generate(torch.tensor([[1, 2, 3]]), 2, temperature=1.0)


@cache
def classifier() -> dict[str, Any]:
    config = SimpleNamespace(num_labels=2, option="finetune", hidden_dropout_prob=0.3)
    torch.manual_seed(0)  # of the head
    model = LlamaEmbeddingClassifier(config, random_llama(**TINY))
    with tempfile.TemporaryDirectory() as folder:
        save_classifier(Path(folder, "model.pt"), model, config, label_names=["bad", "good"])
        return load_torch_file(Path(folder, "model.pt"))


def read_classifier() -> None:
    model, saved = load_classifier("model.pt")
    if model.llama.config.vocab_size > 3:
        best = model(torch.tensor([[1, 2, 3]]), lengths=torch.tensor([3])).argmax().item()
        (saved.get("label_names") or range(model.num_labels))[best]


@st.composite
def bin_files(draw: st.DrawFn) -> bytes:
    version, sizes = draw(st.integers(0, 1)), {**dict.fromkeys(llama2c.SIZES, 8), **TINY}
    sizes["hidden_dim"] = tiny().layers[0].feed_forward.w1.out_features
    n_numbers = sum(math.prod(shape) for shape in llama2c.shapes_of(version, sizes, True).values())
    numbers = [0.1] * n_numbers
    if draw(st.booleans()):
        numbers[draw(st.integers(0, n_numbers - 1))] = draw(st.sampled_from(ODD_FLOATS))
    for _ in range(draw(st.integers(0, 2))):
        value = st.sampled_from(ODD_INTS) | st.integers(-(2**31), 2**31 - 1) | st.integers(1, 20)
        sizes[draw(st.sampled_from(llama2c.SIZES))] = draw(value)
    header = struct.pack("<7i", *(sizes[key] for key in llama2c.SIZES))
    if version == 1:
        header = (b"24ka\1\0\0\0" + header + b"\1").ljust(256, b"\0")
    whole = header + struct.pack(f"<{n_numbers}f", *numbers)
    return draw(st.just(whole) | mutated(whole))


@cache
def state() -> dict[str, Any]:
    """The state of a run after its first epoch."""
    home = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            resume(epochs=1, mode="auto")
            return load_torch_file("run.state.pt")
        finally:
            os.chdir(home)


def resume(epochs: int = 2, mode: str = "resume") -> None:
    """On four sentences, in batches of two."""
    seed_everything(0)  # a state holds all generators
    model = helpers.classifier("last", dropout=0.3, attention="causal", **TINY)
    data = SentenceDataset([Example("a", i % 2, [1, 2, 3 + i]) for i in range(4)], pad_id=3)
    state_file = StateFile("run.state.pt", {"lr": 1e-3}, mode)
    helpers.train(model, data, epochs=epochs, batch_size=2, state_file=state_file)


# ---------------------------------------------------------------- text and tokenizers


_HOLDER = tempfile.TemporaryDirectory()  # as long as the process lives


@cache
def sound_tokenizer() -> Path:
    return train_tokenizer(Path(_HOLDER.name))


FRAGMENTS = (
    *(b"0", b"1", b"-1", b"2", b"+1", b"1.0", b"9" * 5000, b"\xd9\xa1", b"good film", b" "),
    *(b" ||| ", b" ||| ", b" ||| ", b"|||", b" |||", b"||| ", b"\t|||\t", b"\n", b"\n", b"\r\n"),
    *(b"\r", b"\x0b", b"\x0c", "\x85\u2028".encode(), b"\0", b"\xed\xa0\x80", b"\xff\xfe"),
    *(b"\xef\xbb\xbf", b"\xc0\x80", "é漢😀".encode(), "0 ||| a".encode("utf-16")),
)
LINES = st.lists(st.sampled_from(FRAGMENTS) | st.binary(max_size=6), max_size=8).map(b"".join)
GOOD_LINES = st.tuples(st.sampled_from([b"0", b"1", b"-1"]), st.text(max_size=8)).map(
    lambda pair: pair[0] + b" ||| " + pair[1].encode("utf-8", "surrogatepass") + b"\n"
)
LONG = st.sampled_from([b"0 ||| " + b"a " * 10**5, b"0 ||| " + b"\0" * 10**5, b"0 ||| a\n" * 10**4])
DATA = st.one_of(*[st.lists(GOOD_LINES | LINES, max_size=6).map(b"".join)] * 50, LONG)
JSON_TEXTS = (
    *(b"[" * 900 + b"]" * 900, b"[" * 100_000, b'{"a":' * 100_000, b'["bad", "good"]', b"NaN"),
    *(b"[" + b"9" * 5000 + b"]", b'["\\ud800", "good"]', b'["a\\nb", "good"]', b"\xff[]", b""),
    json.dumps([f"name {i}" for i in range(30_000)]).encode(),
    json.dumps(["a" * 10**6, "good"]).encode(),
)
NAMES = st.lists(st.text(max_size=5) | st.sampled_from(["bad", "good", " ", "\ud800"]), max_size=5)
LABELS = st.one_of(
    st.sampled_from(JSON_TEXTS),
    NAMES.map(lambda value: json.dumps(value).encode()),
    NAMES.map(lambda value: json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")),
    mutated(b'["bad", "good", "very good"]'),
)


def read_data() -> None:
    rows = read_sentences("toy-dev.txt", 2, unlabeled=True)
    tokenizer = Tokenizer(tokenizer_model=sound_tokenizer())
    examples, _ = encode_examples(rows, tokenizer, max_tokens=64, suffix="Is this movie good?")
    assert len(examples) == len(rows)


def read_labels() -> None:
    run_llama.prompt_suffix(read_label_names("labels.json"))


PIECES = (
    *(b"a", b"b", b"ab", "▁".encode(), "▁a".encode(), b"the", b"th", b"e", b"x" * 300, b"\xff"),
    *(b"\0", b"\xe2\x96", b"", b" ", b"\n", b"<s>", b"<0x00>", b"<0x41>", b"<0xZZ>", b"aaaa"),
)


@st.composite
def tokenizer_files(draw: st.DrawFn) -> bytes:
    """A model of a few pieces that differs from a sound one in a few places."""
    if draw(st.integers(0, 3)) == 0:
        return draw(mutated(sound_tokenizer().read_bytes()))
    pieces = [(b"<unk>", 0.0, 2), (b"<s>", 0.0, 3), (b"</s>", 0.0, 3)]
    pieces += [(b"<0x%02X>" % i, 0.0, 6) for i in range(256)]
    score = st.sampled_from([0.0, -1.0, -2.5, 1e38, -1e38]) | st.floats(width=32)
    odd = st.tuples(st.sampled_from(PIECES) | st.binary(max_size=4), score, st.integers(-1, 8))
    pieces += draw(st.lists(odd, max_size=10))
    for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
        pieces[draw(st.integers(0, len(pieces) - 1))] = draw(odd)
    ids = st.sampled_from([-1, 0, 1, 2, 258, 10**6, 2**31 - 1, -(2**31)])
    words = st.sampled_from([b"", b"<s>", b"a", b"\xff", b"<0x00>"])
    trainer = [(3, draw(st.sampled_from([1, 2, 3, 4, 99]))), (35, draw(st.integers(0, 1)))]
    trainer += draw(st.lists(st.tuples(st.integers(40, 43), ids), max_size=2))
    trainer += draw(st.lists(st.tuples(st.integers(44, 48), words), max_size=2))
    normalizer = [(key, draw(st.integers(0, 1))) for key in (3, 4, 5)]
    if draw(st.booleans()):
        normalizer.append((2, draw(st.binary(max_size=60))))  # a table of normalization
    return hostile.sentencepiece_model(pieces, trainer, normalizer)


def read_tokenizer() -> None:
    loaded = Tokenizer(tokenizer_model="tokenizer.model")
    for text in ("the aaaa ab x", "\0 é漢 \n", "▁" * 50, "a" * 3000, ""):
        ids = loaded.encode(text, bos=True, eos=True)
        assert all(0 <= i < loaded.n_words for i in ids)
        loaded.decode(ids).encode()


def _target(name: str, cases: Any, act: Any, file: str, **more: Any) -> Target:
    def inputs(content: bytes) -> Inputs:
        return {file: content}

    return Target(name, cases.map(inputs), lambda: run_script(act), **more)


TARGETS = {
    target.name: target
    for target in (
        _target("model", MODELS, read_model, "model.pt", words=("logits",), share=4),
        _target("bin", bin_files(), read_model, "model.pt", words=("logits",), share=2),
        _target("classifier", changed(classifier), read_classifier, "model.pt", words=("label",)),
        _target(
            "state", changed(state, depth=1), resume, "run.state.pt", words=("infinite", "loss")
        ),
        _target("data", DATA, read_data, "toy-dev.txt", share=2),
        _target("labels", LABELS, read_labels, "labels.json", words=("label", "question")),
        _target("tokenizer", tokenizer_files(), read_tokenizer, "tokenizer.model", share=2),
    )
}
