"""How many threads a command uses on a CPU."""

import os
from functools import lru_cache

import torch
from torch import nn

from fast.linear import fastest_seconds

USUAL_LENGTH = 32  # tokens of a sentence
MAX_ROWS = 256  # of the measurement
GAIN = 1.1  # times as fast as one thread that all threads must be
N_ROUNDS = 3


@lru_cache
def all_threads() -> int:
    """Return PyTorch's number of threads at the first call."""
    return torch.get_num_threads()


def generation_rows(model: nn.Module, n_samples: int = 1) -> int:
    """Return the usual number of positions in a pass of generation: one for each sample with a KV
    cache (causal), else the whole text, about USUAL_LENGTH."""
    return n_samples * (1 if model.config.attention == "causal" else USUAL_LENGTH)


@torch.no_grad()
def choose_threads(model: nn.Module, n_rows: int) -> None:
    """Use one thread if all of them hardly speed up a Llama, measured on one layer and the output.

    `n_rows` is the usual number of token positions in a pass. Small products end before a second
    thread has begun, and beside another busy process every product waits for the thread that the
    system has suspended. The user's OMP_NUM_THREADS wins; other devices keep PyTorch's number.

    It takes twelve passes through the layer, 0.3 s for 256 positions of stories42M, and up to three
    times that before it settles for one thread: the system may have held a thread up.
    """
    n_threads, weight = all_threads(), model.norm.weight
    if n_threads == 1 or "OMP_NUM_THREADS" in os.environ or weight.device.type != "cpu":
        return
    n_rows = min(n_rows, MAX_ROWS, model.config.max_seq_len)
    h = torch.zeros(1, n_rows, model.config.dim, dtype=weight.dtype)

    def pass_with(threads: int) -> None:
        torch.set_num_threads(threads)
        model.output(model.layers[0](h)[:, -1])

    for _ in range(N_ROUNDS):
        one, many = fastest_seconds(lambda: pass_with(1), lambda: pass_with(n_threads))
        if one > GAIN * many:
            torch.set_num_threads(n_threads)
            return
    torch.set_num_threads(1)
