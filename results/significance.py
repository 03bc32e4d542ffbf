"""Whether a method differs from its baseline: paired tests on the sentences that both answered.

- paired bootstrap: Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 16; for
  pairs of systems Koehn 2004, Statistical significance tests for machine translation evaluation.
- McNemar 1947, Note on the sampling error of the difference between correlated proportions or
  percentages; here its exact binomial form.
- Holm 1979, A simple sequentially rejective multiple test procedure.

What differs from Koehn: seeds are resampled too, since a method is its training and not one
outcome of it; and p is the share of |d* - d| >= |d|, the differences moved to a mean of zero, with
one added to both counts, so that it is never 0.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

_CHUNK = 1000  # resamples at a time


class Comparison(NamedTuple):
    """Accuracy of a minus that of b, its 95 % interval and the two-sided p."""

    difference: float
    low: float
    high: float
    p: float


def paired_bootstrap(
    a: np.ndarray, b: np.ndarray, n_resamples: int = 10_000, seed: int = 0
) -> Comparison:
    """Compares a (n_seeds_a, N) with b (n_seeds_b, N), 1 where a sentence was answered rightly.

    A resample draws N sentences, the same for both, and seeds for each side on its own: S - 1 of
    S, which makes the variance between few seeds unbiased (Rao and Wu 1988). One seed tells
    nothing of that variance, so there the interval is of the sentences alone. That seed s of one
    side may share data or weights with seed s of the other is not used, which makes p larger where
    it is so. Resampling both factors counts the noise of single answers more than once (Owen 2007,
    The pigeonhole bootstrap), so p is careful where sentences vary more than seeds; where few seeds
    vary much it is too small. Other shapes or values are a ValueError.
    """
    a, b = _checked(a, "a", n_dimensions=2), _checked(b, "b", n_dimensions=2)
    n_sentences = a.shape[1]
    if b.shape[1] != n_sentences:
        raise ValueError(
            f"a has {n_sentences} sentences and b {b.shape[1]}; compare answers to the same ones"
        )
    both = np.concatenate([a, b]).T.astype(np.float32)  # (N, Sa + Sb); sums below 2**24 are exact
    counts = _sentence_counts(n_sentences, n_resamples, seed)
    accuracies = np.concatenate(
        [counts[i : i + _CHUNK].astype(np.float32) @ both for i in range(0, n_resamples, _CHUNK)]
    ).astype(np.float64)  # (n_resamples, Sa + Sb), in sentences
    rng = np.random.default_rng([seed, 1])
    of_a, of_b = np.split(accuracies / n_sentences, [len(a)], axis=1)
    resampled = _over_drawn_seeds(of_a, rng) - _over_drawn_seeds(of_b, rng)
    difference = float(a.mean() - b.mean())
    is_as_far = np.abs(resampled - difference) >= abs(difference) - 1e-12
    low, high = np.quantile(resampled, [0.025, 0.975])
    p = (1 + int(is_as_far.sum())) / (1 + n_resamples)
    return Comparison(difference, float(low), float(high), p)


@lru_cache(maxsize=2)
def _sentence_counts(n_sentences: int, n_resamples: int, seed: int) -> np.ndarray:
    """How often each resample drew each sentence: (n_resamples, N), kept for the next method."""
    rng = np.random.default_rng([seed, 0])
    counts = np.empty((n_resamples, n_sentences), dtype=np.uint16)
    for start in range(0, n_resamples, _CHUNK):
        n_rows = min(_CHUNK, n_resamples - start)
        drawn = rng.integers(n_sentences, size=(n_rows, n_sentences))
        drawn += n_sentences * np.arange(n_rows)[:, None]  # each row counts in bins of its own
        counted = np.bincount(drawn.ravel(), minlength=n_rows * n_sentences)
        counts[start : start + n_rows] = counted.reshape(n_rows, n_sentences)
    return counts


def _over_drawn_seeds(accuracies: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The mean over the seeds that each resample drew: (n_resamples, S) to (n_resamples,)."""
    n_resamples, n_seeds = accuracies.shape
    drawn = rng.integers(n_seeds, size=(n_resamples, max(1, n_seeds - 1)))
    return np.take_along_axis(accuracies, drawn, axis=1).mean(axis=1)


def mcnemar(a: np.ndarray, b: np.ndarray) -> float:
    """The exact two-sided p for one run each, (N,): of n sentences that one side alone answered
    rightly, as uneven a split between the sides under Binomial(n, 1/2)."""
    a, b = _checked(a, "a", n_dimensions=1), _checked(b, "b", n_dimensions=1)
    if len(a) != len(b):
        raise ValueError(
            f"a has {len(a)} sentences and b {len(b)}; compare answers to the same ones"
        )
    only_a, only_b = int((a > b).sum()), int((b > a).sum())
    n = only_a + only_b
    tail = sum(math.comb(n, k) for k in range(min(only_a, only_b) + 1))
    return min(1.0, 2 * tail / 2**n)  # integers until here, so no n is too large


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p, in the order given: the k-th smallest of m times m - k + 1, made non-decreasing
    and capped at 1. Rejecting where it is <= 0.05 keeps the chance of any false rejection below
    5 %."""
    for p in p_values:
        if not 0 <= p <= 1:
            raise ValueError(f"p value {p} is not between 0 and 1")
    adjusted, largest = [0.0] * len(p_values), 0.0
    for n_before, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - n_before) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def _checked(right: np.ndarray, name: str, n_dimensions: int) -> np.ndarray:
    right = np.asarray(right)
    if right.ndim != n_dimensions or right.size == 0:
        wanted = "(n_seeds, N)" if n_dimensions == 2 else "(N,)"
        raise ValueError(f"{name} has shape {right.shape}; give {wanted}, none of them 0")
    if not np.isin(right, (0, 1)).all():
        raise ValueError(f"{name} holds values other than 0 and 1; give whether each is right")
    return right.astype(np.int8)
