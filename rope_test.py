"""Check RoPE against its closed form, on random inputs.

Position m multiplies the complex number x_2i + j x_2i+1 by exp(j m theta^(-2i / D)).
"""

import torch

from rope import apply_rotary_emb
from utils import run_script

TOLERANCE = 1e-5


def closed_form(x: torch.Tensor, theta: float = 10000.0) -> torch.Tensor:
    """Rotate x (B, T, heads, D) in complex float64 arithmetic."""
    T, D = x.shape[1], x.shape[3]
    numbers = torch.view_as_complex(x.double().unflatten(-1, (D // 2, 2)))  # (B, T, heads, D/2)
    for m in range(T):
        for i in range(D // 2):
            angle = torch.tensor(m * theta ** (-2 * i / D), dtype=torch.float64)
            numbers[:, m, :, i] *= torch.polar(torch.ones_like(angle), angle)
    return torch.view_as_real(numbers).flatten(-2)


def largest_difference(head_dim: int) -> float:
    """Return the largest error over a query of 4 and a key of 2 heads, at 20 random positions; a
    NaN stays one."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 20, 4, head_dim, generator=generator)
    key = torch.randn(2, 20, 2, head_dim, generator=generator)
    rotated = apply_rotary_emb(query, key, head_dim, 20)
    errors = [(ours - closed_form(x)).abs() for ours, x in zip(rotated, (query, key), strict=True)]
    return torch.cat([error.flatten() for error in errors]).max().item()


def main() -> int:
    differences = {head_dim: largest_difference(head_dim) for head_dim in (4, 64)}
    for head_dim, difference in differences.items():
        print(
            f"head size {head_dim:2d}: largest difference {difference:.2e} "
            f"(tolerance {TOLERANCE:.0e})"
        )
    if not all(difference <= TOLERANCE for difference in differences.values()):
        print("Rotary embedding test failed: are consecutive elements paired?")
        return 1
    print("Rotary embedding test passed!")
    return 0


if __name__ == "__main__":
    run_script(main)
