"""Every weight file that occurs in the wild loads exactly, and every other one is named."""

import pickle
import re
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import oracle
from conftest import random_llama, save_llama, shared_asset
from fast.int8 import quantize_model
from formats.checkpoint import read_checkpoint, require_finite
from helpers import assert_same_weights, refusal
from llama import Llama, load_pretrained
from utils import InputError

TOKENS = torch.randint(320, (2, 7), generator=torch.Generator().manual_seed(3))
LLAMA2C = {"query": "wq", "key": "wk", "value": "wv", "output": "wo"}
ONE = {"n_layers": 1}


def llama2c_name(name: str) -> str:
    return re.sub(r"compute_(\w+)", lambda match: LLAMA2C[match[1]], name)


def args_of(model: Llama) -> dict:
    return {key: value for key, value in model.config.to_dict().items() if key != "attention"}


def save(path: Path, model: Llama, weights: dict | None = None, **more) -> Path:
    """Write a checkpoint whose weights, or whole top-level entries, are other than the model's."""
    weights = dict(model.state_dict()) if weights is None else weights
    torch.save({"model": weights, "model_args": args_of(model), **more}, path)
    return path


def refused(path: Path, *saved, **more) -> str:
    """Return what is said of such a checkpoint."""
    return refusal(load_pretrained, save(path, *saved, **more))


def logits_of(model: Llama, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens, targets=tokens)[0]


