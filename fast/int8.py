"""int8 weights for inference: a quarter of the bytes to read for each token.

Each row of a matrix is stored as int8 with one scale: w ~ scale * q, |q| <= 127 (the symmetric
scheme of Jacob et al. 2018, arXiv 1712.05877, one scale per output row). Activations stay float32
outside the products. Read `I` as in_features and `O` as out_features.

`quantize_model(model)` is the one way in. Quantized models cannot be trained.
"""

import torch
from torch import nn

from fast.linear import linear
from utils import InputError

# The operator gains by reading fewer bytes, so it pays for few rows: on an AVX2 processor it is as
# fast as dequantizing at 16 rows of 512 x 512 and of 512 x 1376, and slower beyond.
MAX_ROWS = 16
# The operator reads beyond the row and may crash unless I is a multiple of its vector length: 8
# numbers with AVX2, 16 with AVX-512.
MULTIPLE_OF = 32


def quantize_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return int8 (O, I) and the float32 scales (O,), max|row| / 127, of a weight (O, I).

    A scale is rounded to a bfloat16, which the operator reads, so q * scale is exact in float32
    and quantizes to the same q and scale again. Rows of (almost) zeros have the scale 1.
    """
    weight = weight.detach().float()
    scale = (weight.abs().amax(dim=1) / 127).bfloat16().float()
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, 1.0, scale)
    quantized = (weight / scale[:, None]).round().clamp(-127, 127)
    return quantized.to(torch.int8), scale


def dequantize(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return the float32 (O, I) of int8 (O, I) and scales (O,)."""
    return weight * scale.float()[:, None]


def int8_linear(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return x (q * scale)^T (..., O) of x (..., I), in x's dtype; q and scale as quantized above.

    Up to MAX_ROWS rows on a CPU go to PyTorch's operator, which rounds x and the product to
    bfloat16. Everything else multiplies by the dequantized weight.
    """
    n_in = weight.shape[1]
    few_rows = x.device.type == "cpu" and x.numel() <= MAX_ROWS * n_in
    if not few_rows or n_in % MULTIPLE_OF or x.shape[-1] != n_in:
        return linear(x, dequantize(weight, scale).to(x.dtype))
    rows = x.reshape(-1, n_in).bfloat16().contiguous()
    product = torch._weight_int8pack_mm(rows, weight, scale.bfloat16())
    return product.to(x.dtype).view(*x.shape[:-1], len(weight))


class _Int8Weight(nn.Module):
    """The buffers `weight` (O, I) and `scale` (O,)."""

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor):
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)


class Int8Linear(_Int8Weight):
    """Apply `int8_linear` as a layer without a bias."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return int8_linear(x, self.weight, self.scale)


class Int8Embedding(_Int8Weight):
    """Return the float32 rows (..., I) of ids (...)."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.weight[ids] * self.scale[ids][..., None]


def require_known(quantize: str | None) -> None:
    """Raise InputError for a format of weights that does not exist."""
    if quantize not in (None, "int8"):
        raise InputError(f"quantize={quantize!r} is neither None nor 'int8'")


def quantize_model(model: nn.Module) -> None:
    """Replace every Linear and Embedding of a Llama, in place, and freeze the rest.

    Tied ones share their buffers, which `.to(device)` would copy: move the model first. Raises
    InputError if PyTorch lacks the operator.
    """
    if not hasattr(torch.ops.aten, "_weight_int8pack_mm"):
        raise InputError(
            "int8: this PyTorch has no int8 product; install the version in requirements.txt"
        )
    done: dict[torch.Tensor, tuple[torch.Tensor, torch.Tensor]] = {}  # weight -> int8, scale
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, (nn.Linear, nn.Embedding)):
                if child.weight not in done:  # a tied one once
                    done[child.weight] = quantize_rows(child.weight)
                kind = Int8Linear if isinstance(child, nn.Linear) else Int8Embedding
                setattr(parent, name, kind(*done[child.weight]))
    model.requires_grad_(False)
