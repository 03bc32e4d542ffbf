"""results/significance.py against closed forms, and the rate of small p-values under the null."""

import itertools
import math

import numpy as np
import pytest

from results.significance import holm, mcnemar, paired_bootstrap


def answers(rng, shape, accuracy=0.5):
    return (rng.random(shape) < accuracy).astype(int)


@pytest.mark.parametrize(("n_only_a", "n_only_b"), [(0, 0), (1, 0), (3, 3), (2, 9), (40, 12)])
def test_mcnemar_is_twice_the_binomial_tail(n_only_a, n_only_b):
    a = np.array([1] * n_only_a + [0] * n_only_b + [1] * 7)
    b = np.array([0] * n_only_a + [1] * n_only_b + [1] * 7)
    n = n_only_a + n_only_b
    tail = sum(math.comb(n, k) for k in range(min(n_only_a, n_only_b) + 1)) / 2**n
    assert mcnemar(a, b) == pytest.approx(min(1.0, 2 * tail))
    assert mcnemar(b, a) == pytest.approx(mcnemar(a, b))


def test_holm_is_its_definition_in_every_order():
    # sorted: 0.005 * 4, 0.01 * 3, 0.03 * 2, and 0.04 * 1, which must not be below its predecessor
    expected = {0.005: 0.02, 0.01: 0.03, 0.03: 0.06, 0.04: 0.06}
    for order in itertools.permutations(expected):
        assert holm(order) == pytest.approx([expected[p] for p in order])
    assert holm([]) == []
    assert holm([0.7, 0.6]) == [1.0, 1.0]


def test_equal_answers_differ_by_nothing_with_p_one():
    a = answers(np.random.default_rng(0), (1, 50))
    assert paired_bootstrap(a, a, n_resamples=500) == (0.0, 0.0, 0.0, 1.0)


def test_a_shift_is_significant_and_p_is_never_zero():
    rng = np.random.default_rng(1)
    a, b = answers(rng, (3, 400), 0.7), answers(rng, (3, 400), 0.5)
    result = paired_bootstrap(a, b, n_resamples=999)
    assert result.difference == pytest.approx(a.mean() - b.mean())
    assert result.p == 1 / 1000
    assert 0 < result.low < result.difference < result.high


def test_one_run_each_has_the_interval_of_a_mean_of_paired_differences():
    rng = np.random.default_rng(3)
    b = answers(rng, (1, 500))
    a = np.where(rng.random((1, 500)) < 0.1, 1 - b, b)
    result = paired_bootstrap(a, b)
    half = 1.96 * (a - b).std() / math.sqrt(500)
    assert (result.high - result.low) / 2 == pytest.approx(half, rel=0.05)


def test_seeds_alone_have_the_unbiased_variance_of_a_mean_of_seeds():
    """If all sentences of a seed have one answer, only seeds vary: by s^2 / S on each side."""
    a = np.repeat([[0], [1], [1], [0]], 200, axis=1)
    b = np.repeat([[0], [1], [0]], 200, axis=1)
    result = paired_bootstrap(a, b)
    means_a = [np.mean(drawn) for drawn in itertools.product(a[:, 0], repeat=3)]
    means_b = [np.mean(drawn) for drawn in itertools.product(b[:, 0], repeat=2)]
    exact = np.quantile(np.subtract.outer(means_a, means_b), [0.025, 0.975])
    assert [result.low, result.high] == pytest.approx(exact)
    assert np.var(means_a) == pytest.approx(np.var(a[:, 0], ddof=1) / 4)


@pytest.mark.parametrize(("n_seeds", "seed_std", "most"), [(1, 0.0, 0.10), (4, 0.06, 0.13)])
def test_under_the_null_p_is_below_a_twentieth_about_that_often(n_seeds, seed_std, most):
    rng = np.random.default_rng(4)
    p_values = []
    for _ in range(250):
        sentence = rng.beta(0.5, 0.6, 200)
        accuracies = sentence + seed_std * rng.standard_normal((2, n_seeds, 1))
        a, b = answers(rng, (2, n_seeds, 200), accuracies)
        p_values.append(paired_bootstrap(a, b, n_resamples=300).p)
    assert 0.01 <= np.mean(np.array(p_values) <= 0.05) <= most
    assert np.mean(np.array(p_values) <= 0.5) > 0.25