def assert_loaded(loaded: Llama, weights: dict[str, torch.Tensor]) -> None:
    """It has these weights, and its logits are what float64 NumPy makes of them."""
    assert_same_weights(loaded.state_dict(), weights)
    expected, _ = oracle.forward(weights, loaded.config, TOKENS)
    assert np.abs(logits_of(loaded).numpy() - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "model.pt"


# ---------------------------------------------------------------- names, ties, types


@pytest.mark.parametrize(
    ("prefix", "rename", "zipped"),
    [
        ("", llama2c_name, False),
        ("_orig_mod.", llama2c_name, True),
        ("module.", str, True),
        ("module._orig_mod.", llama2c_name, True),
    ],
)
def test_every_naming_scheme_and_both_torch_formats_load_the_same_model(
    path, rename, prefix, zipped
):
    model = random_llama()
    weights = {prefix + rename(name): tensor for name, tensor in model.state_dict().items()}
    content = {"model": weights, "model_args": args_of(model)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    loaded = load_pretrained(path)
    assert_loaded(loaded, model.state_dict())
    assert loaded.config == model.config


def test_a_file_is_known_by_its_content_and_not_by_its_name(tmp_path):
    model = random_llama()
    assert_loaded(load_pretrained(str(save_llama(model, tmp_path / "a.bin"))), model.state_dict())


def test_one_tensor_under_two_names_is_refused(path):
    model = random_llama()
    weights = {**model.state_dict(), "layers.1.attention.wk.weight": torch.zeros(16, 32)}
    message = refused(path, model, weights)
    assert message == "holds layers.1.attention.compute_key.weight twice, under two names"


@pytest.mark.parametrize("is_stored", [True, False])
def test_an_output_matrix_that_is_absent_or_equals_the_embedding_is_tied_to_it(path, is_stored):
    model = random_llama()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if not is_stored:
        del weights["output.weight"]
    loaded = load_pretrained(save(path, model, weights))
    assert loaded.output.weight is loaded.tok_embeddings.weight
    assert_loaded(loaded, model.state_dict())


def test_an_output_matrix_that_differs_in_one_number_is_kept(path):
    model = random_llama()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights["output.weight"][-1, -1] += 1
    loaded = load_pretrained(save(path, model, weights))
    assert loaded.output.weight is not loaded.tok_embeddings.weight
    assert_loaded(loaded, weights)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_every_precision_becomes_float32(path, dtype):
    model = random_llama()
    weights = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    loaded = load_pretrained(save(path, model, weights))
    assert_loaded(loaded, {name: tensor.float() for name, tensor in weights.items()})


def test_a_loaded_model_is_ready_to_use_and_its_file_stays(path):
    model = random_llama(dropout=0.5)
    save(path, model, optimizer={"step": torch.tensor(3.0)}, iter_num=100_000)
    before = path.read_bytes()
    loaded = load_pretrained(path)
    assert loaded.config == model.config
    assert not any(module.training for module in loaded.modules())
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert torch.equal(logits_of(loaded), logits_of(model))
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.zero_()
    assert path.read_bytes() == before


def test_weights_that_share_memory_are_stepped_once_each(path):
    model = random_llama()
    weights = dict(model.state_dict())
    shared = torch.randn(32)
    weights["layers.0.ffn_norm.weight"] = shared
    weights["layers.1.ffn_norm.weight"] = shared
    weights["norm.weight"] = torch.tensor(2.0).expand(32)  # overlaps itself
    loaded = load_pretrained(save(path, model, weights))
    assert_loaded(loaded, weights)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.add_(1.0)
    for name, tensor in loaded.state_dict().items():
        torch.testing.assert_close(tensor, weights[name] + 1.0)


def test_tables_that_follow_from_the_config_are_ignored(path):
    model = random_llama()
    weights = {
        **model.state_dict(),
        "freqs_cos": torch.ones(96, 4),
        "freqs_sin": torch.ones(96, 4),
        "rope.freqs": torch.ones(4),
        "_orig_mod.layers.1.attention.mask": torch.zeros(1, 1, 96, 96),
    }
    assert_loaded(load_pretrained(save(path, model, weights)), model.state_dict())


@pytest.mark.parametrize("recorded", [None, "full", "causal"])
@pytest.mark.parametrize("asked", [None, "full", "causal"])
def test_attention_is_what_is_asked_else_what_is_recorded_else_full(path, recorded, asked):
    save_llama(random_llama(), path, **({"attention": recorded} if recorded else {}))
    loaded = load_pretrained(path, attention=asked)
    expected = asked or recorded or "full"
    assert loaded.config.attention == expected
    assert torch.equal(logits_of(loaded), logits_of(random_llama(attention=expected)))


def test_other_programs_names_of_model_args_are_known(path):
    model = random_llama(layer_norm_eps=1e-3)
    args = args_of(model)
    args["norm_eps"] = args.pop("layer_norm_eps")  # llama2.c's and Meta's
    args |= {"position_embedding_type": "rotary", "use_cache": True}  # the assignment's, unread
    loaded = load_pretrained(save(path, model, model_args=args))
    assert loaded.config == model.config
    args["layer_norm_eps"] = 1e-5
    assert "norm_eps" in refused(path, model, model_args=args)


def test_read_checkpoint_returns_model_args_as_stored_and_float32_weights_under_cmu_names(path):
    model = random_llama()
    weights = {llama2c_name(name): tensor.half() for name, tensor in model.state_dict().items()}
    model_args, read = read_checkpoint(save(path, model, weights))
    assert model_args == args_of(model)
    rounded = {name: tensor.half().float() for name, tensor in model.state_dict().items()}
    assert_same_weights(read, rounded)


# ---------------------------------------------------------------- int8


def test_an_int8_file_is_read_as_float32_under_any_programs_names(path):
    model = random_llama()
    quantize_model(model)
    weights = model.state_dict()
    _, read = read_checkpoint(save(path, model, {llama2c_name(n): t for n, t in weights.items()}))
    assert read.keys() == random_llama().state_dict().keys()
    for name, tensor in read.items():
        expected = weights[name].double().numpy()
        if name.removesuffix("weight") + "scale" in weights:
            expected *= weights[name.removesuffix("weight") + "scale"].double().numpy()[:, None]
        assert tensor.dtype == torch.float32 and np.array_equal(tensor.numpy(), expected), name
    assert_loaded(load_pretrained(path), read)


@pytest.mark.parametrize(
    "scale", [None, torch.ones(31), torch.ones(32, 1), torch.full((32,), torch.inf)]
)
def test_an_int8_matrix_needs_a_finite_scale_for_each_row(path, scale):
    model = random_llama()
    quantize_model(model)
    weights = model.state_dict()
    weights["layers.0.feed_forward.w2.scale"] = scale
    if scale is None:
        del weights["layers.0.feed_forward.w2.scale"]
    assert refused(path, model, weights) == (
        "layers.0.feed_forward.w2.weight is int8 and needs 32 finite numbers in "
        "layers.0.feed_forward.w2.scale; export the file again"
    )


def test_a_scale_without_int8_and_an_int8_vector_are_refused(path):
    model = random_llama()
    scale, vector = {"norm.scale": torch.ones(32)}, {"norm.weight": torch.ones(32).char()}
    assert refused(path, model, model.state_dict() | scale) == "unexpected: norm.scale"
    message = refused(path, model, model.state_dict() | vector)
    assert message == "norm.weight is not a dense tensor of real numbers"


# ---------------------------------------------------------------- weights that do not fit


def test_every_missing_unexpected_and_misshapen_tensor_is_named_at_once(path):
    model = random_llama()
    weights = {llama2c_name(name): tensor for name, tensor in model.state_dict().items()}
    del weights["tok_embeddings.weight"], weights["layers.0.attention.wv.weight"]
    weights["layers.2.ffn_norm.weight"] = torch.ones(32)
    weights["freqs_cos_2"] = torch.ones(3)
    weights["layers.1.feed_forward.w2.weight"] = torch.ones(32, 7)
    w2 = tuple(model.layers[1].feed_forward.w2.weight.shape)
    assert refused(path, model, weights).split("; ") == [
        "missing: tok_embeddings.weight, layers.0.attention.compute_value.weight",
        "unexpected: layers.2.ffn_norm.weight, freqs_cos_2",
        f"misshapen: layers.1.feed_forward.w2.weight (32, 7) instead of {w2}",
    ]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_tensors_with_nan_or_infinity_are_named(path, value):
    model = random_llama()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name in ("norm.weight", "layers.1.feed_forward.w3.weight"):
        weights[name].view(-1)[-1] = value
    message = refused(path, model, weights)
    assert "infinite numbers in layers.1.feed_forward.w3.weight, norm.weight;" in message
    with pytest.raises(InputError, match=r"in norm\.weight; lower the rate"):
        require_finite({"norm.weight": weights["norm.weight"]}, "lower the rate")
    require_finite({"empty": torch.empty(0), "ones": torch.ones(1)})


@pytest.mark.parametrize(
    ("model_args", "named"),
    [
        ({"n_layers": 3}, ["missing: layers.2.attention_norm.weight"]),
        ({"n_layers": 1}, ["unexpected: layers.1.attention_norm.weight"]),
        ({"n_kv_heads": 4}, ["misshapen", "compute_key.weight (16, 32) instead of (32, 32)"]),
        ({"vocab_size": 2**28}, ["tok_embeddings.weight (320, 32) instead of (268435456, 32)"]),
        ({"vocab_size": 2**45}, ["vocab_size=35184372088832"]),
        ({"n_layers": 2**28}, ["n_layers=268435456"]),
        ({"rope_theta": 10000.0}, ["rope_theta", "10000.0"]),
        ({"bias": False, "self": 1}, ["bias", "self"]),
        ({"dim": torch.tensor(32)}, ["dim=tensor(32)"]),
        ({"n_heads": 5}, ["dim=32", "n_heads=5"]),
        ({"attention": "sliding"}, ["attention='sliding'"]),
        ({1: 2}, ["model_args[1] has no string for a key"]),
    ],
)
def test_model_args_that_describe_another_or_no_model_are_named(path, model_args, named):
    model = random_llama()
    message = refused(path, model, model_args={**args_of(model), **model_args})
    assert all(word in message for word in named)


def test_a_message_stays_short_where_a_file_declares_endless_names(path):
    model = random_llama()
    extra = {"a" * 10**6: torch.ones(1), **{f"x{i}": torch.ones(1) for i in range(60)}}
    message = refused(path, model, {**model.state_dict(), **extra})
    assert message.endswith(" and 11 more")  # and refusal() allows 1000 characters
    torch.save({"a" * 10**6: 1, **{f"x{i}": 1 for i in range(1000)}}, path)
    refusal(load_pretrained, path)


# ---------------------------------------------------------------- files that are no checkpoint


def test_a_missing_file_is_named_with_the_remedy(path):
    with pytest.raises(FileNotFoundError, match=r"setup\.sh") as caught:
        load_pretrained(path)
    assert caught.value.filename == str(path)


def test_a_folder_is_refused(tmp_path):
    assert refusal(load_pretrained, tmp_path) == "is not a file"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty; delete it and download it again"),
        (b"\n  <html>Sign in to continue" + b"." * 5000, "is a text page"),
        (b'{"error": "Repository not found, or access to it is restricted"}', "a text page"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:01ef\nsize 9\n",
            "`git lfs pull`",
        ),
        (b"Not Found", "is neither a torch file nor a llama2.c .bin"),
        (b"PK\x05\x06" + bytes(18), "is neither a torch file nor a llama2.c .bin"),
    ],
)
def test_a_file_of_something_else_is_told_what_it_looks_like(path, content, words):
    path.write_bytes(content)
    assert words in refusal(load_pretrained, path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({}, "has no dict model and no model_args; it holds nothing"),
        ({"model_args": {}}, "has no dict model; it holds model_args"),
        ({"model": {}, "optimizer": {}}, "has no dict model_args; it holds model, optimizer"),
        ({"model": [], "model_args": {}}, "has no dict model; "),
        ({"model": {}, "model_args": None}, "has no dict model_args; "),
        ({"norm.weight": torch.ones(2)}, "is a bare state dict, without the model's sizes; wrap"),
        ({"model": {"norm.weight": [1.0]}, "model_args": {}}, "model['norm.weight'] is not"),
        ({"model": {3: torch.ones(1)}, "model_args": {}}, "model[3] is not a named tensor"),
        (
            {"model": {"a": torch.ones(1).int()}, "model_args": {}},
            "a is not a dense tensor of real",
        ),
        (
            {"model": {"llama.norm.weight": torch.ones(2)}, "model_args": ONE},
            "finetuned classifier",
        ),
        ({"model": {"a": torch.ones(2)}, "model_args": ONE}, "missing: tok_embeddings"),
    ],
)
def test_a_torch_file_of_something_else_is_told_what_it_holds(path, content, words):
    torch.save(content, path)
    assert words in refusal(load_pretrained, path)


