"""Dropout by 16 random bits: its frequencies, its expectation, its seed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from cellstill.nn.compiled import compiled
from cellstill.nn.dropout import drop


@pytest.fixture(params=[False, True], ids=["torch", "compiled"], autouse=True)
def mode(request):
    with compiled(request.param):
        yield request.param


@pytest.mark.parametrize("p", [1e-4, 0.1, 0.5, 0.9])
def test_frequency_and_expectation(p):
    torch.manual_seed(0)
    n = 400_000
    dropped = drop(torch.ones(n), p, True)
    n_zero = int((dropped == 0).sum())
    assert stats.binomtest(n_zero, n, p).pvalue > 1e-3
    kept = dropped[dropped != 0]
    # p is rounded to a multiple of 2^-16.
    np.testing.assert_allclose(kept, 1 / (1 - p), rtol=2**-17 / (1 - p) + 1e-7)
    assert float(dropped.mean()) == pytest.approx(1, abs=5 * (p / (1 - p) / n) ** 0.5)


def test_values_that_share_a_random_word_are_dropped_alike_and_independently():
    torch.manual_seed(1)
    zero = (drop(torch.ones(400_000), 0.3, True) == 0).view(-1, 4).double().numpy()
    np.testing.assert_allclose(zero.mean(axis=0), 0.3, atol=5 * (0.21 / 1e5) ** 0.5)
    correlation = np.corrcoef(zero.T)[~np.eye(4, dtype=bool)]
    assert np.abs(correlation).max() < 5 / 1e5**0.5


@pytest.mark.parametrize("n", [0, 1, 5, 8])
def test_any_number_of_values(n):
    assert drop(torch.ones(n), 0.5, True).shape == (n,)


def test_compiled_or_not_the_same_values_are_dropped():
    x, found = torch.randn(1003), []
    for mode in (False, True):
        torch.manual_seed(2)
        with compiled(mode):
            found.append(drop(x, 0.4, True))
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_the_seed_decides():
    x = torch.randn(1000)
    torch.manual_seed(3)
    first, other = drop(x, 0.4, True), drop(x, 0.4, True)
    torch.manual_seed(3)
    torch.testing.assert_close(first, drop(x, 0.4, True), rtol=0, atol=0)
    assert not torch.equal(first, other)


def test_nothing_is_dropped_outside_training_or_with_probability_zero():
    x = torch.randn(100)
    assert drop(x, 0.4, False) is x
    assert drop(x, 0.0, True) is x


def test_gradients_pass_where_values_did():
    x = torch.randn(1000, requires_grad=True)
    dropped = drop(x, 0.25, True)
    dropped.sum().backward()
    torch.testing.assert_close(x.grad, (dropped != 0) / 0.75)
