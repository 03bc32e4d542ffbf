"""Rotary position embeddings (Su et al. 2021, arXiv 2104.09864).

Position m rotates the pair (x_2i, x_2i+1) of a head by the angle m * theta^(-2i / D): the complex
number x_2i + j x_2i+1 is multiplied by exp(j m theta^(-2i / D)) (equation 34). The dot product of a
rotated query and a rotated key then depends only on the distance between their positions.

Shapes: B batch, T sequence, H query heads, K key/value heads, D head size.
"""

from functools import lru_cache

import torch

from utils import InputError

THETA = 10000.0  # of every Llama 2


@lru_cache(maxsize=32)
def rotary_table(
    length: int, head_dim: int, theta: float, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """Return exp(j m theta^(-2i / D)) for each position m and pair i, complex (length, D / 2).

    `dtype` is the type of the real and the imaginary part. The angles are computed in float64, so
    that far positions lose no digits, and outside inference mode, so that a table first used by
    `generate` also serves training.
    """
    with torch.inference_mode(False), torch.no_grad():
        pairs = torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu")
        frequencies = theta ** (-pairs / head_dim)  # (D/2,)
        positions = torch.arange(length, dtype=torch.float64, device="cpu")
        angles = torch.outer(positions, frequencies)  # (length, D/2)
        return torch.complex(angles.cos().to(dtype), angles.sin().to(dtype)).to(device)


def reshape_for_broadcast(freqs_cis: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """View a (T, D/2) table as (1, T, 1, ..., D/2) to multiply `x` of shape (B, T, ..., D/2).

    The table's name, in the assignment: cis(a) = cos(a) + j sin(a).
    """
    assert x.ndim > 2 and freqs_cis.shape == (x.shape[1], x.shape[-1]), (
        f"table {tuple(freqs_cis.shape)} does not fit x {tuple(x.shape)}"
    )
    return freqs_cis.view(1, x.shape[1], *[1] * (x.ndim - 3), x.shape[-1])


def apply_rotary_emb(
    query: torch.Tensor,
    key: torch.Tensor,
    head_dim: int,
    max_seq_len: int,
    theta: float = THETA,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate query (B, T, H, D) and key (B, T, K, D) by their positions 0 ... T-1.

    Computes in float32 (float64 stays float64) and returns each input's dtype. Raises InputError if
    T exceeds `max_seq_len`, or the head size is odd or differs from `head_dim`.
    """
    seqlen = query.shape[1]
    if head_dim % 2 or query.shape[-1] != head_dim or key.shape[-1] != head_dim:
        raise InputError(
            f"head_dim={head_dim} must be even and the last size of query "
            f"{tuple(query.shape)} and key {tuple(key.shape)}"
        )
    if seqlen > max_seq_len:
        raise InputError(f"{seqlen} positions do not fit max_seq_len={max_seq_len}")
    dtype = torch.promote_types(query.dtype, torch.float32)
    freqs_cis = rotary_table(max_seq_len, head_dim, float(theta), query.device, dtype)[:seqlen]
    return rotate(query, freqs_cis), rotate(key, freqs_cis)


def rotate(x: torch.Tensor, freqs_cis: torch.Tensor) -> torch.Tensor:
    """Rotate x (B, T, heads, D) by a table's T rows (T, D / 2); returns x's dtype."""
    pairs = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2))
    rotated = torch.view_as_complex(pairs.contiguous())  # (B, T, heads, D/2)
    rotated = rotated * reshape_for_broadcast(freqs_cis, rotated)
    return torch.view_as_real(rotated).flatten(-2).type_as(x)  # (B, T, heads, D)
