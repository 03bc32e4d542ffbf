"""Every weight file that occurs in the wild loads exactly, and every other one is named."""

import contextlib
import pickle
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import oracle
from config import LlamaConfig
from conftest import ROOT, random_llama, save_llama, shared_asset
from formats.checkpoint import load_torch_file, read_checkpoint
from fuzz import bounded_memory
from hostile import MADE, MakesFolder, bomb, legacy_file, repacked, text, torch_file
from llama import Llama, load_pretrained
from tokenizer import Tokenizer
from utils import atomic_write

TOKENS = torch.randint(320, (2, 7), generator=torch.Generator().manual_seed(3))
LLAMA2C = {"query": "wq", "key": "wk", "value": "wv", "output": "wo"}
TINY = {"vocab_size": 16, "dim": 8, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1}


def llama2c_name(name: str) -> str:
    return re.sub(r"compute_(\w+)", lambda match: LLAMA2C[match[1]], name)


def args_of(model: Llama) -> dict:
    return {key: value for key, value in model.config.to_dict().items() if key != "attention"}


def save(path: Path, model: Llama, weights: dict | None = None, **more) -> Path:
    """Writes a checkpoint whose weights, or whole top-level entries, are other than the model's."""
    weights = dict(model.state_dict()) if weights is None else weights
    torch.save({"model": weights, "model_args": args_of(model), **more}, path)
    return path


def logits_of(model: Llama, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens, targets=tokens)[0]


def assert_same_weights(loaded: Llama, expected: dict[str, torch.Tensor]) -> None:
    actual = loaded.state_dict()
    assert actual.keys() == expected.keys()
    assert [name for name in actual if not torch.equal(actual[name], expected[name])] == []


def assert_computes(loaded: Llama, weights: dict[str, torch.Tensor]) -> None:
    """The logits are what float64 NumPy makes of these weights."""
    expected, _ = oracle.forward(weights, loaded.config, TOKENS)
    assert np.abs(logits_of(loaded).numpy() - expected).max() < 1e-5 * np.abs(expected).max()


def refusal(path: Path, read=load_pretrained) -> str:
    """What is said of a bad file, after the file's name, in one line."""
    with pytest.raises(ValueError) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "model.pt"


# ---------------------------------------------------------------- names, ties, types


@pytest.mark.parametrize("rename", [str, llama2c_name])
@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
@pytest.mark.parametrize("zipped", [True, False])
def test_both_naming_schemes_and_both_torch_formats_load_the_same_model(
    path, rename, prefix, zipped
):
    model = random_llama()
    weights = {prefix + rename(name): tensor for name, tensor in model.state_dict().items()}
    torch.save(
        {"model": weights, "model_args": args_of(model)},
        path,
        _use_new_zipfile_serialization=zipped,
    )
    for name in (path, str(path)):
        loaded = load_pretrained(name)
        assert_same_weights(loaded, model.state_dict())
        assert_computes(loaded, model.state_dict())
        assert loaded.config == model.config


def test_a_file_is_known_by_its_content_and_not_by_its_name(tmp_path):
    model = random_llama()
    loaded = load_pretrained(save_llama(model, tmp_path / "weights.bin"))
    assert_same_weights(loaded, model.state_dict())
    loaded = load_pretrained(write_bin(tmp_path / "weights.pt", model))
    assert_same_weights(loaded, model.state_dict())


def test_one_tensor_under_two_names_is_refused(path):
    model = random_llama()
    weights = dict(model.state_dict())
    weights["layers.1.attention.wk.weight"] = torch.zeros(16, 32)
    message = refusal(save(path, model, weights))
    assert "layers.1.attention.compute_key.weight twice" in message


