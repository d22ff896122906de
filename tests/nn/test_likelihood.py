from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from scipy import special, stats

from cellstill.nn.likelihood import log_rising_factorial, nb_log_likelihood
from cellstill.nn.sparse import CSRRows


def rows(matrix: np.ndarray, dtype: torch.dtype = torch.float32) -> CSRRows:
    csr = sp.csr_matrix(matrix)
    return CSRRows(
        torch.as_tensor(csr.data, dtype=dtype),
        torch.as_tensor(csr.indices, dtype=torch.int64),
        torch.as_tensor(csr.indptr, dtype=torch.int64),
        matrix.shape[1],
    )


@pytest.mark.parametrize("theta", [1e-2, 0.5, 1.0, 30.0, 99.0, 101.0, 1e4, 1e6, 1e8])
def test_agrees_with_scipy(theta):
    rng = np.random.default_rng(0)
    mean = 10 ** rng.uniform(-4, 3, (6, 200))
    counts = rng.poisson(rng.gamma(max(theta, 0.1), mean / max(theta, 0.1)))
    library = mean.sum(axis=1)
    ours = nb_log_likelihood(
        rows(counts),
        torch.tensor(np.log(mean / library[:, None]), dtype=torch.float32),
        torch.tensor(np.log(library), dtype=torch.float32),
        torch.full((200,), float(np.log(theta))),
    )
    np.testing.assert_allclose(ours, stats.nbinom.logpmf(counts, theta, theta / (theta + mean)).sum(axis=1), rtol=2e-4)


def test_theta_is_per_gene_and_explicit_zeros_count_as_zeros():
    rng = np.random.default_rng(1)
    theta, mean = rng.uniform(0.2, 20, 40), rng.uniform(0.1, 5, (7, 40))
    counts = rng.poisson(mean).astype(np.float64)
    x = rows(counts, torch.float64)
    with_zero = sp.csr_matrix(np.where(counts == 0, 1e-30, counts))
    with_zero.data[with_zero.data < 1] = 0
    explicit = CSRRows(
        torch.tensor(with_zero.data),
        torch.tensor(with_zero.indices, dtype=torch.int64),
        torch.tensor(with_zero.indptr, dtype=torch.int64),
        40,
    )
    arguments = (torch.tensor(np.log(mean)), torch.zeros(7, dtype=torch.float64), torch.tensor(np.log(theta)))
    expected = stats.nbinom.logpmf(counts, theta, theta / (theta + mean)).sum(axis=1)
    # Stirling's series is exact to 4e-8 per count.
    np.testing.assert_allclose(nb_log_likelihood(x, *arguments), expected, rtol=1e-8)
    np.testing.assert_allclose(nb_log_likelihood(explicit, *arguments), expected, rtol=1e-8)


def test_gradients():
    rng = np.random.default_rng(2)
    x = rows(rng.poisson(2.0, (3, 5)).astype(np.float64), torch.float64)
    log_rate = torch.tensor(rng.normal(-1, 1, (3, 5)), requires_grad=True)
    log_library = torch.tensor(rng.normal(2, 0.3, 3), requires_grad=True)
    log_theta = torch.tensor(np.log([0.1, 1.0, 10.0, 150.0, 1e4]), requires_grad=True)
    assert torch.autograd.gradcheck(lambda *a: nb_log_likelihood(x, *a), (log_rate, log_library, log_theta))


@pytest.mark.parametrize("theta", [1e-4, 1.0, 99.9, 100.1, 1e3, 1e8])
def test_rising_factorial_does_not_cancel(theta):
    x = torch.tensor([0.0, 1.0, 2.0, 3.0, 50.0, 1000.0])
    exact = [float(np.sum(np.log(theta + np.arange(int(n))))) for n in x]
    np.testing.assert_allclose(log_rising_factorial(x, torch.tensor(theta)), exact, rtol=1e-5, atol=1e-5)
    # What float32 does without care, at the value that the naive difference is known to lose.
    if theta == 1e8:
        naive = torch.lgamma(x + theta) - torch.lgamma(torch.tensor(theta))
        assert float(naive[3]) == 0.0
        assert exact[3] == pytest.approx(special.gammaln(3 + theta) - special.gammaln(theta), rel=1e-6)
