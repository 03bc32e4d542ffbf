"""Bottleneck adapters: two small layers after each sub-layer (Houlsby et al. 2019, arXiv
1902.00751, figure 2).

The output h of every attention and feed-forward layer, before it joins the residual stream, becomes

    h + W_up act(W_down h + b_down) + b_up,    W_down (size, dim), W_up (dim, size)

The adapters, the norms (section 2.1) and the head are trained; the rest of the Llama is frozen.
Because of the nonlinearity an adapter cannot be merged into the weights. The paper uses sizes of 8,
64 and 256 for a `dim` of 1024, on GLUE.

Differences from the paper:

- It starts near the identity, with both matrices drawn at a standard deviation of 0.01. Here W_up
  starts as zeros, so a fresh adapter is exactly the identity, and W_down as PyTorch draws a Linear.
- The paper leaves the activation open; here it is the Llama's SiLU.
- The norms are RMSNorms (gains without biases) and stand before the sub-layers.
"""

import torch
import torch.nn.functional as F
from torch import nn

from advanced.methods.freezing import train_only
from utils import InputError


class Adapter(nn.Module):
    """Return W_up act(W_down h + b_down) + b_up of h (..., dim), the term that is added to h."""

    def __init__(self, dim: int, size: int, like: torch.Tensor):
        super().__init__()
        self.down = nn.Linear(dim, size, device=like.device, dtype=like.dtype)
        self.up = nn.Linear(size, dim, device=like.device, dtype=like.dtype)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return self.up(F.silu(self.down(h)))


def add_adapters(model: nn.Module, size: int) -> None:
    """Freeze `model.llama` except its norms and put an adapter behind each sub-layer.

    The adapters are submodules named `adapter` of the layers' `attention` and `feed_forward`, so
    the state dict contains them. Raise InputError for a size outside 1..dim.
    """
    dim = model.llama.config.dim
    if not 1 <= size <= dim:
        raise InputError(f"--adapter_size {size}: a bottleneck has a size in 1..{dim}")
    train_only(model, "norms")
    for layer in model.llama.layers:
        for sub_layer in (layer.attention, layer.feed_forward):
            sub_layer.adapter = Adapter(dim, size, like=model.llama.norm.weight)
            sub_layer.register_forward_hook(_add_adapter)


# The hook reads its module's own adapter, so a deep copy of the model uses its own adapters.
def _add_adapter(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
    return output + module.adapter(output)