@pytest.mark.parametrize("stored", ["shared", "copied", "absent"])
def test_an_output_matrix_that_is_absent_or_equals_the_embedding_is_tied_to_it(path, stored):
    model = random_llama()
    weights = dict(model.state_dict())
    if stored == "copied":
        weights["output.weight"] = weights["output.weight"].clone()
    elif stored == "absent":
        del weights["output.weight"]
    loaded = load_pretrained(save(path, model, weights))
    assert loaded.output.weight is loaded.tok_embeddings.weight
    assert_same_weights(loaded, model.state_dict())
    assert_computes(loaded, model.state_dict())


def test_an_output_matrix_of_its_own_is_kept(path):
    model = random_llama()
    weights = dict(model.state_dict())
    weights["output.weight"] = torch.randn(320, 32, generator=torch.Generator().manual_seed(9))
    loaded = load_pretrained(save(path, model, weights))
    assert_same_weights(loaded, weights)
    assert_computes(loaded, weights)
    with torch.no_grad():
        logits, hidden = loaded(TOKENS, targets=TOKENS)
    torch.testing.assert_close(logits, hidden @ weights["output.weight"].T)
    assert (logits - logits_of(model)).abs().max() > 1


def test_one_differing_number_unties(path):
    model = random_llama()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights["output.weight"][-1, -1] += 1
    assert_same_weights(load_pretrained(save(path, model, weights)), weights)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_precision_becomes_float32(path, dtype):
    model = random_llama()
    weights = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    loaded = load_pretrained(save(path, model, weights))
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert_same_weights(loaded, {name: tensor.float() for name, tensor in weights.items()})


def test_a_loaded_model_is_ready_to_use(path):
    model = random_llama(dropout=0.5)
    loaded = load_pretrained(save_llama(model, path))
    assert not any(module.training for module in loaded.modules())
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert {parameter.device.type for parameter in loaded.parameters()} == {"cpu"}
    assert torch.equal(logits_of(loaded), logits_of(model))


def test_what_a_training_run_adds_at_the_top_level_is_ignored(path):
    model = random_llama()
    optimizer = torch.optim.AdamW(model.parameters())
    logits, _ = model(TOKENS, targets=TOKENS)
    logits.sum().backward()
    optimizer.step()
    save(
        path,
        model,
        optimizer=optimizer.state_dict(),
        config={"learning_rate": 5e-4, "out_dir": "out"},
        iter_num=100_000,
        best_val_loss=torch.tensor(1.25),
    )
    loaded = load_pretrained(path)
    assert_same_weights(loaded, model.state_dict())
    assert loaded.config == model.config


def test_tables_that_follow_from_the_config_are_ignored(path):
    model = random_llama()
    weights = {
        **model.state_dict(),
        "freqs_cos": torch.ones(96, 4),
        "freqs_sin": torch.ones(96, 4),
        "rope.freqs": torch.ones(4),
        "layers.0.attention.mask": torch.zeros(1, 1, 96, 96),
        "_orig_mod.layers.1.attention.mask": torch.zeros(1, 1, 96, 96),
    }
    assert_same_weights(load_pretrained(save(path, model, weights)), model.state_dict())


@pytest.mark.parametrize("recorded", [None, "full", "causal"])
@pytest.mark.parametrize("asked", [None, "full", "causal"])
def test_attention_is_what_is_asked_else_what_is_recorded_else_full(path, recorded, asked):
    model = random_llama()
    save_llama(model, path, **({"attention": recorded} if recorded else {}))
    loaded = load_pretrained(path, attention=asked)
    expected = asked or recorded or "full"
    assert loaded.config.attention == expected
    assert torch.equal(logits_of(loaded), logits_of(random_llama(attention=expected)))


def test_read_checkpoint_returns_model_args_as_stored_and_float32_weights_under_cmu_names(path):
    model = random_llama()
    weights = {llama2c_name(name): tensor.half() for name, tensor in model.state_dict().items()}
    model_args, read = read_checkpoint(save(path, model, weights))
    assert model_args == args_of(model)
    assert read.keys() == model.state_dict().keys()
    for name, tensor in read.items():
        assert torch.equal(tensor, weights[llama2c_name(name)].float())
        assert (tensor.dtype, tensor.device.type) == (torch.float32, "cpu")


