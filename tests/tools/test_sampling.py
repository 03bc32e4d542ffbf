"""What is left to sample from, against a loop over the vocabulary in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tools.sampling import keep_likeliest, pick_next


def kept_by_a_loop(logits: np.ndarray, top_k: int | None, top_p: float | None) -> set[int]:
    """The token ids of one row that are kept, taken one by one from the likeliest on."""
    ranked = sorted(range(len(logits)), key=lambda i: -logits[i])
    if top_k is not None:
        last = logits[ranked[min(top_k, len(ranked)) - 1]]
        ranked = [i for i in ranked if logits[i] >= last]
    if top_p is None:
        return set(ranked)
    probs = np.exp(logits[ranked] - logits.max())
    probs /= probs.sum()
    kept, total = set(), 0.0
    for token, prob in zip(ranked, probs, strict=True):
        if kept and total >= top_p:
            break
        kept.add(token)
        total += prob
    return kept


@given(
    st.lists(st.integers(-40, 40), min_size=1, max_size=12, unique=True),
    st.none() | st.integers(1, 15),
    st.none() | st.sampled_from([0.03, 0.11, 0.37, 0.62, 0.93, 0.999]),
)
def test_what_is_kept_is_what_a_loop_over_the_ranks_keeps(tenths, top_k, top_p):
    logits = np.array(tenths) / 10
    rows = torch.tensor(logits).repeat(2, 1)
    rows[1] = rows[1].flip(0)  # another row in the batch changes nothing
    cut = keep_likeliest(rows, top_k, top_p)
    kept = kept_by_a_loop(logits, top_k, top_p)
    assert set(cut[0].isfinite().nonzero().flatten().tolist()) == kept
    assert torch.equal(cut[0], cut[1].flip(0))
    assert torch.equal(cut[0][list(kept)], rows[0][list(kept)])


def test_tokens_as_likely_as_the_kth_are_kept_too():
    cut = keep_likeliest(torch.tensor([[2.0, 1.0, 1.0, 0.0]]), 2, None)
    assert cut.isfinite().tolist() == [[True, True, True, False]]


def test_the_whole_share_is_every_token_however_unlikely():
    logits = 6 * torch.randn(3, 32_000)
    assert torch.equal(keep_likeliest(logits, None, 1.0), logits)


@pytest.mark.parametrize(("top_k", "top_p"), [(7, None), (None, 0.6), (7, 0.6)])
def test_the_same_tokens_are_kept_as_by_transformers(top_k, top_p):
    process = pytest.importorskip("transformers.generation.logits_process")
    logits = 2 * torch.randn(20, 50)
    expected = logits
    if top_k is not None:
        expected = process.TopKLogitsWarper(top_k)(None, expected)
    if top_p is not None:
        expected = process.TopPLogitsWarper(top_p)(None, expected)
    assert torch.equal(keep_likeliest(logits, top_k, top_p), expected)


def test_samples_have_the_frequencies_of_what_is_kept():
    logits = torch.tensor([0.5, 2.0, 1.0, -1.0, 1.5])
    temperature, n = 1.3, 40_000
    weights = np.exp(logits.double().numpy() / temperature)
    weights[[0, 3]] = 0  # top_k = 3
    expected = weights / weights.sum()
    drawn = pick_next(logits.repeat(n, 1), temperature, top_k=3).flatten()
    counts = np.bincount(drawn.numpy(), minlength=5)
    deviation = np.sqrt(n * expected * (1 - expected))
    assert (np.abs(counts - n * expected) <= 5 * deviation).all()


@pytest.mark.parametrize("only_one", [{"top_k": 1}, {"top_p": 1e-6}])
def test_one_token_left_is_the_greedy_choice(only_one):
    logits = torch.randn(30, 20)
    assert torch.equal(pick_next(logits, 1.0, **only_one), logits.argmax(-1, keepdim=True))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("odd", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_no_numbers_are_not_drawn_from(temperature, odd):
    with pytest.raises(ValueError, match="logits are not finite"):
        pick_next(torch.full((1, 3), odd), temperature)


def test_the_fewest_whose_share_is_reached_are_kept_where_it_is_reached_exactly():
    kept = keep_likeliest(torch.zeros(1, 4), None, 0.5).isfinite()
    assert kept.tolist() == [[True, True, False, False]]
