"""Time run.c and runq.c of github.com/karpathy/llama2.c on the weights that ours have.

The programs print their own rate. It counts every position after the first, also the positions of
the prompt, which ours reads in one pass, and leaves out the start of the process. So the comparison
favors the programs.
"""

import math
import os
import re
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.contenders import make_llama
from formats import llama2c
from tools.export import weights_of
from utils import InputError

PROGRAMS = ("run.c", "runq.c")
GROUP = 64  # weights that share a scale, a power of 2; fewer if it does not divide both sizes


def compile_programs(source: Path, folder: Path) -> None:
    """Compile both programs of a checkout of llama2.c into `folder`; the checkout is unchanged."""
    compiler = os.environ.get("CC", "gcc")
    if shutil.which(compiler) is None:
        raise InputError(f"--llama2c: there is no compiler {compiler}; install it or set CC")
    for name in PROGRAMS:
        if not (source / name).is_file():
            raise InputError(f"--llama2c {source}: has no {name}; name a checkout of llama2.c")
        command = [compiler, "-Ofast", "-fopenmp", "-march=native", str(source / name), "-lm"]
        command += ["-o", str(folder / Path(name).stem)]
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no message"]
            raise InputError(f"--llama2c {source}: {compiler} fails on {name}: {lines[-1]}")


def write_q8(path: Path, sizes: dict[str, int], weights: dict[str, torch.Tensor]) -> None:
    """Write tied weights as a "version 2" file: matrices in Q8_0, norms in float32.

    Each matrix is its int8 numbers, then a float32 scale for each group: weight = number * scale.
    """
    group = math.gcd(GROUP, sizes["dim"], sizes["hidden_dim"])
    header = struct.pack("<Ii7iBi", 0x616B3432, 2, *(sizes[key] for key in llama2c.SIZES), 1, group)
    with open(path, "wb") as file:
        file.write(header.ljust(256, b"\0"))
        for kind in llama2c.shapes_of(1, sizes, is_tied=True):  # the order of version 1
            for name in llama2c.names_of(kind, sizes["n_layers"]):
                if kind.endswith("norm"):
                    file.write(weights[name].numpy().astype("<f4").tobytes())
                    continue
                groups = weights[name].view(-1, group)  # (number of groups, group)
                scale = groups.abs().amax(dim=1) / 127
                scale[scale == 0] = 1.0
                numbers = (groups / scale[:, None]).round().to(torch.int8)
                file.write(numbers.numpy().tobytes() + scale.numpy().astype("<f4").tobytes())


def write_tokenizer(path: Path, vocab_size: int) -> None:
    """Write a tokenizer.bin whose tokens are numbers; the programs need such a file."""
    tokens = [f"<{i}>".encode() for i in range(vocab_size)]
    entries = [struct.pack("<fi", 0.0, len(token)) + token for token in tokens]
    path.write_bytes(struct.pack("<i", max(map(len, tokens))) + b"".join(entries))


def seconds_per_token(
    program: str, shape: str, folder: Path, n_positions: int
) -> Callable[[], float]:
    """Return a function that runs a compiled program and returns the seconds of a token."""
    llama = make_llama("ours", shape, "causal")
    weights = weights_of(llama)
    sizes = llama2c.sizes_of(llama.config, weights)
    checkpoint, tokenizer = (folder / f"{shape}.{program}.{kind}" for kind in ("bin", "tokenizer"))
    write = llama2c.write_bin if program == "run.c" else write_q8
    write(checkpoint, sizes, weights)
    write_tokenizer(tokenizer, sizes["vocab_size"])
    command = [str(folder / Path(program).stem), str(checkpoint), "-z", str(tokenizer)]
    command += ["-t", "0", "-n", str(n_positions)]
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}

    def run() -> float:
        done = subprocess.run(command, env=env, capture_output=True, check=True)
        (rate,) = re.findall(rb"achieved tok/s: ([\d.]+)", done.stderr)
        return 1 / float(rate)

    return run