# ---------------------------------------------------------------- weights that do not fit


def test_every_missing_unexpected_and_misshapen_tensor_is_named_at_once(path):
    model = random_llama()
    weights = {llama2c_name(name): tensor for name, tensor in model.state_dict().items()}
    del weights["layers.0.attention.wv.weight"], weights["norm.weight"]
    weights["layers.2.ffn_norm.weight"] = torch.ones(32)
    weights["freqs_cos_2"] = torch.ones(3)
    weights["layers.1.feed_forward.w2.weight"] = torch.ones(32, 7)
    weights["layers.0.attention_norm.weight"] = torch.ones(1, 32)
    w2 = tuple(model.layers[1].feed_forward.w2.weight.shape)
    assert refusal(save(path, model, weights)).split("; ") == [
        "missing: layers.0.attention.compute_value.weight, norm.weight",
        "unexpected: layers.2.ffn_norm.weight, freqs_cos_2",
        "misshapen: layers.0.attention_norm.weight (1, 32) instead of (32,), "
        f"layers.1.feed_forward.w2.weight (32, 7) instead of {w2}",
    ]


@pytest.mark.parametrize("name", list(random_llama().state_dict()))
def test_no_tensor_but_a_tied_output_may_be_missing(path, name):
    model = random_llama()
    weights = dict(model.state_dict())
    del weights[name]
    save(path, model, weights)
    if name == "output.weight":
        assert_same_weights(load_pretrained(path), model.state_dict())
    else:
        assert refusal(path) == f"missing: {name}"


@pytest.mark.parametrize(
    ("model_args", "named"),
    [
        ({"n_layers": 3}, ["missing: layers.2.attention_norm.weight"]),
        ({"n_layers": 1}, ["unexpected: layers.1.attention_norm.weight"]),
        ({"n_kv_heads": 4}, ["misshapen", "compute_key.weight (16, 32) instead of (32, 32)"]),
        ({"vocab_size": 319}, ["tok_embeddings.weight (320, 32) instead of (319, 32)"]),
        ({"rope_theta": 10000.0}, ["rope_theta=10000.0"]),
        ({"norm_eps": 1e-5, "bias": False}, ["norm_eps=1e-05", "bias=False"]),
        ({"dim": 32.0}, ["dim=32.0"]),
        ({"dim": torch.tensor(32)}, ["dim=tensor(32)"]),
        ({"n_heads": 5}, ["dim=32", "n_heads=5"]),
        ({"attention": "sliding"}, ["attention='sliding'"]),
        ({"dropout": float("nan")}, ["dropout=nan"]),
        ({1: 2}, ["model_args[1] has no string for a key"]),
    ],
)
def test_model_args_that_describe_another_or_no_model_are_named(path, model_args, named):
    model = random_llama()
    save(path, model, model_args={**args_of(model), **model_args})
    message = refusal(path)
    assert [word for word in named if word not in message] == []


def test_an_attention_mode_that_does_not_exist_is_refused(path):
    save_llama(random_llama(), path)
    with pytest.raises(ValueError, match=r"model\.pt: attention='sliding'"):
        load_pretrained(path, attention="sliding")


# ---------------------------------------------------------------- files that are no checkpoint


def test_a_missing_file_is_named_with_the_remedy(path):
    for read in (load_pretrained, read_checkpoint):
        with pytest.raises(FileNotFoundError, match=r"setup\.sh") as caught:
            read(path)
        assert caught.value.filename == str(path)
    with pytest.raises(FileNotFoundError) as caught:
        load_torch_file(path)
    assert str(caught.value.filename) == str(path)


