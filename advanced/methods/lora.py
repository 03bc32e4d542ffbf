"""LoRA: low-rank updates beside frozen weights (Hu et al. 2021, arXiv 2106.09685).

Equation 3 adds B A to a frozen pretrained weight W, with B (out, rank) and A (rank, in). Section
4.1 scales the update by alpha / rank, so that the best learning rate depends less on the rank:

    W' = W + (alpha / rank) B A

`add_lora` computes W' by a parametrization of `weight`, so the layers themselves do not change.
Reading `weight` gives W', and that is what a checkpoint keeps: a plain model (`EpochFiles.offer`).

Differences from the paper:

- A is drawn uniformly from +-1/sqrt(in), as in the paper's code; the paper says "Gaussian".
- The code drops parts of the adapter's input in training. A parametrization does not see the input,
  so there is no such dropout here.
- The code multiplies the input by A and B beside W. Here each pass computes W', which costs
  rank * in * out multiplications per matrix and needs the memory of W' until the backward pass.
"""

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.utils import parametrize

from utils import InputError


class LowRankUpdate(nn.Module):
    """W (out, in) -> W + (alpha / rank) B A. B starts as zeros."""

    def __init__(self, weight: torch.Tensor, rank: int, alpha: float):
        super().__init__()
        n_out, n_in = weight.shape
        self.scale = alpha / rank
        self.A = nn.Parameter(weight.new_empty(rank, n_in))
        self.B = nn.Parameter(weight.new_zeros(n_out, rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        # Autocast would round the product, and other weights would be saved than were trained.
        with torch.autocast(weight.device.type, enabled=False):
            return weight + self.scale * (self.B @ self.A)


def add_lora(model: nn.Module, rank: int, alpha: float, targets: Sequence[str]) -> None:
    """Freeze `model.llama` and give the named Linears of every layer a `LowRankUpdate`.

    The paper's targets are query and value (section 7.1). Everything outside the Llama stays
    trainable. Raise InputError, before any change, for a rank above the smallest side of a target.
    """
    linears = [
        module
        for name, module in model.llama.layers.named_modules()
        if name.rpartition(".")[2] in targets
    ]
    largest = min(min(linear.weight.shape) for linear in linears)
    if not 1 <= rank <= largest:
        raise InputError(
            f"--lora_rank {rank}: choose a rank in 1..{largest}, which every target has"
        )
    model.llama.requires_grad_(False)
    for linear in linears:
        update = LowRankUpdate(linear.weight, rank, alpha)
        parametrize.register_parametrization(linear, "weight", update)
