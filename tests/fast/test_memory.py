"""The peak of memory that records and tables print."""

import subprocess
import sys

import pytest

from conftest import ROOT

PROGRAM = """
import torch
from fast.memory import reset_peak_memory, keep_freed_memory, peak_memory_mb
{first}
numbers = torch.ones(2**26)
held = peak_memory_mb()
del numbers
reset_peak_memory()
print(held, peak_memory_mb())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak counts from the start")
@pytest.mark.parametrize("first", ["", "keep_freed_memory()"])
def test_a_peak_is_forgotten(first):
    """256 MiB that were held and freed do not count afterwards."""
    command = [sys.executable, "-c", PROGRAM.format(first=first)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", check=True)
    held, left = map(float, done.stdout.split())
    assert held - left > 200
