"""Linear layers whose float32 products on a CPU go to oneDNN instead of the BLAS library.

PyTorch sends float32 products on an x86 CPU to MKL, which is slow on processors that are not
Intel's. oneDNN is faster there (results/speed.json); PyTorch exposes it by a private operator.
Every other device and dtype, and a PyTorch without the operator, uses F.linear. Importing this
module sets two environment variables, which both libraries read at the first product.
"""

import os

import torch
import torch.nn.functional as F
from torch import nn

# oneDNN and PyTorch each cache 1,024 kernels, one per product shape. Batches of many lengths fill
# both caches (0.5 GB) and fragment the heap. A step uses about 20 kernels.
MAX_CACHED_KERNELS = 64
for _name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_name, str(MAX_CACHED_KERNELS))


def _find_onednn_linear() -> "torch._ops.OpOverload | None":
    if not torch.backends.mkldnn.is_available():
        return None
    try:
        return torch.ops.mkldnn._linear_pointwise.default
    except AttributeError:
        return None


_onednn_linear = _find_onednn_linear()
# oneDNN is slower below these numbers of multiplications, of one row and of several: its call costs
# more, and each new number of rows builds a kernel.
MIN_PRODUCTS_ONE_ROW, MIN_PRODUCTS = 2**18, 2**23


class _OneDNNLinear(torch.autograd.Function):
    """The product x weight^T (N, O) of x (N, I) and weight (O, I)."""

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
    """Return x weight^T (..., O) of x (..., I) and weight (O, I), for autograd (not torch.func)."""
    if (
        _onednn_linear is None
        or x.device.type != "cpu"
        or x.dtype != torch.float32
        or weight.dtype != torch.float32
        or torch.is_autocast_enabled("cpu")
        or x.shape[-1] != weight.shape[1]  # let F.linear raise the error
        or (multiplications := x.numel() * weight.shape[0]) < MIN_PRODUCTS_ONE_ROW
        or (multiplications < MIN_PRODUCTS and x.numel() > x.shape[-1])
    ):
        return F.linear(x, weight)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        rows = x.reshape(-1, x.shape[-1])
        return _OneDNNLinear.apply(rows, weight).view(*x.shape[:-1], -1)
    return _onednn_linear(x, weight, None, "none", [], "")


class Linear(nn.Linear):
    """Apply `linear` as a layer without a bias."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight)
