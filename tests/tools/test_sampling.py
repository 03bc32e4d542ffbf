"""Top-k and top-p against a loop over the vocabulary in float64, transformers, and exact
probabilities."""

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from tools.sampling import ROUNDING, keep_likeliest, pick_next


def kept_by_a_loop(logits: np.ndarray, top_k: int | None, top_p: float | None) -> set[int]:
    """The tokens of one row that are kept, taken one by one from the likeliest."""
    ranked = sorted(range(len(logits)), key=lambda i: -logits[i])[:top_k]
    if top_p is None:
        return set(ranked)
    probs = np.exp(logits[ranked] - logits.max())
    sums = np.cumsum(probs / probs.sum())
    return set(ranked[: int(np.sum(sums < top_p * (1 - ROUNDING))) + 1])  # as it documents


@given(
    st.lists(st.integers(-40, 40), min_size=1, max_size=12, unique=True),
    st.none() | st.integers(1, 15),
    st.none() | st.sampled_from([0.03, 0.11, 0.37, 0.62, 0.93, 0.999]),
    st.sampled_from([0.3, 1.0, 2.0]),
)
def test_a_loop_over_the_ranks_keeps_the_same_tokens(tenths, top_k, top_p, temperature):
    logits = np.array(tenths) / 10
    rows = torch.tensor(logits).repeat(2, 1)
    rows[1] = rows[1].flip(0)  # another row of the batch changes nothing
    cut = keep_likeliest(rows, temperature, top_k, top_p)
    kept = kept_by_a_loop(logits / temperature, top_k, top_p)
    assert set(cut[0].isfinite().nonzero().flatten().tolist()) == kept
    assert torch.equal(cut[0], cut[1].flip(0))
    assert torch.equal(cut[0][list(kept)], rows[0][list(kept)])


@given(st.lists(st.integers(1, 30), min_size=2, max_size=9), st.integers(1, 9))
@example([5, 3, 1, 1], 2)
def test_top_p_at_the_exact_sum_of_n_tokens_keeps_n(weights, n):
    """Rounding of float32 sums adds none: .5 .3 .1 .1 and p = .8 keep two tokens."""
    weights = sorted(weights, reverse=True)
    top_p = sum(weights[:n]) / sum(weights)
    cut = keep_likeliest(torch.tensor([weights]).float().log(), 1.0, None, top_p)
    assert cut.isfinite().sum() == min(n, len(weights))


def test_a_top_p_of_one_keeps_all():
    logits = 6 * torch.randn(3, 32_000)
    assert torch.equal(keep_likeliest(logits, 1.0, None, 1.0), logits)


def test_ties_with_the_kth_token_are_kept():
    cut = keep_likeliest(torch.tensor([[2.0, 1.0, 1.0, 0.0]]), 1.0, 2, None)
    assert cut.isfinite().tolist() == [[True, True, True, False]]


def test_transformers_keeps_the_same_tokens():
    process = pytest.importorskip("transformers.generation.logits_process")
    logits = 2 * torch.randn(20, 50, generator=torch.Generator().manual_seed(0))
    expected = process.TopPLogitsWarper(0.6)(None, process.TopKLogitsWarper(7)(None, logits))
    assert torch.equal(keep_likeliest(logits, 1.0, 7, 0.6), expected)


def test_samples_follow_the_exact_probabilities_of_the_kept_tokens():
    logits = torch.tensor([0.5, 2.0, 1.0, -1.0, 1.5])
    temperature, n = 1.3, 40_000
    weights = np.exp(logits.double().numpy() / temperature)
    weights[[0, 3]] = 0  # the likeliest two sum to 0.64, and to 0.71 at a temperature of 1
    expected = weights / weights.sum()
    drawn = pick_next(logits.repeat(n, 1), temperature, top_p=0.7).flatten()
    counts = np.bincount(drawn.numpy(), minlength=5)
    deviation = np.sqrt(n * expected * (1 - expected))
    assert (np.abs(counts - n * expected) <= 5 * deviation).all()


@pytest.mark.parametrize(
    ("temperature", "cut"),
    [(1.0, {"top_k": 1}), (1.0, {"top_p": 1e-50}), (0.0, {"top_k": 5}), (1e-300, {"top_p": 0.5})],
)
def test_one_token_left_is_the_greedy_choice(temperature, cut):
    logits = torch.stack([torch.randperm(20) for _ in range(30)]).float()  # no two are equal
    assert torch.equal(pick_next(logits, temperature, **cut), logits.argmax(-1, keepdim=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_finite_are_rejected(value):
    for cut in ({}, {"top_k": 2}, {"top_p": 0.5}):
        with pytest.raises(ValueError, match="logits are not finite"):
            pick_next(torch.full((1, 3), value), 1.0, **cut)
