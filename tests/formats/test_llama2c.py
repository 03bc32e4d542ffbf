"""llama2.c's files, against a writer that follows its export.py and against its published file."""

import itertools
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from conftest import ROOT, random_llama, shared_asset
from formats.checkpoint import read_checkpoint
from formats.llama2c import write_bin, write_tokenizer
from fuzz import bounded_memory
from helpers import assert_same_weights, refusal
from llama import Llama, load_pretrained
from tokenizer import Tokenizer

TINY = {"vocab_size": 16, "dim": 8, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1}
KEYS = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len")


def sizes_of(model: Llama) -> dict[str, int]:
    hidden_dim = model.layers[0].feed_forward.w1.out_features
    return {key: getattr(model.config, key) for key in KEYS} | {"hidden_dim": hidden_dim}


def as_llama2c_writes(model: Llama, version: int, output: Tensor | None = None) -> bytes:
    """Return a file of llama2.c's export.py; `output` is an output matrix of its own."""
    c, layers, sizes = model.config, model.layers, sizes_of(model)
    positions, pairs = np.arange(c.max_seq_len), np.arange(0, c.head_dim, 2)
    angles = np.outer(positions, 10000.0 ** (-pairs / c.head_dim))
    qkvo = [
        getattr(layer.attention, f"compute_{part}").weight
        for part in ("query", "key", "value", "output")
        for layer in layers
    ]
    ffn = [getattr(layer.feed_forward, w).weight for w in ("w1", "w2", "w3") for layer in layers]
    embedding, norm = model.tok_embeddings.weight, model.norm.weight
    norms = [layer.attention_norm.weight for layer in layers]
    ffn_norms = [layer.ffn_norm.weight for layer in layers]
    if version == 0:
        sign = 1 if output is None else -1
        header = struct.pack("<7i", *{**sizes, "vocab_size": sign * c.vocab_size}.values())
        tables = [torch.tensor(np.cos(angles)), torch.tensor(np.sin(angles))]
        parts = [embedding, *norms, *qkvo, *ffn_norms, *ffn, norm, *tables]
    else:
        header = b"24ka" + struct.pack("<i7iB", version, *sizes.values(), output is None)
        header = header.ljust(256, b"\0")
        parts = [*norms, *ffn_norms, norm, embedding, *qkvo, *ffn]
    parts += [] if output is None else [output]
    return header + b"".join(part.detach().numpy().astype("<f4").tobytes() for part in parts)


def refusal_of(content: bytes, path: Path) -> str:
    path.write_bytes(content)
    with bounded_memory(32 * 2**20):
        return refusal(load_pretrained, path)


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "model.bin"


@pytest.fixture
def whole() -> bytes:
    return as_llama2c_writes(random_llama(**TINY), version=0)


SHAPE = {"dim": 24, "hidden_dim": 5, "n_layers": 3, "max_seq_len": 33}  # all sizes differ


@pytest.fixture(params=["tied", "untied"])
def output(request) -> Tensor | None:
    """An output matrix of its own, or none."""
    return torch.randn(320, SHAPE["dim"]) if request.param == "untied" else None


@pytest.mark.parametrize("version", [0, 1])
def test_both_versions_hold_the_same_bits(path, output, version):
    model = random_llama(**SHAPE)
    path.write_bytes(as_llama2c_writes(model, version, output))
    loaded = load_pretrained(path, attention="causal")
    weights = model.state_dict() | ({} if output is None else {"output.weight": output})
    assert_same_weights(loaded.state_dict(), weights)
    assert (loaded.output.weight is loaded.tok_embeddings.weight) == (output is None)
    assert sizes_of(loaded) == sizes_of(model)


def test_what_we_write_is_what_llama2c_writes(path, output):
    model = random_llama(**SHAPE)
    weights = {**model.state_dict(), "output.weight": output}
    if output is None:
        del weights["output.weight"]
    write_bin(path, sizes_of(model), weights)
    written, expected = path.read_bytes(), as_llama2c_writes(model, 0, output)
    assert (written[:28], len(written)) == (expected[:28], len(expected))
    numbers = [np.frombuffer(content[28:], "<f4") for content in (written, expected)]
    np.testing.assert_allclose(*numbers, rtol=0, atol=1e-5)  # the tables are formed in float32


def test_the_published_model_is_the_same_in_both_formats_and_tells_its_story():
    folder = shared_asset("models/stories260K")
    from_pt = load_pretrained(folder / "stories260K.pt", attention="causal")
    from_bin = load_pretrained(folder / "stories260K.bin", attention="causal")
    assert_same_weights(from_bin.state_dict(), from_pt.state_dict())
    assert sum(parameter.numel() for parameter in from_pt.parameters()) == 260_032
    assert from_pt.config.n_kv_heads == from_bin.config.n_kv_heads == 4
    tokenizer = Tokenizer(tokenizer_model=folder / "tok512.model")
    prompt = torch.tensor([tokenizer.encode("Once upon a time", bos=True, eos=False)])
    for model in (from_pt, from_bin):
        told = tokenizer.decode(model.generate(prompt, 45, temperature=0.0)[0].tolist())
        assert told.startswith(
            "Once upon a time, there was a little girl named Lily. "
            "She loved to play outside in the park."
        )


