"""choose_threads, with measured times given; and that every thread rounds denormal numbers to 0."""

import os
import subprocess
import sys

import pytest
import torch

from conftest import ROOT, random_llama
from fast import VARIABLES, threads
from fast.threads import choose_threads


@pytest.fixture
def measured(monkeypatch):
    """measured((one, all), ...) gives these seconds of passes, on a machine with three threads."""

    def script(*rounds: tuple[float, float]) -> None:
        results = iter(rounds)

        def run_both(*ways):
            for way in ways:
                way()
            return next(results)

        monkeypatch.setattr(threads, "fastest_seconds", run_both)

    before = torch.get_num_threads()
    monkeypatch.setattr(threads, "all_threads", lambda: 3)
    torch.set_num_threads(3)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    yield script
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("seconds_of_all", "chosen"),
    [([0.5], 3), ([0.95, 0.95, 0.95], 1), ([5.0, 5.0, 0.5], 3)],
)
def test_all_threads_are_used_where_they_are_clearly_faster(measured, seconds_of_all, chosen):
    for n_rows in (1, 10**6):
        measured(*((1.0, seconds) for seconds in seconds_of_all))
        choose_threads(random_llama(), n_rows)
        assert torch.get_num_threads() == chosen


def test_what_the_user_sets_stays(measured, monkeypatch):
    measured()
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    choose_threads(random_llama(), 1)
    assert torch.get_num_threads() == 3


DENORMALS = """
import sys, torch
from utils import seed_everything
if "seed" in sys.argv:
    seed_everything()
print(torch.full((2**22,), 1e-39).mul(1.0).count_nonzero().item())
"""


def test_denormal_numbers_are_0_in_every_thread():
    def count(*argv: str) -> int:
        command = [sys.executable, "-c", DENORMALS, *argv]
        environment = {**os.environ, "OMP_NUM_THREADS": "4"}
        return int(subprocess.check_output(command, cwd=ROOT, env=environment))

    if not torch.set_flush_denormal(False):
        pytest.skip("this processor cannot")
    assert count() == 2**22
    assert count("seed") == 0


FIRST_IMPORT = """
import os, runpy, sys
class Watch:
    def find_spec(self, name, *_):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"))
            raise SystemExit
sys.meta_path.insert(0, Watch())
runpy.run_module(sys.argv[1])
"""


@pytest.mark.parametrize(
    "command", ["run_llama", "tools.generate", "tools.predict", "advanced.run", "pretraining.run"]
)
def test_commands_set_the_spin_count_before_pytorch_loads(command):
    plain = {name: value for name, value in os.environ.items() if name not in VARIABLES}

    def spin_count(**variables: str) -> str:
        argv = [sys.executable, "-c", FIRST_IMPORT, command]
        output = subprocess.check_output(argv, cwd=ROOT, env=plain | variables, encoding="utf-8")
        return output.strip()

    assert spin_count() == VARIABLES["GOMP_SPINCOUNT"]
    if command == "run_llama":  # what the user sets wins
        assert spin_count(GOMP_SPINCOUNT="7") == "7"
        assert spin_count(OMP_WAIT_POLICY="active") == "None"
