"""Test whether two methods differ, on the sentences that both classified.

- Paired bootstrap: Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 16; for
  pairs of systems Koehn 2004, Statistical significance tests for machine translation evaluation.
- McNemar 1947, Note on the sampling error of the difference between correlated proportions or
  percentages; here the exact binomial form.
- Holm 1979, A simple sequentially rejective multiple test procedure.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from scipy.stats import binomtest


class Comparison(NamedTuple):
    """Accuracy of a minus accuracy of b, its 95 % interval, and the two-sided p."""

    difference: float
    low: float
    high: float
    p: float


def paired_bootstrap(a: np.ndarray, b: np.ndarray, n_resamples: int = 10_000) -> Comparison:
    """Compare the answers a (n_seeds_a, N) with b (n_seeds_b, N): 1 is correct, 0 is wrong.

    Each resample draws N sentences, the same for both sides, and then S - 1 of each side's S seeds:
    the variance between few seeds is then unbiased (Rao and Wu 1988). Koehn resamples sentences
    only; a method is its training and not one outcome of it. With one seed the interval covers the
    sentences alone.

    p is the share of resampled differences d* with |d* - d| >= |d|, with one added to both counts,
    so that it is never 0. Resampling both factors counts the variance of single answers, beyond
    that of sentences and of seeds, three times (Owen 2007, The pigeonhole bootstrap), so p is
    conservative; it is too small if a few seeds vary a lot.
    """
    n_sentences = a.shape[1]
    both = np.concatenate([a, b]).T.astype(np.float32)  # (N, n_seeds_a + n_seeds_b)
    counts = _sentence_counts(n_sentences, n_resamples)
    n_correct = (counts @ both).astype(np.float64)  # exact: float32 holds integers below 2**24
    accuracies_a, accuracies_b = np.split(n_correct / n_sentences, [len(a)], axis=1)
    rng = np.random.default_rng([0, 1])  # sentences are drawn by [0, 0]
    resampled = _mean_of_drawn_seeds(accuracies_a, rng) - _mean_of_drawn_seeds(accuracies_b, rng)
    difference = float(a.mean() - b.mean())
    n_as_far = np.sum(np.abs(resampled - difference) >= abs(difference) - 1e-12)
    low, high = np.quantile(resampled, [0.025, 0.975])
    p = (1 + int(n_as_far)) / (1 + n_resamples)
    return Comparison(difference, float(low), float(high), p)


@lru_cache(maxsize=1)  # the methods of one table share the draws
def _sentence_counts(n_sentences: int, n_resamples: int) -> np.ndarray:
    """Return how often each resample drew each sentence: (n_resamples, N)."""
    rng = np.random.default_rng([0, 0])
    counts = np.empty((n_resamples, n_sentences), dtype=np.float32)
    for row in counts:
        row[:] = np.bincount(rng.integers(n_sentences, size=n_sentences), minlength=n_sentences)
    return counts


def _mean_of_drawn_seeds(accuracies: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Average (n_resamples, S) over the seeds that each resample draws: (n_resamples,)."""
    n_resamples, n_seeds = accuracies.shape
    drawn = rng.integers(n_seeds, size=(n_resamples, max(1, n_seeds - 1)))
    return np.take_along_axis(accuracies, drawn, axis=1).mean(axis=1)


def mcnemar(a: np.ndarray, b: np.ndarray) -> float:
    """Return the exact two-sided p for one run each, a and b (N,).

    The sentences that only one side classified correctly split like tosses of a fair coin.
    """
    n_only_a, n_only_b = int(np.sum(a > b)), int(np.sum(b > a))
    n = n_only_a + n_only_b
    return float(binomtest(n_only_a, n).pvalue) if n else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the adjusted p-values in the order given.

    The k-th smallest of m is multiplied by m - k + 1, made non-decreasing and capped at 1.
    Rejecting if the result is <= 0.05 keeps the probability of any false rejection below 5 %.
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for n_smaller, i in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, min(1.0, (len(p_values) - n_smaller) * p_values[i]))
        adjusted[i] = largest
    return adjusted
