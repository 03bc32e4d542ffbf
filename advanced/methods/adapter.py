"""Bottleneck adapters: two small layers after each sub-layer (Houlsby et al. 2019, arXiv
1902.00751, figure 2).

Behind every attention and every feed-forward layer, before its output joins the residual stream,

    h -> h + W_up act(W_down h + b_down) + b_up,    W_down (size, dim), W_up (dim, size)

Trained are the adapters, the norms, as in the paper's section 2.1, and the head; all else of the
Llama is frozen. In between stands a nonlinearity, so unlike LoRA's update this one has no sum with
the weights: it cannot be merged, and a trained model is its weights and its adapters. The paper's
sizes are 8, 64 and 256 for a `dim` of 1024, on GLUE.

What differs from the paper, and why:

- It begins near the identity, both matrices drawn with a standard deviation of 0.01 (0.001 in its
  code). Here W_up begins as zeros, so a fresh adapter is the identity itself, and W_down as
  `nn.Linear` draws it.
- The activation, which it leaves open (its code takes GELU), is the Llama's SiLU.
- The norms are RMSNorms, which have gains and no biases, and those before the sub-layers.
"""

import torch
import torch.nn.functional as F
from torch import nn

from llama import RMSNorm


class Adapter(nn.Module):
    """h (..., dim) -> W_up act(W_down h), what is added to h; weights are made like `like`."""

    def __init__(self, dim: int, size: int, like: torch.Tensor):
        super().__init__()
        self.down = nn.Linear(dim, size, device=like.device, dtype=like.dtype)
        self.up = nn.Linear(size, dim, device=like.device, dtype=like.dtype)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)
        nn.init.zeros_(self.down.bias)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return self.up(F.silu(self.down(h)))


def add_adapters(model: nn.Module, size: int) -> None:
    """Freezes `model.llama` but for its norms and puts an adapter behind each sub-layer.

    The modules `attention` and `feed_forward` of every layer get a submodule `adapter`, and a hook
    that adds what it says; so the adapters are in the state dict, and a saved one is loaded after
    this call. A fresh adapter changes nothing. What lies outside the Llama is left as it is.

    ValueError, before anything is changed, for a size outside 1..dim or for a second call.
    """
    dim = model.llama.config.dim
    if not isinstance(size, int) or not 1 <= size <= dim:
        raise ValueError(f"size={size} of the adapters is no bottleneck: choose one in 1..{dim}")
    if any(isinstance(module, Adapter) for module in model.llama.modules()):
        raise ValueError("the Llama has adapters already")
    model.llama.requires_grad_(False)
    for module in model.llama.modules():
        if isinstance(module, RMSNorm):
            module.requires_grad_(True)
    for sub_layer in _sub_layers(model):
        sub_layer.adapter = Adapter(dim, size, like=model.llama.norm.weight)
        sub_layer.register_forward_hook(_add_adapter)


def _sub_layers(model: nn.Module) -> list[nn.Module]:
    return [part for layer in model.llama.layers for part in (layer.attention, layer.feed_forward)]


# A function of the module it is called with, not a closure: a deep copy runs its own adapter.
def _add_adapter(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
    return output + module.adapter(output)