def test_a_folder_is_refused(tmp_path):
    assert "is not a file" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty; delete it and download it again"),
        (b"<!DOCTYPE html>\n<html><title>404</title></html>", "is a text page"),
        (b"\n  <html>Sign in to continue" + b"." * 5000, "is a text page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "is a text page"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0123456789abcdef\nsize 9\n",
            "is a text page",
        ),
        (b"Not Found", "neither a torch file nor a llama2.c .bin"),
        (b'{"error": "Repository not found, or access to it is restricted"}', "a text page"),
        (b"\x00", "neither"),
        (bytes(27), "neither"),
        (bytes(28), "neither"),
        (bytes(5000), "neither"),
        (b"PK\x05\x06" + bytes(18), "cannot be read as a checkpoint"),  # an empty zip
    ],
)
def test_a_file_of_something_else_is_told_what_it_looks_like(path, content, words):
    path.write_bytes(content)
    assert words in refusal(path)
    assert words in refusal(path, read_checkpoint)


@pytest.mark.parametrize("protocol", [0, 2, pickle.HIGHEST_PROTOCOL])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_that_torch_did_not_write_is_refused(path, protocol):
    path.write_bytes(pickle.dumps({"model": {}, "model_args": {}}, protocol=protocol))
    refusal(path)
    path.write_bytes(path.read_bytes()[:2])
    refusal(path)


@pytest.mark.parametrize("seed", range(20))
def test_random_bytes_are_refused(path, seed):
    path.write_bytes(np.random.default_rng(seed).bytes(3000))
    refusal(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_cut_off_anywhere_is_refused(path, zipped):
    model = random_llama(**TINY)
    content = {"model": model.state_dict(), "model_args": args_of(model)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    cuts = {*np.linspace(0, len(whole), 20, endpoint=False, dtype=int).tolist(), 1, 3, 27, 28}
    for length in sorted({*cuts, len(whole) - 22, len(whole) - 1}):
        path.write_bytes(whole[:length])
        message = refusal(path)
        if zipped and length > 4:
            assert message == "is truncated; delete it and download it again"
    path.write_bytes(whole)
    assert_same_weights(load_pretrained(path), model.state_dict())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([], "holds a list, not a checkpoint's dict"),
        (torch.zeros(3), "holds a Tensor"),
        (None, "holds a NoneType"),
        ({}, "has no dict model and no model_args; it holds nothing"),
        ({"model_args": {}}, "has no dict model; it holds model_args"),
        ({"model": {}, "optimizer": {}}, "has no dict model_args; it holds model, optimizer"),
        ({"model": [], "model_args": {}}, "has no dict model; "),
        ({"model": {}, "model_args": None}, "has no dict model_args; "),
        ({"norm.weight": torch.ones(2), 7: 1}, "model_args; it holds norm.weight, 7"),
        ({"model": {"norm.weight": [1.0]}, "model_args": {}}, "model['norm.weight'] is not"),
        ({"model": {3: torch.ones(1)}, "model_args": {}}, "model[3] is not a named tensor"),
        (
            {"model": {"llama.norm.weight": torch.ones(2)}, "model_args": {}},
            "is a finetuned classifier, not a pretrained Llama; --option predict",
        ),
        ({"model": {}, "model_args": {}}, "missing: tok_embeddings.weight"),
    ],
)
def test_a_torch_file_of_something_else_is_told_what_it_holds(path, content, words):
    torch.save(content, path)
    assert words in refusal(path)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("vocab_size", 2**28, "misshapen: tok_embeddings.weight"),
        ("vocab_size", 2**45, "vocab_size=35184372088832 exceeds 268435456"),
        ("n_layers", 2**28, "n_layers=268435456 but only"),
        ("self", 1, "unknown LlamaConfig key: self=1"),
    ],
)
def test_absurd_model_args_are_refused_before_a_model_is_made(path, key, value, words):
    model = random_llama()
    save(path, model)
    content = torch.load(path, weights_only=True)
    content["model_args"][key] = value
    torch.save(content, path)
    assert words in refusal(path)


