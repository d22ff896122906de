import itertools

import mpmath
import numpy as np
import pytest
import torch

from cellstill.nn.special import (
    digamma_difference,
    digamma_excess,
    log1p_excess,
    log_rising_factorial,
    stirling_error,
)

mpmath.mp.dps = 40

# Exact in float32 and not powers of two, whose quotients would not be rounded; 1e-4 to 1e8 and beyond.
THETA = [1.25 * 2.0**k for k in range(-20, 34, 2)]
COUNTS = [0.375, 1.0, 2.0, 5.0, 100.0, 1e4, 1e6]
PAIRS = np.array(list(itertools.product(COUNTS, THETA)))
# Ten roundings of the terms that take off the shift, m = 1 in float32 and 10 in float64, and are m times the result.
PRECISIONS = [pytest.param(torch.float32, 6e-7, id="float32"), pytest.param(torch.float64, 1.1e-14, id="float64")]


def assert_near(got, truth, tolerance, floor=0.0):
    """Error relative to the truth, or to ``floor`` where that is larger."""
    for value, exact in zip(got.tolist(), truth, strict=True):
        assert abs(value - exact) <= tolerance * max(abs(exact), floor)


def of_pairs(function):
    return [function(*map(mpmath.mpf, pair)) for pair in PAIRS]


@pytest.mark.parametrize(("dtype", "bound"), PRECISIONS)
def test_log_rising_factorial(dtype, bound):
    x, theta = torch.tensor(PAIRS.T, dtype=dtype)
    truth = of_pairs(lambda x, theta: mpmath.loggamma(x + theta) - mpmath.loggamma(theta))
    assert_near(log_rising_factorial(x, theta), truth, bound, floor=1)
    assert_near(log_rising_factorial(torch.zeros_like(theta), theta), [0] * len(truth), bound, floor=1)


def test_log_rising_factorial_where_the_difference_of_log_gammas_is_lost():
    x, theta = torch.tensor([3.0]), torch.tensor([1e8])
    assert float(torch.lgamma(x + theta) - torch.lgamma(theta)) == 0
    assert float(log_rising_factorial(x, theta)) == pytest.approx(3 * np.log(1e8), rel=1e-6)


@pytest.mark.parametrize(("dtype", "bound"), PRECISIONS)
def test_digamma_difference(dtype, bound):
    x, theta = torch.tensor(PAIRS.T, dtype=dtype)
    truth = of_pairs(lambda x, theta: mpmath.digamma(x + theta) - mpmath.digamma(theta))
    assert_near(digamma_difference(x, theta), truth, bound)


@pytest.mark.parametrize(("dtype", "bound"), PRECISIONS)
def test_digamma_excess_is_relatively_exact_where_it_is_a_billionth_of_the_difference(dtype, bound):
    x, theta = torch.tensor(PAIRS.T, dtype=dtype)
    truth = of_pairs(lambda x, theta: mpmath.digamma(x + theta) - mpmath.digamma(theta) - mpmath.log1p(x / theta))
    assert_near(digamma_excess(x, theta), truth, bound)


@pytest.mark.parametrize(("dtype", "bound"), PRECISIONS)
def test_stirling_error(dtype, bound):
    z = torch.tensor(sorted({*COUNTS, *THETA}), dtype=dtype)
    truth = [
        mpmath.loggamma(v) - (v - mpmath.mpf(1) / 2) * mpmath.log(v) + v - mpmath.log(2 * mpmath.pi) / 2
        for v in map(mpmath.mpf, z.tolist())
    ]
    # Absolute, as it is added to log-probabilities.
    assert_near(stirling_error(z), truth, bound, floor=1)


@pytest.mark.parametrize(("dtype", "bound"), PRECISIONS)
def test_log1p_excess(dtype, bound):
    ratio = torch.tensor(
        np.r_[10.0 ** np.arange(-20, 9), np.linspace(0.75, 1.3, 111), 1 + 2.0 ** -np.arange(5, 20), 1], dtype=dtype
    )
    t = (ratio.double() - 1).to(dtype)
    exact = [v - 1 - mpmath.log(v) for v in map(mpmath.mpf, ratio.tolist())]
    # Beyond the series' bounds two numbers of 0.2 are subtracted to give 0.02, so ten roundings become a hundred.
    assert_near(log1p_excess(t, ratio), exact, 100 * torch.finfo(dtype).eps / 2)


def test_log1p_excess_knows_a_ratio_that_its_deviation_does_not():
    t, ratio = torch.tensor([-1.0]), torch.tensor([1e-20])
    assert float(log1p_excess(t, ratio)) == pytest.approx(-1 + 20 * np.log(10), rel=1e-6)
