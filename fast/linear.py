"""Linear layers whose float32 products on a CPU go to the faster of two libraries.

PyTorch sends float32 products on an x86 CPU to a BLAS library, usually MKL, and ships oneDNN, too,
which a private operator reaches. Which one is faster differs between processors, and between
products of one row and of many (results/speed-*.json), so the first product of either kind measures
both. Every other device and dtype, and a PyTorch without the operator, uses F.linear.
"""

import os
import time
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import nn

from utils import InputError

_onednn_linear = None
if torch.backends.mkldnn.is_available():
    with suppress(AttributeError):  # a PyTorch without the operator
        _onednn_linear = torch.ops.mkldnn._linear_pointwise.default
# oneDNN is slower below these numbers of multiplications, of one row and of several: its call costs
# more, and each new number of rows builds a kernel.
MIN_PRODUCTS_ONE_ROW, MIN_PRODUCTS = 2**18, 2**23
MARGIN = 0.8  # of F.linear's time that oneDNN may take: a close race must not depend on chance
LIBRARIES = ("BLAS", "oneDNN")


def fastest_seconds(*ways: Callable[[], object], turns: int = 5) -> list[float]:
    """Return the shortest time of each way in turns, after a first call that does not count."""
    for way in ways:
        way()
    seconds = [[] for _ in ways]
    for _ in range(turns):
        for way, times in zip(ways, seconds, strict=True):
            start = time.perf_counter()
            way()
            times.append(time.perf_counter() - start)
    return [min(times) for times in seconds]


def chosen_library(n_rows: int) -> str:
    """Return "oneDNN" or "BLAS" for products of n_rows rows that are large enough for a choice.

    The environment variable MIN_LLAMA_PRODUCTS, set to one of the two, replaces the measurement;
    then a run with as many threads on the same processor repeats to the last bit.
    """
    if _onednn_linear is None:
        return "BLAS"
    return _measure(n_rows == 1, torch.get_num_threads())


@lru_cache
@torch.no_grad()
def _measure(is_one_row: bool, _n_threads: int) -> str:  # cached for each number of threads
    if given := os.environ.get("MIN_LLAMA_PRODUCTS"):
        if given not in LIBRARIES:
            raise InputError(f"MIN_LLAMA_PRODUCTS={given}: is neither {' nor '.join(LIBRARIES)}")
        return given
    n_rows, n_out = (1, 8192) if is_one_row else (256, 1024)  # of a model of dim 512
    x, weight = _ones(n_rows, 512), _ones(n_out, 512)
    blas, onednn = fastest_seconds(partial(F.linear, x, weight), partial(_multiply, x, weight))
    return "oneDNN" if onednn < MARGIN * blas else "BLAS"


def _ones(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.float32, device="cpu")  # whatever PyTorch's defaults are


def _multiply(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return _onednn_linear(x, weight, None, "none", [], "")


class _OneDNNLinear(torch.autograd.Function):
    """The product x weight^T (N, O) of x (N, I) and weight (O, I)."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return _multiply(x, weight)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight = ctx.needs_input_grad
        return (
            linear(grad, weight.t()) if wants_x else None,
            linear(grad.t(), x.t()) if wants_weight else None,
        )


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return x weight^T (..., O) of x (..., I) and weight (O, I), for autograd (not torch.func)."""
    n_rows = x.numel() // max(1, x.shape[-1])
    if (
        _onednn_linear is None
        or x.device.type != "cpu"
        or x.dtype != torch.float32
        or weight.dtype != torch.float32
        or torch.is_autocast_enabled("cpu")
        or x.shape[-1] != weight.shape[1]  # let F.linear raise the error
        or x.numel() * len(weight) < (MIN_PRODUCTS_ONE_ROW if n_rows == 1 else MIN_PRODUCTS)
        or chosen_library(n_rows) == "BLAS"
    ):
        return F.linear(x, weight)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        rows = x.reshape(-1, x.shape[-1])
        return _OneDNNLinear.apply(rows, weight).view(*x.shape[:-1], -1)
    return _multiply(x, weight)


class Linear(nn.Linear):
    """Apply `linear` as a layer without a bias."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight)


@lru_cache
@torch.no_grad()
def bfloat16_gain() -> float:
    """Return how many times as fast this CPU multiplies in bfloat16 as in float32 (about 20 ms)."""
    x, weight = _ones(256, 512), _ones(512, 512)
    half = partial(F.linear, x.bfloat16(), weight.bfloat16())
    float32_seconds, bfloat16_seconds = fastest_seconds(partial(linear, x, weight), half, turns=3)
    return float32_seconds / bfloat16_seconds