def test_model_args_that_only_the_assignments_config_has_are_ignored(path):
    model = random_llama()
    extra = {"position_embedding_type": "rotary", "use_cache": True}
    torch.save({"model": model.state_dict(), "model_args": {**args_of(model), **extra}}, path)
    assert_same_weights(load_pretrained(path), model.state_dict())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.ones(32, device="meta"),
        lambda: torch.ones(32).to_sparse(),
        lambda: torch.ones(32, dtype=torch.complex64),
        lambda: torch.ones(32, dtype=torch.int64),
        lambda: torch.nested.nested_tensor([torch.ones(32)]),
    ],
    ids=["meta", "sparse", "complex", "integer", "nested"],
)
def test_a_tensor_that_is_no_dense_real_array_is_named(path, make):
    model = random_llama()
    save(path, model, {**model.state_dict(), "norm.weight": make()})
    assert "norm.weight is no dense tensor of real numbers" in refusal(path)


# ---------------------------------------------------------------- small files that ask for much


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(2**31,), (2**15, 2**15)])
def test_a_tensor_that_repeats_its_numbers_is_refused_before_it_is_copied(path, dtype, shape):
    weights = {**random_llama(**TINY).state_dict(), "norm.weight": torch.ones(1, dtype=dtype)}
    weights["norm.weight"] = weights["norm.weight"].expand(shape)
    save(path, random_llama(**TINY), weights)
    with little_memory(32 * 2**20):
        message = refusal(path)
    assert re.fullmatch("declares tensors of [0-9,]+ bytes, it has [0-9,]+", message)


def test_a_wrong_escape_in_a_pickle_is_no_warning(path):
    path.write_bytes(repacked(torch_file({}), {"data.pkl": b"S'\\='\n."}))
    assert "cannot be read as a checkpoint" in refusal(path)  # and warnings fail a test


@pytest.mark.parametrize("member", ["data.pkl", "data/0"])
def test_a_zip_that_unpacks_to_more_than_it_is_is_refused_unread(path, member):
    path.write_bytes(bomb(200, member))
    assert path.stat().st_size < 2**20
    with little_memory(32 * 2**20):
        message = refusal(path)
    assert message.startswith("unpacks to 209,7")


@pytest.mark.parametrize("form", ["zip", "legacy"])
@pytest.mark.parametrize("n", [60_000, 1_000_000])
def test_tuples_within_tuples_that_would_crash_python_are_refused(path, form, n):
    key = b")" + b"\x85" * n
    content = b"\x80\x02}(" + text("model") + b"}" + text("model_args") + b"}" + key + b"K\1su."
    whole = torch_file({})
    path.write_bytes(
        repacked(whole, {"data.pkl": content}) if form == "zip" else legacy_file(content)
    )
    done = subprocess.run(  # of its own, as it would crash
        [sys.executable, "-c", "import sys, llama; llama.load_pretrained(sys.argv[1])", path],
        cwd=ROOT,
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 1
    assert "ValueError" in done.stderr and "cannot be read as a checkpoint" in done.stderr


def test_a_zip_whose_end_names_several_disks_is_damaged(path):
    whole = save(path, random_llama(**TINY)).read_bytes()
    end = whole.rindex(b"PK\x05\x06")
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 7, 0, 7)
    path.write_bytes(whole[:end] + locator + whole[end:])
    assert "cannot be read as a checkpoint" in refusal(path)


def test_many_layers_declared_by_many_tensors_are_refused_before_a_model_is_made(path):
    model = random_llama(**TINY)
    weights = {**model.state_dict(), **{f"x{i}": model.norm.weight for i in range(5000)}}
    save(path, model, weights, model_args={**args_of(model), "n_layers": 5900})
    assert refusal(path) == "n_layers=5900 but only 5012 tensors"


