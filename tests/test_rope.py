"""Laws of rotary position embeddings."""

import pytest
import torch

from rope import apply_rotary_emb, reshape_for_broadcast, rotary_table
from rope_test import closed_form
from utils import InputError


def random_pair(T: int, D: int, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, T, 4, D, generator=generator, dtype=torch.float64)
    key = torch.randn(2, T, 2, D, generator=generator, dtype=torch.float64)
    return query.to(dtype), key.to(dtype)


@pytest.mark.parametrize(("head_dim", "theta"), [(2, 10000.0), (64, 10000.0), (8, 100.0)])
def test_rotation_is_the_complex_product_of_consecutive_pairs(head_dim, theta):
    """Position 0 stays as it is."""
    pair = random_pair(9, head_dim)
    for x, turned in zip(pair, apply_rotary_emb(*pair, head_dim, 16, theta=theta), strict=True):
        torch.testing.assert_close(turned, closed_form(x, theta), rtol=0, atol=1e-12)
        assert torch.equal(turned[:, 0], x[:, 0])


def test_scores_depend_on_the_relative_position_alone():
    pair = (x.expand(-1, 512, -1, -1) for x in random_pair(1, 16))  # the same at each position
    query, key = apply_rotary_emb(*pair, 16, 512)

    def score(m: int, n: int) -> torch.Tensor:
        return query[:, m] @ key[:, n].transpose(-2, -1)

    torch.testing.assert_close(score(7, 3), score(407, 403), rtol=0, atol=1e-12)
    assert not torch.allclose(score(7, 3), score(7, 4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_input_dtype_is_returned_after_float32_arithmetic(dtype):
    pair = random_pair(300, 8, dtype)
    for x, turned in zip(pair, apply_rotary_emb(*pair, 8, 300), strict=True):
        assert turned.dtype == dtype
        # One rounding to the dtype at the end, not one at each step.
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(turned.double(), closed_form(x), rtol=eps, atol=1e-6)


def test_a_table_is_made_once_and_if_made_in_inference_mode_still_serves_training():
    rotary_table.cache_clear()
    query, key = random_pair(5, 8, torch.float32)
    with torch.inference_mode():
        apply_rotary_emb(query, key, 8, 64)
        apply_rotary_emb(query[:, :2], key[:, :2], 8, 64)
    query.requires_grad_()
    turned, _ = apply_rotary_emb(query, key, 8, 64)
    turned.square().sum().backward()
    torch.testing.assert_close(query.grad, 2 * query)  # a rotation keeps the norm
    assert rotary_table.cache_info().misses == 1


@pytest.mark.parametrize(
    ("sizes", "head_dim", "max_seq_len", "words"),
    [
        ((8, 8), 8, 4, "5 positions do not fit max_seq_len=4"),
        ((8, 8), 16, 5, "head_dim=16 must be"),
        ((7, 7), 7, 5, "head_dim=7 must be even"),
        ((8, 6), 8, 5, r"head_dim=8 must be .* of query .* and key"),
    ],
)
def test_positions_and_head_sizes_that_do_not_fit_are_refused(sizes, head_dim, max_seq_len, words):
    query, key = (torch.zeros(2, 5, 4, size) for size in sizes)
    with pytest.raises(InputError, match=words):
        apply_rotary_emb(query, key, head_dim, max_seq_len)


def test_reshape_for_broadcast_keeps_time_and_last_dimension():
    table, x = torch.randn(5, 3), torch.randn(2, 5, 4, 3)
    view = reshape_for_broadcast(table, x)
    assert view.shape == (1, 5, 1, 3)
    torch.testing.assert_close(view * x, torch.einsum("td,bthd->bthd", table, x))
    with pytest.raises(AssertionError):
        reshape_for_broadcast(torch.randn(4, 3), x)
