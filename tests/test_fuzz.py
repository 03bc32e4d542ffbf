"""A few thousand hostile files, always the same ones; `fuzz.py` runs as many as it is asked to.

No time is asserted here: a loaded machine would fail what is right.
"""

import json
import os
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings

import fuzz
import hostile
from config import LlamaConfig
from conftest import ROOT
from formats.checkpoint import load_torch_file
from fuzz import Target, examine
from fuzz_models import EVIL, model_args
from fuzz_shared import assets
from fuzz_targets import TARGETS
from llama import Llama, load_pretrained

# As a share of the long run's: what is slow here is read by few other inputs.
CASES = {"data": 250, "labels": 200, "model": 600, "bomb": 10, "bin": 350, "classifier": 250}
CASES |= {
    "state": 150,
    "hf": 250,
    "tokenizer": 300,
    "submission": 60,
    "manifest": 250,
    "server": 60,
}


def test_at_least_two_thousand_cases_run_here():
    assert CASES.keys() == TARGETS.keys()
    assert sum(CASES.values()) >= 2000


@pytest.mark.filterwarnings("ignore")  # of torch, on the strange tensors that are drawn
@pytest.mark.parametrize("name", list(TARGETS))
def test_whatever_is_read_ends_with_a_documented_exit_code_and_one_line(name):
    target = TARGETS[name]

    @settings(
        max_examples=CASES[name],
        derandomize=True,
        database=None,
        deadline=None,
        # A large file is drawn from few choices, and it is the reader that takes the time.
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(target.cases)
    def run(inputs):
        assert examine(target, inputs).problem is None

    examine(target, {})  # what is imported or made on first use
    with fuzz.bounded_memory():
        run()


@pytest.fixture(scope="module")
def smallest() -> Llama:
    torch.manual_seed(0)
    shape = {"vocab_size": 3, "dim": 2, "n_layers": 1, "n_heads": 1, "n_kv_heads": 1}
    return Llama(LlamaConfig(**shape, hidden_dim=1, max_seq_len=2))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_cut_off_at_any_byte_is_refused(smallest, tmp_path, zipped):
    content = {"model": smallest.state_dict(), "model_args": model_args(smallest)}
    whole = hostile.torch_file(content, zipped)
    path = tmp_path / "model.pt"
    path.write_bytes(whole)
    load_pretrained(path)
    for length in reversed(range(len(whole))):
        os.truncate(path, length)
        with pytest.raises(ValueError) as caught:
            load_pretrained(path)
        assert str(caught.value).startswith(f"{path}: "), length


def test_the_trap_in_the_pickles_is_real(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.pt").write_bytes(hostile.legacy_file(EVIL))
    with pytest.raises(ValueError, match="none of it was executed"):
        load_torch_file("evil.pt")
    assert not (tmp_path / hostile.MADE).exists()
    torch.load("evil.pt", weights_only=False)
    assert (tmp_path / hostile.MADE).is_dir()


# ---------------------------------------------------------------- what it looks for, it finds


def ends_with(code: int, line: str = ""):
    def act() -> None:
        print(line, end="", file=sys.stderr)
        sys.exit(code)

    return act


def writes_elsewhere() -> None:
    (fuzz.Path.cwd().parent / "stranger").touch()
    sys.exit(0)


@pytest.mark.parametrize(
    ("act", "problem"),
    [
        (ends_with(0), None),
        (ends_with(2, "prog: error: file.txt: is wrong\n"), None),
        (ends_with(3), "exit code 3"),
        (ends_with(2), "not one line, but 0"),
        (ends_with(2, "file.txt\nand more\n"), "not one line, but 2"),
        (ends_with(2, "prog: error: something\n"), "names no file"),
        (ends_with(2, f"file.txt {'x' * 10_000}\n"), "a line of 10010 characters"),
        (ends_with(0, "Traceback (most recent call last):\n"), "a traceback"),
        (lambda: None, "no SystemExit"),
        (lambda: {}["key"], "KeyError at test_fuzz.py"),
        (writes_elsewhere, "wrote ['stranger']"),
    ],
)
def test_every_way_to_fail_badly_is_a_problem(act, problem):
    found = examine(Target("any", None, act), {"file.txt": b""}).problem
    assert (found is None) if problem is None else found.startswith(problem)


def test_a_run_counts_its_cases_and_writes_what_it_found(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # which it sets for its children, as it was after
    out = tmp_path / "fuzz.json"
    was_there = (ROOT / ".hypothesis").exists()  # pytest alone makes one, too
    assert fuzz.main(["--cases", "8", "--seed", "3", "--target", "bin", "--out", str(out)]) == 0
    document = json.loads(out.read_text(encoding="utf-8"))
    assert document["command"].startswith("python tests/fuzz.py --cases 8 --seed 3 --target bin")
    assert (document["cases"], document["findings"]) == (8, 0)
    assert sum(document["targets"]["bin"]["codes"].values()) == 8
    assert was_there or not (ROOT / ".hypothesis").exists()
    assert assets().is_dir()