def test_a_message_lists_at_most_fifty_names_and_cuts_them(path):
    model = random_llama(**TINY)
    save(path, model, {**model.state_dict(), "a" * 10**6: torch.ones(1)})
    assert len(refusal(path)) < 200
    save(path, model, {**model.state_dict(), **{f"x{i}": torch.ones(1) for i in range(60)}})
    message = refusal(path)
    assert "x49" in message and message.endswith(" and 10 more")
    torch.save({"a" * 10**6: 1, **{f"x{i}": 1 for i in range(1000)}}, path)
    assert len(refusal(path)) < 1000


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_nothing_in_a_file_is_executed(path, tmp_path, monkeypatch, form):
    monkeypatch.chdir(tmp_path)
    folder = Path(MADE)
    model = random_llama()
    content = {"model": model.state_dict(), "model_args": args_of(model)}
    content["optimizer"] = MakesFolder()
    if form == "pickle":
        path.write_bytes(pickle.dumps(MakesFolder(), protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    for read in (load_pretrained, read_checkpoint, load_torch_file):
        assert "weights_only" not in refusal(path, read)  # torch advises to switch it off
        assert not folder.exists()
    if form == "pickle":
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert folder.is_dir()  # the trap is real


# ---------------------------------------------------------------- llama2.c's .bin


def bin_header(model: Llama, untied: bool = False) -> list[int]:
    c, hidden_dim = model.config, model.layers[0].feed_forward.w1.out_features
    vocab_size = -c.vocab_size if untied else c.vocab_size
    return [c.dim, hidden_dim, c.n_layers, c.n_heads, c.n_kv_heads, vocab_size, c.max_seq_len]


def write_bin(path: Path, model: Llama, output: torch.Tensor | None = None) -> Path:
    """As llama2.c's legacy export does: header, embedding, each kind of matrix, tables, output."""
    c = model.config
    angles = np.outer(
        np.arange(c.max_seq_len), 10000.0 ** (-np.arange(0, c.head_dim, 2) / c.head_dim)
    )
    parts = [model.tok_embeddings.weight]
    parts += [layer.attention_norm.weight for layer in model.layers]
    parts += [layer.attention.compute_query.weight for layer in model.layers]
    parts += [layer.attention.compute_key.weight for layer in model.layers]
    parts += [layer.attention.compute_value.weight for layer in model.layers]
    parts += [layer.attention.compute_output.weight for layer in model.layers]
    parts += [layer.ffn_norm.weight for layer in model.layers]
    parts += [layer.feed_forward.w1.weight for layer in model.layers]
    parts += [layer.feed_forward.w2.weight for layer in model.layers]
    parts += [layer.feed_forward.w3.weight for layer in model.layers]
    parts += [model.norm.weight, torch.tensor(np.cos(angles)), torch.tensor(np.sin(angles))]
    if output is not None:
        parts.append(output)
    with open(path, "wb") as file:
        file.write(struct.pack("<7i", *bin_header(model, untied=output is not None)))
        for part in parts:
            file.write(part.detach().numpy().astype("<f4").tobytes())
    return path


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"n_kv_heads": 4, "n_layers": 3, "max_seq_len": 33},
        {"dim": 64, "n_heads": 8, "n_kv_heads": 1},
        {"hidden_dim": 5},
    ],
)
@pytest.mark.parametrize("untied", [False, True])
def test_a_bin_file_holds_the_same_bits(tmp_path, shape, untied):
    model = random_llama(**shape)
    weights = dict(model.state_dict())
    if untied:
        generator = torch.Generator().manual_seed(4)
        weights["output.weight"] = torch.randn(320, model.config.dim, generator=generator)
    path = write_bin(tmp_path / "model.bin", model, weights["output.weight"] if untied else None)
    loaded = load_pretrained(path, attention="causal")
    assert_same_weights(loaded, weights)
    assert (loaded.output.weight is loaded.tok_embeddings.weight) == (not untied)
    for key in ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len"):
        assert getattr(loaded.config, key) == getattr(model.config, key)
    assert_computes(loaded, weights)


def test_weights_of_a_bin_file_can_be_trained_and_leave_the_file_alone(tmp_path):
    path = write_bin(tmp_path / "model.bin", random_llama(**TINY))
    before = path.read_bytes()
    _, weights = read_checkpoint(path)
    for tensor in weights.values():
        tensor.zero_()
    assert path.read_bytes() == before