# ---------------------------------------------------------------- the published model


class _Sizes(pickle.Unpickler):
    """Reads a torch pickle without tensors: notes how many numbers each storage has."""

    sizes: dict[str, int]

    def find_class(self, module: str, name: str) -> Any:
        return OrderedDict if name == "OrderedDict" else lambda *_: None

    def persistent_load(self, pid: tuple) -> None:
        self.sizes[pid[2]] = pid[4]


def test_a_file_of_the_published_structure_loads(path):
    with open(shared_asset("reference/stories42M-data.pkl"), "rb") as file:
        unpickler = _Sizes(file)
        unpickler.sizes = {}
        unpickler.load()
        file.seek(0)
        rng = np.random.default_rng(0)
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", file.read())
            archive.writestr("archive/byteorder", "little")
            archive.writestr("archive/version", "3\n")
            for key, n in unpickler.sizes.items():
                numbers = rng.standard_normal(n, dtype=np.float32) * 0.02
                archive.writestr(f"archive/data/{key}", numbers.tobytes())
    loaded = load_pretrained(path)
    expected = {"dim": 512, "n_layers": 8, "n_heads": 8, "vocab_size": 32000, "max_seq_len": 1024}
    assert {key: getattr(loaded.config, key) for key in expected} == expected
    assert sum(parameter.numel() for parameter in loaded.parameters()) == 41_689_600 + 16_384_000
    stored = torch.load(path, weights_only=True, mmap=True)["model"]
    assert all(torch.equal(stored[name], w) for name, w in loaded.state_dict().items())