def test_weights_of_a_file_can_be_changed_and_leave_it_alone(path, whole):
    path.write_bytes(whole)
    for tensor in read_checkpoint(path)[1].values():
        tensor.zero_()
    assert path.read_bytes() == whole


# ---------------------------------------------------------------- files that are refused


def test_a_file_cut_off_anywhere_or_too_long_is_refused(path, whole):
    for length in (*range(0, len(whole), 13), len(whole) - 4, len(whole) - 1):
        refusal_of(whole[:length], path)
    message = refusal_of(whole + bytes(4), path)
    assert f"needs {len(whole):,} bytes, it has {len(whole) + 4:,}" in message


@pytest.mark.parametrize(
    ("version", "values", "words"),
    [
        *((0, {key: 0}, "describes no model") for key in KEYS),
        (0, {"n_layers": -1}, "describes no model"),
        (0, {"dim": 9}, "describes no model"),  # not divisible by 2 heads
        (0, {"n_heads": 4, "n_kv_heads": 3}, "describes no model"),
        (0, {"vocab_size": -16}, "needs 5,756 bytes, it has 5,244"),  # an output matrix
        (1, {"vocab_size": -16}, "describes no model"),  # there a byte says so
        *((0, {key: 2**30}, "bytes, it has") for key in ("dim", "n_layers", "max_seq_len")),
        (1, {"vocab_size": 2**30}, "bytes, it has"),
        (1, {"max_seq_len": 2**30}, "max_seq_len=1073741824"),  # there are no tables
    ],
)
def test_a_header_of_no_model_is_refused_before_anything_is_allocated(path, version, values, words):
    content = as_llama2c_writes(random_llama(**TINY), version)
    start = 8 if version else 0
    header = dict(zip(KEYS, struct.unpack_from("<7i", content, start), strict=True)) | values
    changed = content[:start] + struct.pack("<7i", *header.values()) + content[start + 28 :]
    assert words in refusal_of(changed, path)


def test_heads_that_cannot_rotate_are_refused(path):
    # One of everything: embedding, 2 + 7 weights of the layer, last norm, empty tables.
    content = struct.pack("<7i", *[1] * 7) + bytes(4 * (1 + 9 + 1))
    assert "odd head size 1" in refusal_of(content, path)


@pytest.mark.parametrize(("dim", "begin"), [(640, b"\x80\x02"), (60, b"<")])
def test_a_bin_may_begin_with_the_bytes_of_a_pickle_or_of_a_page(path, dim, begin):
    model = random_llama(n_layers=1, vocab_size=16, n_heads=2, dim=dim)
    path.write_bytes(as_llama2c_writes(model, version=0))
    assert path.read_bytes().startswith(begin)
    assert torch.equal(load_pretrained(path).norm.weight, model.norm.weight)


@pytest.mark.parametrize("version", [2, 3])
def test_a_quantized_export_is_told_how_to_export_it_again(path, version):
    message = refusal_of(as_llama2c_writes(random_llama(**TINY), version), path)
    assert message.startswith(f"is a version {version} export")
    assert message.endswith("export it with `--version 0`")


# ---------------------------------------------------------------- tokenizer.bin


def read_tokenizer_bin(path: Path) -> tuple[int, list[tuple[float, bytes]]]:
    """Return (max_token_length, [(score, bytes), ...]) as run.c's build_tokenizer reads them."""
    content = path.read_bytes()
    (longest,) = struct.unpack_from("<i", content)
    at, tokens = 4, []
    while at < len(content):
        score, n = struct.unpack_from("<fi", content, at)
        tokens.append((score, content[at + 8 : at + 8 + n]))
        at += 8 + n
    return longest, tokens


def encode_as_run_c(tokens: list[tuple[float, bytes]], text: str) -> list[int]:
    """bos, a space, the characters or else their bytes; then the best pair at a time."""
    ids = {token: i for i, (_, token) in reversed(list(enumerate(tokens)))}
    found = [1, ids[b" "]] if text else [1]
    for letter in text:
        encoded = letter.encode()
        found += [ids[encoded]] if encoded in ids else [byte + 3 for byte in encoded]
    while True:
        joined = [tokens[a][1] + tokens[b][1] for a, b in itertools.pairwise(found)]
        known = [(tokens[ids[pair]][0], -i) for i, pair in enumerate(joined) if pair in ids]
        if not known:
            return found
        i = -max(known)[1]
        found[i : i + 2] = [ids[joined[i]]]


@pytest.mark.parametrize("name", ["data/mini/tokenizer.model", "models/stories260K/tok512.model"])
def test_run_c_splits_text_by_tokenizer_bin_as_we_do(tmp_path, name):
    find = shared_asset if name.startswith("models") else ROOT.joinpath
    ours = Tokenizer(tokenizer_model=find(name))
    write_tokenizer(tmp_path / "tokenizer.bin", ours)
    longest, tokens = read_tokenizer_bin(tmp_path / "tokenizer.bin")
    assert len(tokens) == ours.n_words
    assert longest == max(len(token) for _, token in tokens)
    assert [token for _, token in tokens[:4]] == [b"<unk>", b"\n<s>\n", b"\n</s>\n", b"<0x00>"]
    for text in ("", "Once upon a time", "a good film, 9 of 10: naïve\n😀"):
        assert encode_as_run_c(tokens, text) == ours.encode(text, bos=True, eos=False)