@pytest.mark.parametrize("change", [-4, -1, 1, 4])
def test_a_bin_file_of_another_length_is_refused_with_both_lengths(tmp_path, change):
    path = write_bin(tmp_path / "model.bin", random_llama(**TINY))
    whole = path.read_bytes()
    path.write_bytes((whole + bytes(4))[: len(whole) + change])
    message = refusal(path)
    assert f"wants {len(whole):,} bytes, it has {len(whole) + change:,}" in message


def test_a_bin_file_cut_off_anywhere_is_refused(tmp_path):
    path = write_bin(tmp_path / "model.bin", random_llama(**TINY))
    whole = path.read_bytes()
    for length in np.linspace(0, len(whole), 20, endpoint=False, dtype=int).tolist():
        path.write_bytes(whole[:length])
        refusal(path)


def test_the_sign_of_the_vocabulary_says_whether_there_is_an_output_matrix(tmp_path):
    model = random_llama(**TINY)
    path = write_bin(tmp_path / "model.bin", model)
    body = path.read_bytes()[28:]
    path.write_bytes(struct.pack("<7i", *bin_header(model, untied=True)) + body)
    n_bytes = 28 + len(body)
    assert f"wants {n_bytes + 4 * 16 * 8:,} bytes, it has {n_bytes:,}" in refusal(path)


HEADER_KEYS = (
    "dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len",
)  # fmt: skip


def with_header(path: Path, **values: int) -> Path:
    """A `.bin` whose body belongs to TINY and whose header says something else."""
    model = random_llama(**TINY)
    header = dict(zip(HEADER_KEYS, bin_header(model), strict=True))
    body = write_bin(path, model).read_bytes()[28:]
    path.write_bytes(struct.pack("<7i", *{**header, **values}.values()) + body)
    return path


@pytest.mark.parametrize(
    "values",
    [
        *({key: 0} for key in HEADER_KEYS),
        *({key: -1} for key in HEADER_KEYS if key != "vocab_size"),
        {"dim": 9},  # not divisible by 2 heads
        {"n_heads": 4, "n_kv_heads": 3},
        {"max_seq_len": -(2**31)},
    ],
)
def test_a_header_that_describes_no_model_is_shown(tmp_path, values):
    path = with_header(tmp_path / "model.bin", **values)
    message = refusal(path)
    header = struct.unpack("<7i", path.read_bytes()[:28])
    assert "neither a torch file nor a llama2.c .bin" in message
    assert message.endswith(f"{header} describe no model")


def test_heads_that_cannot_rotate_are_refused(tmp_path):
    path = tmp_path / "model.bin"
    # One of everything: embedding, 2 + 7 weights of the layer, last norm, empty tables.
    path.write_bytes(struct.pack("<7i", *[1] * 7) + bytes(4 * (1 + 9 + 1)))
    assert "head size 1, which is odd" in refusal(path)


@contextlib.contextmanager
def little_memory(n_bytes: int):
    """Whoever allocates more than this gets a MemoryError."""
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs /proc to know how much is in use")
    with bounded_memory(n_bytes):
        yield


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    "absurd",
    [["dim"], ["hidden_dim"], ["n_layers"], ["vocab_size"], ["max_seq_len"], ["dim", "vocab_size"]],
)
def test_absurd_sizes_are_refused_before_anything_is_allocated(tmp_path, absurd, sign):
    values = {"vocab_size": sign * TINY["vocab_size"]}
    values |= {key: 2**30 * (sign if key == "vocab_size" else 1) for key in absurd}
    path = with_header(tmp_path / "model.bin", **values)
    with little_memory(32 * 2**20):
        message = refusal(path)
    assert f"bytes, it has {path.stat().st_size:,}" in message


