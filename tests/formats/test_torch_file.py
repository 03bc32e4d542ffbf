"""Torch files: what is refused, in one line, before it costs memory; and nothing is executed."""

import argparse
import os
import pickle
import random
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from conftest import ROOT, random_llama, save_llama
from formats.checkpoint import read_checkpoint
from formats.torch_file import listed, load_torch_file, save_torch_file
from fuzz import bounded_memory
from helpers import assert_same_weights, refusal
from hostile import MADE, MakesFolder, bomb, legacy_file, repacked, text, torch_file
from llama import load_pretrained

TINY = {"vocab_size": 16, "dim": 8, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1}


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "model.pt"


def test_what_is_saved_is_loaded_again(path):
    content = {"model": {"a": torch.randn(3, 4).half()}, "n": [1, (2.5, None)], "s": "text"}
    save_torch_file(path, content)
    loaded = load_torch_file(path)
    assert torch.equal(loaded["model"]["a"], content["model"]["a"])
    assert (loaded["n"], loaded["s"]) == (content["n"], content["s"])


def test_a_failed_save_leaves_the_old_file_and_no_other(path):
    save_torch_file(path, {"n": 1})
    with pytest.raises((AttributeError, pickle.PicklingError)):
        save_torch_file(path, {"n": lambda: 1})
    assert load_torch_file(path) == {"n": 1}
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_ctrl_c_in_the_middle_of_a_save_stays_ctrl_c(path, monkeypatch):
    def save(_content, _file):
        try:
            raise KeyboardInterrupt
        finally:  # as torch's writer, which cannot end a half-written file
            raise RuntimeError("unexpected pos 51784512 vs 51784400")

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(KeyboardInterrupt):
        save_torch_file(path, {"n": 1})
    assert not path.exists()


def test_a_missing_file_is_an_oserror_with_its_name(path):
    with pytest.raises(FileNotFoundError) as caught:
        load_torch_file(path)
    assert str(caught.value.filename) == str(path)


def test_loaded_tensors_do_not_depend_on_the_file_any_more(path):
    model = random_llama()
    loaded = load_pretrained(save_llama(model, path))
    os.truncate(path, 100)  # in place, as `cp` does
    assert_same_weights(loaded.state_dict(), model.state_dict())


def test_content_other_than_a_dict_is_named(path):
    torch.save([torch.zeros(3)], path)
    assert refusal(load_torch_file, path) == "holds a list, not a checkpoint's dict"


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80", b"\x80\x02}.", bytes(5000)])
def test_what_torch_did_not_write_is_refused(path, content):
    path.write_bytes(content)
    refusal(load_torch_file, path)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_cut_off_at_any_byte_is_refused_in_one_line(path, zipped):
    model = random_llama(**{**TINY, "vocab_size": 3, "dim": 4, "hidden_dim": 1, "max_seq_len": 2})
    args = {key: value for key, value in model.config.to_dict().items() if key != "attention"}
    whole = torch_file({"model": model.state_dict(), "model_args": args}, zipped)
    path.write_bytes(whole)
    load_pretrained(path)
    for length in reversed(range(0, len(whole), 1 if zipped else 7)):
        os.truncate(path, length)
        message = refusal(load_pretrained, path)
        if zipped and length > 4:
            assert message == "is truncated or damaged; delete it and download it again"


# ---------------------------------------------------------------- nothing is executed


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_nothing_in_a_file_is_executed(path, tmp_path, monkeypatch, form):
    monkeypatch.chdir(tmp_path)
    content = {"model": {}, "model_args": {}, "optimizer": MakesFolder()}
    if form == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        path.write_bytes(torch_file(content, zipped=form == "zip"))
    for read in (load_pretrained, read_checkpoint, load_torch_file):
        assert "weights_only" not in refusal(read, path)  # torch advises to switch it off
        assert not Path(MADE).exists()
    if form == "pickle":
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert Path(MADE).is_dir()  # the trap is real


