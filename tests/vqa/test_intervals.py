"""The bootstrap against distributions that are known."""

import math

import numpy as np
import pytest

from bench.vqa.intervals import interval, resampled


def mean(sums, units):
    return sums[..., 0] / units


def binomial_quantile(share: float, trials: int, probability: float) -> int:
    """The least k with P(X <= k) >= share."""
    below = 0.0
    for k in range(trials + 1):
        below += math.comb(trials, k) * probability**k * (1 - probability) ** (trials - k)
        if below >= share:
            return k
    return trials


@pytest.mark.parametrize(("right", "trials"), [(50, 100), (30, 400), (1, 20)])
def test_of_right_and_wrong_it_is_the_binomial(right, trials):
    """Drawing again from ones and zeros gives Binomial(trials, right / trials): its quantiles, but for one
    step of Monte Carlo error."""
    rows = [[1.0]] * right + [[0.0]] * (trials - right)
    low, high = interval(resampled(np.array(rows), mean, seed=0, resamples=20_000))
    expected = [binomial_quantile(share, trials, right / trials) for share in (0.025, 0.975)]
    assert abs(low * trials - expected[0]) <= 1 and abs(high * trials - expected[1]) <= 1


def test_of_numbers_it_is_the_normal():
    values = np.random.default_rng(1).random(2000)
    samples = resampled(values[:, None], mean, seed=0, resamples=4000)
    error = values.std() / math.sqrt(len(values))
    assert abs(samples.std() / error - 1) < 0.05
    low, high = interval(samples)
    assert abs(low - (values.mean() - 1.96 * error)) < 0.1 * error
    assert abs(high - (values.mean() + 1.96 * error)) < 0.1 * error


def test_it_is_seeded_and_equal_units_give_no_width():
    rows = np.arange(10.0)[:, None]
    assert (resampled(rows, mean, seed=3) == resampled(rows, mean, seed=3)).all()
    assert (resampled(rows, mean, seed=3) != resampled(rows, mean, seed=4)).any()
    assert interval(resampled(np.ones((5, 1)), mean, seed=0)) == (1.0, 1.0)


def test_units_keep_their_columns_together():
    """Ratios of sums: the second column is twice the first in every unit, and so in every sample."""
    rows = np.array([[1.0, 2.0], [3.0, 6.0], [5.0, 10.0]])
    assert np.allclose(resampled(rows, lambda sums, units: sums[..., 1] / sums[..., 0], seed=0), 2)


@pytest.mark.parametrize("rows", [np.zeros((0, 1)), np.zeros(3)])
def test_rows_have_units_and_columns(rows):
    with pytest.raises(ValueError, match="rows must have shape"):
        resampled(rows, mean, seed=0)
