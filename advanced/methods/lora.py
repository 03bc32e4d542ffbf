"""LoRA: a low-rank update beside frozen weights (Hu et al. 2021, arXiv 2106.09685).

Equation 3 adds B A to a weight W that stays as pretrained, B (out, rank) and A (rank, in); section
4.1 scales it by alpha / rank, so that the learning rate need not follow the rank:

    W' = W + (alpha / rank) B A

`add_lora` makes `weight` of the chosen Linears that sum, by a parametrization: the layers compute
what they always do, of W' instead of W. `merge` writes W' into the weights, after which the model
is a plain one and costs nothing extra.

What differs from the paper, and why:

- B starts as zeros, as there. The paper draws A from a Gaussian of a width it does not name; here
  it is what the paper's code does, uniform in +-1/sqrt(in) (Kaiming's with a = sqrt 5).
- Its code can drop parts of the adapter's input in training. A parametrization sees the weight and
  not the input, so there is no such dropout here; the head's and the Llama's own are untouched.
- Its code multiplies A, then B, beside W; here each pass forms W', which is one more product of
  rank * in * out per matrix and not per token, keeps W' for the backward pass, and has for a moment
  a gradient as large as W. What is saved is the optimizer's state and all other gradients.
"""

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.utils import parametrize

from fast.linear import Linear


class LowRankUpdate(nn.Module):
    """W (out, in) -> W + (alpha / rank) B A, with B = 0 to begin with."""

    def __init__(self, weight: torch.Tensor, rank: int, alpha: float):
        super().__init__()
        n_out, n_in = weight.shape
        self.scale = alpha / rank
        self.A = nn.Parameter(weight.new_empty(rank, n_in))
        self.B = nn.Parameter(weight.new_zeros(n_out, rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        # Autocast would round the product, and `merge` leave other weights than were trained.
        with torch.autocast(weight.device.type, enabled=False):
            return weight + self.scale * (self.B @ self.A)


def add_lora(
    model: nn.Module,
    rank: int,
    alpha: float,
    targets: Sequence[str] = ("compute_query", "compute_value"),
) -> None:
    """Freezes `model.llama` and gives the Linears of these names in each layer a `LowRankUpdate`.

    A fresh one changes nothing. What lies outside the Llama, such as the head, is left as it is.
    The default targets are the paper's (section 7.1). A plain model's weights are loaded before
    this call, and those of a model with updates, such as a resumed run's, after it.

    ValueError, before anything is changed, for a target that no layer has, a rank beyond the
    smallest side of a target, an alpha that is not positive, or a model that has updates already.
    """
    linears = {
        name: module
        for name, module in model.llama.layers.named_modules()
        if isinstance(module, Linear)
    }
    there = sorted({_own_name(name) for name in linears})
    if not targets or set(targets) - set(there):
        raise ValueError(f"targets={targets!r} of LoRA: choose from {', '.join(there)}")
    if any(parametrize.is_parametrized(linear) for linear in linears.values()):
        raise ValueError("the Llama has parametrized weights already: merge them first")
    if not 0.0 < alpha < math.inf:
        raise ValueError(f"alpha={alpha} of LoRA is not a positive number")
    chosen = [linear for name, linear in linears.items() if _own_name(name) in targets]
    largest = min(min(linear.weight.shape) for linear in chosen)
    if not isinstance(rank, int) or not 1 <= rank <= largest:
        raise ValueError(f"rank={rank} of LoRA: choose one in 1..{largest}, which all targets have")
    model.llama.requires_grad_(False)
    for linear in chosen:
        update = LowRankUpdate(linear.weight, rank, alpha)
        parametrize.register_parametrization(linear, "weight", update)


def merge(model: nn.Module) -> None:
    """Leaves W + (alpha / rank) B A as plain weights, under the names from before `add_lora`.

    All weights of `model.llama` are trainable again. ValueError if there is nothing to merge.
    """
    updated = [
        linear
        for linear in model.llama.layers.modules()
        if parametrize.is_parametrized(linear, "weight")
        and isinstance(linear.parametrizations.weight[0], LowRankUpdate)
    ]
    if not updated:
        raise ValueError("no weight of the Llama has a LoRA update: call add_lora before merge")
    for linear in updated:
        # A deep copy of a parametrized module shares its class, of which PyTorch then deletes the
        # property `weight`; in a class of its own only this module loses it.
        shared = type(linear)
        linear.__class__ = type(shared.__name__, shared.__bases__, dict(vars(shared)))
        parametrize.remove_parametrizations(linear, "weight")
    model.llama.requires_grad_(True)


def _own_name(name: str) -> str:
    return name.rpartition(".")[2]