@pytest.mark.parametrize(
    ("entry", "name", "is_the_assignments"),
    [
        (argparse.Namespace(lr=1e-3), "argparse.Namespace", True),
        (SimpleNamespace(num_labels=5), "types.SimpleNamespace", True),
        (np.random.get_state(), "numpy", True),
        (torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear", False),
    ],
)
def test_a_class_is_named_and_a_file_of_the_assignments_own_script_is_told_what_it_is(
    path, entry, name, is_the_assignments
):
    torch.save({"model": {}, "args": entry, "system_rng": random.getstate()}, path)
    message = refusal(load_torch_file, path)
    assert message.startswith(f"holds {name}")
    assert "which is not plain data; nothing in it was executed" in message
    assert ("the assignment's original run_llama.py" in message) == is_the_assignments


# ---------------------------------------------------------------- small files that ask for much


@pytest.mark.parametrize(
    ("dtype", "shape", "place"),
    [(torch.float16, (2**31,), "model"), (torch.float32, (2**15, 2**15), "optimizer")],
)
def test_a_tensor_that_repeats_its_numbers_is_refused_before_it_is_copied(
    path, dtype, shape, place
):
    tensor = torch.ones(1, dtype=dtype).expand(shape)
    torch.save({place: {"state": [{"norm.weight": tensor}]}}, path)
    with bounded_memory(32 * 2**20):
        assert refusal(load_torch_file, path).startswith("declares tensors of ")


@pytest.mark.parametrize("member", ["data.pkl", "data/0"])
def test_a_zip_that_unpacks_to_more_than_it_is_is_refused_unread(path, member):
    path.write_bytes(bomb(100, member))
    assert path.stat().st_size < 2**20
    with bounded_memory(32 * 2**20):
        assert refusal(load_torch_file, path).startswith("unpacks to 104,8")


@pytest.mark.parametrize(("form", "n"), [("zip", 60_000), ("legacy", 1_000_000)])
def test_tuples_within_tuples_that_would_crash_python_are_refused(path, form, n):
    key = b")" + b"\x85" * n
    content = b"\x80\x02}(" + text("model") + b"}" + text("model_args") + b"}" + key + b"K\1su."
    if form == "zip":
        path.write_bytes(repacked(torch_file({}), {"data.pkl": content}))
    else:
        path.write_bytes(legacy_file(content))
    code = "import sys; from formats import torch_file; torch_file.load_torch_file(sys.argv[1])"
    done = subprocess.run(  # of its own, as it would crash
        [sys.executable, "-c", code, path], cwd=ROOT, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 1
    assert "InputError" in done.stderr and "more pickle instructions" in done.stderr


def test_a_pickle_that_holds_itself_is_read(path):
    content = b"\x80\x02}q\0" + text("self") + b"h\0s."
    path.write_bytes(repacked(torch_file({}), {"data.pkl": content}))
    loaded = load_torch_file(path)
    assert loaded["self"] is loaded


def test_a_wrong_escape_in_a_pickle_is_no_warning(path):
    path.write_bytes(repacked(torch_file({}), {"data.pkl": b"S'\\='\n."}))
    assert "is not a torch file" in refusal(load_torch_file, path)  # and warnings fail a test


def test_a_zip_whose_end_names_several_disks_is_damaged(path):
    whole = torch_file({"model": {}})
    end = whole.rindex(b"PK\x05\x06")
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 7, 0, 7)
    path.write_bytes(whole[:end] + locator + whole[end:])
    assert "damaged" in refusal(load_torch_file, path)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.ones(32, device="meta"),
        lambda: torch.ones(32).to_sparse(),
        lambda: torch.ones(32, dtype=torch.complex64),
        lambda: torch.nested.nested_tensor([torch.ones(32)]),
    ],
    ids=["meta", "sparse", "complex", "nested"],
)
def test_a_tensor_that_is_no_dense_real_array_is_named(path, make):
    torch.save({"model": {"norm.weight": make()}}, path)
    assert refusal(load_torch_file, path) == "norm.weight is not a dense tensor of real numbers"


def test_a_message_lists_at_most_fifty_names_cut_and_printable():
    names = ["a" * 10**6, "\x1b[2J\n", 7, *(f"x{i}" for i in range(60))]
    message = listed(names)
    assert message.endswith(", x46 and 13 more")
    assert len(message) < 1000 and message.isprintable()