@pytest.mark.parametrize("shape", [{"dim": 128}, {"dim": 640}, {"dim": 60, "n_heads": 6}])
def test_a_bin_may_begin_with_the_bytes_of_a_pickle_or_of_a_page(tmp_path, shape):
    model = random_llama(n_layers=1, vocab_size=16, **shape)
    path = write_bin(tmp_path / "model.bin", model)
    assert path.read_bytes()[:1] in (b"\x80", b"<")
    assert_same_weights(load_pretrained(path), model.state_dict())


def test_a_versioned_export_is_called_by_its_name(tmp_path):
    path = with_header(tmp_path / "model.bin", dim=0x616B3432)
    assert path.read_bytes()[:4] == b"24ka"  # "ak42" as a little-endian number
    assert "versioned llama2.c export; only the fp32 .bin is read" in refusal(path)


# ---------------------------------------------------------------- real and real-sized models


def test_the_real_model_is_the_same_in_both_formats_and_tells_its_story():
    folder = shared_asset("models/stories260K")
    from_pt = load_pretrained(folder / "stories260K.pt", attention="causal")
    from_bin = load_pretrained(folder / "stories260K.bin", attention="causal")
    assert_same_weights(from_bin, from_pt.state_dict())
    assert sum(parameter.numel() for parameter in from_pt.parameters()) == 260_032
    assert from_pt.config.n_kv_heads == from_bin.config.n_kv_heads == 4
    tokenizer = Tokenizer(tokenizer_model=folder / "tok512.model")
    prompt = torch.tensor([tokenizer.encode("Once upon a time", bos=True, eos=False)])
    for model in (from_pt, from_bin):
        text = tokenizer.decode(model.generate(prompt, 45, temperature=0.0)[0].tolist())
        assert text.startswith(
            "Once upon a time, there was a little girl named Lily. "
            "She loved to play outside in the park."
        )


def test_a_model_of_the_published_shape_loads_under_both_naming_schemes(tmp_path):
    path = tmp_path / "stories42M.pt"
    with torch.device("meta"):
        shapes = Llama(LlamaConfig()).state_dict()
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.empty(tensor.shape, dtype=torch.float16).normal_(0, 0.02, generator=generator)
        for name, tensor in shapes.items()
        if name != "output.weight"
    }
    embedding = weights["tok_embeddings.weight"]
    tokens = torch.tensor([[1, 31999, 500, 3, 17]])
    model_args = {"dim": 512, "n_layers": 8, "n_heads": 8, "n_kv_heads": 8, "vocab_size": 32000}
    model_args |= {"multiple_of": 32, "max_seq_len": 1024, "dropout": 0.0}

    def load(named: dict[str, torch.Tensor]) -> Llama:
        torch.save({"model": named, "model_args": model_args}, path)
        try:
            return load_pretrained(path)
        finally:
            path.unlink()

    # The two published files: CMU's with an output matrix of its own, llama2.c's with a shared one.
    logits = logits_of(load({**weights, "output.weight": embedding.clone()}), tokens)
    llama2c = {llama2c_name(name): tensor for name, tensor in weights.items()}
    loaded = load({**llama2c, "output.weight": embedding})
    assert torch.equal(logits_of(loaded, tokens), logits)
    assert loaded.output.weight is loaded.tok_embeddings.weight
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, weights.get(name, embedding).float())

    del llama2c["layers.3.attention.wk.weight"]
    with pytest.raises(ValueError) as caught:
        load(llama2c)
    assert str(caught.value) == f"{path}: missing: layers.3.attention.compute_key.weight"


def test_a_loaded_model_outlives_a_replaced_file(tmp_path):
    model = random_llama()
    path = save_llama(model, tmp_path / "model.pt")
    loaded = load_pretrained(path)
    with atomic_write(path, "wb") as file:
        file.write(b"something else")
    path.unlink()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_training_a_loaded_model_leaves_its_file_alone(tmp_path):
    path = save_llama(random_llama(), tmp_path / "model.pt")
    before = path.read_bytes()
    with torch.no_grad():
        for parameter in load_pretrained(path).parameters():
            parameter.zero_()
    assert path.read_bytes() == before
