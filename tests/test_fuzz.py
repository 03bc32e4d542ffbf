"""A thousand hostile files, always the same ones; `fuzz.py` runs as many as it is asked to.

No time is asserted here: a loaded machine would fail what is right.
"""

import math
import sys

import pytest

import fuzz
from fuzz import Target, examine
from fuzz_targets import TARGETS

CASES = {"model": 400, "classifier": 150, "bin": 150, "state": 60}
CASES |= {"data": 200, "labels": 150, "tokenizer": 150}


@pytest.fixture(autouse=True)
def kept_here(tmp_path, monkeypatch):
    """The case of a finding is kept in the test's folder."""
    monkeypatch.setattr(fuzz.tempfile, "tempdir", str(tmp_path))


@pytest.mark.parametrize("name", list(TARGETS))
def test_whatever_is_read_ends_with_a_documented_exit_code_and_one_line(name):
    assert fuzz.run_cases(TARGETS[name], CASES[name], first_seed=0, limit_s=math.inf) == 0


def ends_with(code: int, line: str = ""):
    def act() -> None:
        print(line, end="", file=sys.stderr)
        sys.exit(code)

    return act


def writes_a_file() -> None:
    (fuzz.Path.cwd() / "stranger").touch()
    sys.exit(0)


@pytest.mark.parametrize(
    ("act", "problem"),
    [
        (ends_with(0), None),
        (ends_with(2, "prog: error: file.txt: is wrong\n"), None),
        (ends_with(3), "ended with 3"),
        (ends_with(2), "not one line"),
        (ends_with(2, "file.txt\nand more\n"), "not one line"),
        (ends_with(2, "prog: error: something\n"), "names no file"),
        (ends_with(2, f"file.txt {'x' * 10_000}\n"), "a line of 10010 characters"),
        (lambda: None, "ended with no SystemExit"),
        (lambda: {}["key"], "ended with KeyError at test_fuzz.py"),
        (writes_a_file, "wrote ['stranger']"),
    ],
)
def test_every_way_to_fail_badly_is_a_problem(act, problem):
    found = examine(Target("any", None, act), {"file.txt": b""})
    assert (found is None) if problem is None else found.startswith(problem)


def test_a_run_counts_its_cases(capsys):
    assert fuzz.main(["--cases", "8", "--seed", "3", "--target", "bin"]) == 0
    assert capsys.readouterr().out.endswith(" 0 findings\n")
