"""Files are written whole or not at all; seeds make draws repeat."""

import os
import random
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import torch

import utils
from conftest import ROOT
from formats.checkpoint import load_torch_file
from utils import (
    allow_tf32,
    atomic_write,
    pick_device,
    random_state,
    save_torch_file,
    seed_everything,
    set_random_state,
    sha256_of,
)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "out.txt"
    path.write_text("old", encoding="utf-8")
    with pytest.raises(RuntimeError), atomic_write(path) as file:
        file.write("half")
        raise RuntimeError
    assert path.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_is_followed_and_text_is_utf8_with_plain_newlines(tmp_path):
    (tmp_path / "real.txt").touch()
    (tmp_path / "link.txt").symlink_to(tmp_path / "real.txt")
    with atomic_write(tmp_path / "link.txt") as file:
        file.write("é\n")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "real.txt").read_bytes() == "é\n".encode()


def test_a_device_stays_a_device():
    with atomic_write(os.devnull) as file:
        file.write("gone")
    assert not os.path.isfile(os.devnull)  # noqa: PTH113


def test_a_long_name_is_no_obstacle(tmp_path):
    path = tmp_path / ("名" * 82 + ".txt")
    with atomic_write(path) as file:
        file.write("x")
    assert path.read_text(encoding="utf-8") == "x"


def test_a_seed_repeats_the_draws_of_python_numpy_and_torch():
    draws = []
    for _ in range(2):
        seed_everything(5)
        draws.append((random.random(), np.random.rand(), torch.rand(()).item()))
    assert draws[0] == draws[1]


def test_generators_go_on_where_a_stored_state_was_taken(tmp_path):
    def draw():
        normal = random.gauss(0, 1), np.random.randn()  # which keep a second number for later
        return (*normal, random.random(), np.random.rand(), torch.rand(()).item())

    seed_everything(5)
    draw()
    save_torch_file(tmp_path / "state", random_state())
    draws = [draw() for _ in range(3)]
    seed_everything(6)
    set_random_state(load_torch_file(tmp_path / "state"))
    assert [draw() for _ in range(3)] == draws


def test_a_state_of_more_gpus_than_there_are_sets_those_that_there_are(monkeypatch):
    state, was_set = random_state(), []
    state["cuda"] = [torch.zeros(16, dtype=torch.uint8), torch.ones(16, dtype=torch.uint8)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda *args: was_set.append(args))
    set_random_state(state)
    assert len(was_set) == 1
    assert was_set[0][0] is state["cuda"][0] and was_set[0][1] == 0


def test_a_sum_tells_files_apart(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")  # FIPS 180-2, appendix B.1
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_of(tmp_path / "abc") == expected


def test_an_error_of_the_disk_names_the_file_and_not_what_torch_makes_of_it(tmp_path, monkeypatch):
    class Full:
        def write(self, _):
            raise OSError(28, "No space left on device")

    @contextmanager
    def atomic_write_on_a_full_disk(path, mode):
        try:
            yield Full()
        except OSError as error:
            error.filename = str(path)
            raise

    monkeypatch.setattr(utils, "atomic_write", atomic_write_on_a_full_disk)
    with pytest.raises(OSError, match="No space left on device") as error:
        save_torch_file(tmp_path / "x.pt", {"a": torch.zeros(1000)})
    assert error.value.filename == str(tmp_path / "x.pt")


def test_a_failed_write_tells_which_file(tmp_path):
    path = tmp_path / "out.txt"
    with pytest.raises(OSError, match="No space") as error, atomic_write(path):
        raise OSError(28, "No space left on device")
    assert error.value.filename == str(path)


def test_without_use_gpu_the_device_is_the_cpu():
    assert pick_device(False).type == "cpu"


def test_cuda_may_multiply_in_tf32_and_a_cpu_is_left_alone():
    before = torch.backends.cuda.matmul.fp32_precision
    a = torch.randn(64, 64)
    exact = a @ a
    try:
        allow_tf32()
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
        assert torch.equal(a @ a, exact)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and glibc is Linux's")
def test_freed_memory_that_lies_between_what_is_held_goes_back():
    program = """
import ctypes, os, pathlib
import utils

def held_mb():
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") // 2**20

libc = ctypes.CDLL(None)
if not hasattr(libc, "malloc_trim"):
    raise SystemExit(3)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
blocks = [libc.malloc(64 * 1024) for _ in range(1600)]  # 100 MB, each too small for a mapping
for block in blocks:
    ctypes.memset(block, 1, 64 * 1024)
for block in blocks[:-1]:  # the last one stays, at the top
    libc.free(block)
before = held_mb()
utils.return_freed_memory()
print(before - held_mb())
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, encoding="utf-8"
    )
    if done.returncode == 3:
        pytest.skip("not glibc")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 80
