"""Linear layers whose float32 products on a CPU go to oneDNN instead of the BLAS library.

PyTorch ships both and gives float32 to the BLAS library: on x86 to MKL, which leaves much of a
processor unused that is not Intel's. oneDNN's inner product is behind an operator that PyTorch's
own compiler emits; `results/speed.json` says what it is worth. Anything else than float32 on a
CPU, or a PyTorch without that operator, takes the usual way.
"""

import os

import torch
import torch.nn.functional as F
from torch import nn

# oneDNN, and PyTorch's layer over it, each keep 1,024 kernels, one for every shape of a product
# that there was. Batches of many lengths fill both: half a gigabyte, strewn over the heap, so that
# little of what is freed between them fits a later batch. A step takes about twenty. Both are read
# when the first product is computed.
KEPT_KERNELS = 64
for _name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_name, str(KEPT_KERNELS))


def _find_onednn_linear() -> "torch._ops.OpOverload | None":
    if not torch.backends.mkldnn.is_available():
        return None
    try:
        return torch.ops.mkldnn._linear_pointwise.default
    except AttributeError:
        return None


_onednn_linear = _find_onednn_linear()
# Fewer multiplications than these are not worth oneDNN's call; for more than one row it also builds
# a kernel for each new number of rows, of which sentences have many.
SMALL_ROW, SMALL = 2**18, 2**23


class _Product(torch.autograd.Function):
    """x (N, I), weight (O, I) -> x weight^T (N, O)."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn_linear(x, weight, None, "none", [], "")

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight = ctx.needs_input_grad
        return (
            linear(grad, weight.t()) if wants_x else None,
            linear(grad.t(), x.t()) if wants_weight else None,
        )


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x (..., I), weight (O, I) -> x weight^T (..., O), for autograd (not for torch.func)."""
    if (
        _onednn_linear is None
        or x.device.type != "cpu"
        or x.dtype != torch.float32
        or weight.dtype != torch.float32
        or torch.is_autocast_enabled("cpu")
        or x.shape[-1] != weight.shape[1]  # an error, which F.linear words better
        or (multiplications := x.numel() * weight.shape[0]) < SMALL_ROW
        or (multiplications < SMALL and x.numel() > x.shape[-1])
    ):
        return F.linear(x, weight)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        rows = x.reshape(-1, x.shape[-1])
        return _Product.apply(rows, weight).view(*x.shape[:-1], -1)
    return _onednn_linear(x, weight, None, "none", [], "")


class Linear(nn.Linear):
    """`nn.Linear` without a bias, by `linear`."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight)
