"""The start of inverse dispersions against counts whose dispersion is known."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from scipy import stats

from cellstill.errors import InvalidArgumentError
from cellstill.vi.config import ModalityConfig, VAEConfig
from cellstill.vi.module import RegularizedVAE
from cellstill.vi.moments import inverse_dispersion
from cellstill.vi.start import start_from_data

N, N_GENES = 3000, 120


def simulate(theta, mean, seed=0, size=None):
    """Counts without any biology: all cells of one type."""
    rng = np.random.default_rng(seed)
    size = rng.lognormal(0, 0.3, N) if size is None else size
    mu = size[:, None] * mean
    return sp.csr_matrix(rng.poisson(rng.gamma(theta, mu / theta)), dtype=np.float32), size


@pytest.fixture(scope="module")
def known():
    rng = np.random.default_rng(1)
    return np.exp(rng.uniform(np.log(0.5), np.log(20), N_GENES)), rng.lognormal(1.0, 1.0, N_GENES)


def moments(counts, size, fraction=0.0, group=None, n_groups=1, otherwise=9.0):
    group = np.zeros(N, dtype=np.int64) if group is None else group
    return inverse_dispersion(counts, size, group, n_groups, biological_fraction=fraction, otherwise=otherwise)


def test_known_dispersions_are_recovered_in_rank_and_scale(known):
    theta, mean = known
    found = moments(*simulate(theta, mean))[0]
    assert stats.spearmanr(found, theta).statistic > 0.97
    ratio = np.log(found / theta)
    assert abs(np.median(ratio)) < 0.05
    assert np.quantile(np.abs(ratio), 0.9) < 0.35
    swapped = np.concatenate([theta[N_GENES // 2 :], theta[: N_GENES // 2]])
    assert stats.spearmanr(found, swapped).statistic < 0.5


def test_moments_are_those_of_the_definition():
    rng = np.random.default_rng(2)
    counts = rng.negative_binomial(0.7, 0.02, (N, 4))
    size = rng.lognormal(0, 0.5, N)
    group = rng.integers(0, 2, N)
    found = moments(sp.csr_matrix(counts), size, group=group, n_groups=2)
    for row in range(2):
        x, own = counts[group == row], size[group == row, None]
        mu = own * x.sum(axis=0) / own.sum()
        n = len(x)
        power = (mu**2).sum(axis=0)
        phi = (((x - mu) ** 2).sum(axis=0) * n / (n - 1) - mu.sum(axis=0)) / power
        # The weight of the median is 10 against sums of millions.
        np.testing.assert_allclose(found[row], 1 / phi, rtol=1e-4)


def test_what_is_left_to_biology_makes_the_start_closer_to_poisson(known):
    theta, mean = known
    counts, size = simulate(np.minimum(theta, 5.0), mean)
    np.testing.assert_allclose(moments(counts, size, 0.9), 10 * moments(counts, size), rtol=1e-10)


def test_groups_have_their_own(known):
    theta, mean = known
    half = np.arange(N) % 2
    # The second group has another mean, too, which is no overdispersion.
    one, size = simulate(theta, mean, 3)
    other, _ = simulate(theta / 4, 3 * mean, 4, size)
    mixed = sp.vstack([one[half == 0], other[half == 1]]).tocsr()
    order = np.concatenate([size[half == 0], size[half == 1]])
    found = moments(mixed, order, group=np.sort(half), n_groups=2)
    assert np.median(found[0] / theta) == pytest.approx(1.0, abs=0.1)
    assert np.median(found[1] / theta) == pytest.approx(0.25, abs=0.03)


def test_rare_features_join_the_others():
    mean = np.full(N_GENES, 20.0)
    mean[::2] = 2e-3
    found = moments(*simulate(np.full(N_GENES, 2.0), mean))[0]
    np.testing.assert_allclose(np.median(found[1::2]), 2.0, rtol=0.05)
    np.testing.assert_allclose(np.median(found[::2]), 2.0, rtol=0.15)
    assert (found > 0.01).all()


@pytest.mark.parametrize(
    ("mean", "theta", "expected"), [(50.0, 1e7, 1e3), (2e-3, 2.0, 9.0)], ids=["poisson", "all_genes_rare"]
)
def test_where_there_is_nothing_to_estimate(mean, theta, expected):
    found = moments(*simulate(np.full(30, theta), np.full(30, mean)), otherwise=9.0)[0]
    assert np.median(found) == pytest.approx(expected, rel=0.3)
    assert (found <= 1e3).all()


def test_group_without_cells_keeps_the_usual_start(known):
    theta, mean = known
    found = moments(*simulate(theta, mean), n_groups=3)
    np.testing.assert_allclose(found[1:], 9.0)


@pytest.mark.parametrize("fraction", [None, 0.0, 0.9])
def test_the_model_starts_from_them(known, fraction):
    theta, mean = known
    counts, _ = simulate(theta, mean)
    config = VAEConfig(
        modalities={"rna": ModalityConfig(n_vars=N_GENES, n_hidden=8, n_latent=2, background="free")},
        dispersion_start=fraction,
    )
    module = RegularizedVAE(config)
    start_from_data(module, {"rna": counts}, {}, {}, np.arange(N))
    start = module.modality("rna").dispersion.mean.detach()[0]
    if fraction is None:
        assert torch.equal(start, torch.full((N_GENES,), np.log(9.0)))
        return
    # Observed totals stand for sizes, and take part of the spread of the most frequent genes.
    ratio = start.numpy() - np.log(theta / (1 - fraction))
    assert stats.spearmanr(start, theta).statistic > 0.95
    assert abs(np.median(ratio)) < 0.15


def test_poisson_has_no_dispersion_to_start():
    counts, _ = simulate(np.full(30, 2.0), np.full(30, 2.0))
    sizes = {"n_vars": 30, "n_hidden": 8, "n_latent": 2, "background": None}
    poisson = ModalityConfig(likelihood="poisson", **sizes)
    config = VAEConfig(modalities={"atac": poisson, "rna": ModalityConfig(**sizes)}, dispersion_start=0.9)
    module = RegularizedVAE(config)
    start_from_data(module, {"atac": counts, "rna": counts}, {}, {}, np.arange(N))
    assert (module.modality("atac").dispersion.theta >= 1e8).all()
    assert module.modality("rna").dispersion.mean.detach().std() > 0
    with pytest.raises(InvalidArgumentError, match=r"dispersion_start=0.9 .* likelihood='poisson' has none"):
        VAEConfig(modalities={"rna": poisson}, dispersion_start=0.9)
