"""Rotary position embeddings (Su et al. 2021, arXiv 2104.09864).

Position m turns the pair (x_2i, x_2i+1) of a head by the angle m * theta^(-2i / D), as if the pair
were the complex number x_2i + j x_2i+1 multiplied by exp(j m theta^(-2i / D)), j the imaginary unit
(equation 34). A dot product of a turned query and a turned key then depends on their distance
alone.

Shapes: B batch, T sequence, H query heads, K key/value heads, D head size.
"""

from functools import lru_cache

import torch


@lru_cache(maxsize=32)
def rotary_table(
    length: int, head_dim: int, theta: float, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """exp(j m theta^(-2i / D)) for each position m and pair i, complex (length, head_dim / 2).

    `dtype` is that of real and imaginary part. Angles are formed in float64 on the CPU, so that a
    far position loses no digits. Built outside inference mode: a table first needed by `generate`
    must serve later training too.
    """
    with torch.inference_mode(False), torch.no_grad():
        pairs = torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu")
        frequencies = theta ** (-pairs / head_dim)  # (D/2,)
        positions = torch.arange(length, dtype=torch.float64, device="cpu")
        angles = torch.outer(positions, frequencies)  # (length, D/2)
        return torch.complex(angles.cos().to(dtype), angles.sin().to(dtype)).to(device)


def reshape_for_broadcast(freqs_cis: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Views a (T, D') table as (1, T, 1, ..., D') to multiply `x` of shape (B, T, ..., D')."""
    assert x.ndim > 2 and freqs_cis.shape == (x.shape[1], x.shape[-1]), (
        f"table {tuple(freqs_cis.shape)} does not fit x {tuple(x.shape)}"
    )
    return freqs_cis.view(1, x.shape[1], *[1] * (x.ndim - 3), x.shape[-1])


def apply_rotary_emb(
    query: torch.Tensor,
    key: torch.Tensor,
    head_dim: int,
    max_seq_len: int,
    theta: float = 10000.0,
    start_pos: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turns query (B, T, H, D) and key (B, T, K, D) by their positions start_pos ... start_pos+T-1.

    Computed in float32 (float64 stays float64), returned in each input's dtype. Raises ValueError
    where a position reaches `max_seq_len` or the head size is odd or unlike `head_dim`.
    """
    seqlen = query.shape[1]
    if head_dim % 2 or query.shape[-1] != head_dim or key.shape[-1] != head_dim:
        raise ValueError(
            f"head_dim={head_dim} must be even and the last size of query "
            f"{tuple(query.shape)} and key {tuple(key.shape)}"
        )
    if start_pos < 0 or start_pos + seqlen > max_seq_len:
        raise ValueError(
            f"positions {start_pos}..{start_pos + seqlen - 1} do not fit max_seq_len={max_seq_len}"
        )
    dtype = torch.promote_types(query.dtype, torch.float32)
    freqs_cis = rotary_table(max_seq_len, head_dim, float(theta), query.device, dtype)
    freqs_cis = freqs_cis[start_pos : start_pos + seqlen]
    return _rotate(query, freqs_cis), _rotate(key, freqs_cis)


def _rotate(x: torch.Tensor, freqs_cis: torch.Tensor) -> torch.Tensor:
    pairs = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2))
    turned = torch.view_as_complex(pairs.contiguous())  # (B, T, heads, D/2)
    turned = turned * reshape_for_broadcast(freqs_cis, turned)
    return torch.view_as_real(turned).flatten(-2).type_as(x)  # (B, T, heads, D)
