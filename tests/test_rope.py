"""Laws of rotary position embeddings."""

import pytest
import torch

import rope
from rope import apply_rotary_emb, reshape_for_broadcast, rotary_table
from rope_test import closed_form


def random_pair(T: int, D: int, dtype: torch.dtype = torch.float64, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(2, T, 4, D, generator=generator, dtype=torch.float64)
    key = torch.randn(2, T, 2, D, generator=generator, dtype=torch.float64)
    return query.to(dtype), key.to(dtype)


@pytest.mark.parametrize("head_dim", [2, 4, 8, 64])
@pytest.mark.parametrize("theta", [10000.0, 100.0])
def test_rotation_is_the_complex_product_of_consecutive_pairs(head_dim, theta):
    for x, turned in zip(
        random_pair(9, head_dim),
        apply_rotary_emb(*random_pair(9, head_dim), head_dim, 16, theta=theta),
        strict=True,
    ):
        torch.testing.assert_close(turned, closed_form(x, theta), rtol=0, atol=1e-12)


def test_position_zero_is_left_alone_and_norms_are_kept():
    query, key = random_pair(7, 8)
    turned, _ = apply_rotary_emb(query, key, 8, 16)
    assert torch.equal(turned[:, 0], query[:, 0])
    torch.testing.assert_close(turned.norm(dim=-1), query.norm(dim=-1))


def test_scores_depend_on_the_relative_position_alone():
    query, key = random_pair(1, 16)

    def score(m: int, n: int) -> torch.Tensor:
        turned_query, _ = apply_rotary_emb(query, key, 16, 512, start_pos=m)
        _, turned_key = apply_rotary_emb(query, key, 16, 512, start_pos=n)
        return turned_query[:, 0] @ turned_key[:, 0].transpose(-2, -1)

    torch.testing.assert_close(score(7, 3), score(407, 403), rtol=0, atol=1e-12)
    assert not torch.allclose(score(7, 3), score(7, 4))


def test_start_position_continues_where_a_longer_sequence_stands():
    query, key = random_pair(12, 8)
    whole = apply_rotary_emb(query, key, 8, 12)
    parts = apply_rotary_emb(query[:, 5:], key[:, 5:], 8, 12, start_pos=5)
    for expected, part in zip(whole, parts, strict=True):
        assert torch.equal(expected[:, 5:], part)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_input_dtype_is_returned_after_float32_arithmetic(dtype):
    query, key = random_pair(300, 8, dtype)
    turned, turned_key = apply_rotary_emb(query, key, 8, 300)
    assert turned.dtype == turned_key.dtype == dtype
    # One rounding to the dtype at the end, not one at each step.
    torch.testing.assert_close(
        turned.double(), closed_form(query), rtol=torch.finfo(dtype).eps, atol=1e-6
    )


def test_table_is_built_once_per_length_head_size_theta_and_device(monkeypatch):
    rotary_table.cache_clear()
    calls = []
    outer = torch.outer
    monkeypatch.setattr(rope.torch, "outer", lambda *args: calls.append(1) or outer(*args))
    query, key = random_pair(5, 8, torch.float32)
    for _ in range(3):
        apply_rotary_emb(query, key, 8, 64)
        apply_rotary_emb(query[:, :2], key[:, :2], 8, 64, start_pos=4)
    assert len(calls) == 1
    apply_rotary_emb(query, key, 8, 65)
    apply_rotary_emb(query, key, 8, 64, theta=500.0)
    assert len(calls) == 3


def test_table_first_built_in_inference_mode_still_serves_training():
    rotary_table.cache_clear()
    query, key = random_pair(5, 8, torch.float32)
    with torch.inference_mode():
        apply_rotary_emb(query, key, 8, 64)
    query.requires_grad_()
    turned, _ = apply_rotary_emb(query, key, 8, 64)
    turned.sum().backward()
    assert query.grad.isfinite().all()


def test_positions_beyond_max_seq_len_are_refused():
    query, key = random_pair(5, 8)
    apply_rotary_emb(query, key, 8, 5)
    with pytest.raises(ValueError, match="max_seq_len=4"):
        apply_rotary_emb(query, key, 8, 4)
    with pytest.raises(ValueError, match=r"positions 1\.\.5 do not fit max_seq_len=5"):
        apply_rotary_emb(query, key, 8, 5, start_pos=1)
    with pytest.raises(ValueError, match="positions -1"):
        apply_rotary_emb(query, key, 8, 5, start_pos=-1)


def test_head_size_unlike_the_tensors_or_odd_is_refused():
    query, key = random_pair(5, 8)
    with pytest.raises(ValueError, match="head_dim=16"):
        apply_rotary_emb(query, key, 16, 5)
    with pytest.raises(ValueError, match="head_dim=7"):
        apply_rotary_emb(query[..., :7], key[..., :7], 7, 5)


def test_reshape_for_broadcast_keeps_time_and_last_dimension():
    table, x = torch.randn(5, 3), torch.randn(2, 5, 4, 3)
    view = reshape_for_broadcast(table, x)
    assert view.shape == (1, 5, 1, 3)
    assert torch.equal((view * x)[1, 4, 2], table[4] * x[1, 4, 2])
    with pytest.raises(AssertionError):
        reshape_for_broadcast(torch.randn(4, 3), x)
