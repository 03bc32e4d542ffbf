"""A thousand hostile files, always the same ones; `fuzz.py` runs as many as it is asked to.

No time is asserted here: a loaded machine would fail what is right.
"""

import sys

import pytest
from hypothesis import HealthCheck, given, settings

import fuzz
from fuzz import Target, examine
from fuzz_targets import TARGETS

CASES = {
    **{"model": 300, "classifier": 150, "bin": 150, "state": 60},
    **{"data": 200, "labels": 150, "tokenizer": 150},
}


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
        assert examine(target, inputs) is None

    examine(target, {})  # what is imported or made on first use
    with fuzz.bounded_memory():
        run()


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
