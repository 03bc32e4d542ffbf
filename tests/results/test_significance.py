"""results/significance.py against closed forms, and p under a null that is drawn."""

import itertools
import math

import numpy as np
import pytest

from results.significance import holm, mcnemar, paired_bootstrap


def answers(rng, shape, accuracy=0.5):
    return (rng.random(shape) < accuracy).astype(int)


def discordant(only_a, only_b, both=7):
    """(a, b) with as many sentences that one side alone got right."""
    a = np.array([1] * only_a + [0] * only_b + [1] * both)
    return a, np.array([0] * only_a + [1] * only_b + [1] * both)


@pytest.mark.parametrize(
    ("only_a", "only_b"), [(0, 0), (1, 0), (3, 3), (2, 9), (40, 12), (700, 500)]
)
def test_mcnemar_is_the_exact_binomial_test(only_a, only_b):
    stats = pytest.importorskip("scipy.stats")
    n = only_a + only_b
    expected = stats.binomtest(only_a, n, 0.5).pvalue if n else 1.0
    assert mcnemar(*discordant(only_a, only_b)) == pytest.approx(expected, rel=1e-9)
    assert mcnemar(*discordant(only_b, only_a)) == mcnemar(*discordant(only_a, only_b))


def test_mcnemar_of_ten_to_none_is_two_in_1024():
    assert mcnemar(*discordant(10, 0)) == 2 / 1024


def test_holm_is_its_definition_over_all_orders():
    p_values = [0.01, 0.04, 0.03, 0.005]  # sorted and multiplied: 0.02, 0.03, 0.06, 0.04 -> 0.06
    expected = {0.005: 0.02, 0.01: 0.03, 0.03: 0.06, 0.04: 0.06}
    for order in itertools.permutations(p_values):
        assert holm(order) == pytest.approx([expected[p] for p in order])
    assert holm([]) == []
    assert holm([0.7, 0.6]) == [1.0, 1.0]
    with pytest.raises(ValueError, match=r"1\.5"):
        holm([0.1, 1.5])


def test_equal_answers_have_no_difference_and_p_one():
    a = answers(np.random.default_rng(0), (3, 50))
    difference, low, high, p = paired_bootstrap(a, a, n_resamples=500)
    assert (difference, p) == (0.0, 1.0)
    assert low <= 0 <= high
    one = a[:1]
    assert paired_bootstrap(one, one, n_resamples=500) == (0.0, 0.0, 0.0, 1.0)


def test_a_shift_is_found_and_p_is_never_zero():
    rng = np.random.default_rng(1)
    a, b = answers(rng, (3, 400), 0.7), answers(rng, (3, 400), 0.5)
    found = paired_bootstrap(a, b, n_resamples=999)
    assert found.difference == pytest.approx(a.mean() - b.mean())
    assert found.p == 1 / 1000
    assert 0 < found.low < found.difference < found.high


def test_swapped_sides_have_the_opposite_interval_and_the_same_p():
    rng = np.random.default_rng(2)
    a, b = answers(rng, (4, 300), 0.55), answers(rng, (4, 300), 0.5)
    one, other = paired_bootstrap(a, b), paired_bootstrap(b, a)
    assert one.difference == -other.difference
    assert [one.low, one.high] == pytest.approx([-other.high, -other.low], abs=0.004)
    assert one.p == pytest.approx(other.p, abs=0.02)  # seeds are drawn anew, 10,000 times


def test_one_run_each_has_the_spread_of_paired_sentences():
    """The interval is that of a mean of N paired differences, narrower than of unpaired ones."""
    rng = np.random.default_rng(3)
    b = answers(rng, (1, 500))
    a = np.where(rng.random((1, 500)) < 0.1, 1 - b, b)
    found = paired_bootstrap(a, b, n_resamples=20_000)
    half = 1.96 * (a - b).std() / math.sqrt(500)
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.05)


def test_seeds_alone_have_the_spread_of_a_mean_of_seeds():
    """Where every sentence of a seed has the same answer, only seeds vary: the variance of each
    side's mean is s^2 / S, unbiased."""
    a = np.repeat([[0], [1], [1], [0]], 200, axis=1)
    b = np.repeat([[0], [1], [0]], 200, axis=1)
    found = paired_bootstrap(a, b, n_resamples=20_000)
    draws = [np.mean(d) for d in itertools.product(a[:, 0], repeat=3)]
    others = [np.mean(d) for d in itertools.product(b[:, 0], repeat=2)]
    exact = np.quantile(np.subtract.outer(draws, others), [0.025, 0.975])
    assert [found.low, found.high] == pytest.approx(exact)
    assert np.var(draws) == pytest.approx(np.var(a[:, 0], ddof=1) / 4)


@pytest.mark.parametrize(("n_seeds", "seed_std", "most"), [(1, 0.0, 0.10), (4, 0.06, 0.13)])
def test_under_the_null_p_below_a_twentieth_is_about_as_rare(n_seeds, seed_std, most):
    rng = np.random.default_rng(4)
    p_values = []
    for _ in range(250):
        sentence = rng.beta(0.5, 0.6, 200)
        chances = sentence + seed_std * rng.standard_normal((2, n_seeds, 1))
        a, b = answers(rng, (2, n_seeds, 200), chances)
        p_values.append(paired_bootstrap(a, b, n_resamples=300).p)
    share = np.mean(np.array(p_values) <= 0.05)
    assert 0.01 <= share <= most
    assert np.mean(np.array(p_values) <= 0.5) > 0.25


def test_seeds_that_vary_widen_the_interval():
    rng = np.random.default_rng(5)
    level = np.array([[0.3], [0.4], [0.5], [0.6]])
    a, b = answers(rng, (4, 400), level), answers(rng, (4, 400), 0.45)
    wide = paired_bootstrap(a, b, n_resamples=2000)
    steady = paired_bootstrap(answers(rng, (4, 400), 0.45), b, n_resamples=2000)
    assert wide.high - wide.low > 1.3 * (steady.high - steady.low)


def test_the_same_seed_gives_the_same_numbers_and_another_other_ones():
    rng = np.random.default_rng(6)
    a, b = answers(rng, (2, 100)), answers(rng, (3, 100))
    first = paired_bootstrap(a, b, 300, seed=1)
    assert paired_bootstrap(a, b, 300, seed=1) == first
    assert paired_bootstrap(a, b, 300, seed=2) != first


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        (np.ones((2, 3)), np.ones((2, 4)), "3 sentences and b 4"),
        (np.ones(3), np.ones((2, 3)), r"\(3,\)"),
        (np.ones((0, 3)), np.ones((2, 3)), r"\(0, 3\)"),
        (np.full((2, 3), 0.5), np.ones((2, 3)), "a holds values"),
        (np.ones((2, 3)), np.full((2, 3), -1), "b holds values"),
    ],
)
def test_other_shapes_and_values_are_refused(a, b, words):
    with pytest.raises(ValueError, match=words):
        paired_bootstrap(a, b)
    if a.ndim == 2 and len(a):
        with pytest.raises(ValueError):
            mcnemar(a[0], b[0])
