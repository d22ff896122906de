"""Parameters of the model, recovered from counts that it made itself."""

from __future__ import annotations

from dataclasses import dataclass

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from scipy import stats

from cellstill import AmbientRegularizedSCVI

N, N_GENES, N_TYPES, N_BATCHES, N_LANES = 2400, 100, 4, 3, 2


@dataclass
class Truth:
    """What counts were drawn from: per cell z and library; by gene what is named as in the model."""

    counts: np.ndarray
    z: np.ndarray
    library: np.ndarray
    native: np.ndarray
    background: np.ndarray
    scaling: np.ndarray
    theta: np.ndarray
    batch: np.ndarray
    lane: np.ndarray

    @property
    def unscaled(self):
        """Means before feature scaling."""
        return self.library[:, None] * (self.native + self.background[self.lane])

    @property
    def mean(self):
        """Means of the counts."""
        return self.unscaled * self.scaling[self.batch]


def simulate(seed=0):
    """Draw from the generative model of AmbientRegularizedSCVI, the decoder being one linear layer."""
    rng = np.random.default_rng(seed)
    batch, lane = rng.integers(0, N_BATCHES, N), rng.integers(0, N_LANES, N)
    z = (2.0 * rng.normal(size=(N_TYPES, 3)))[rng.integers(0, N_TYPES, N)] + 0.3 * rng.normal(size=(N, 3))
    native = np.logaddexp(0, z @ rng.normal(0, 0.6, (3, N_GENES)) + rng.normal(0.5, 1.0, N_GENES))
    background = 0.1 * native.mean(axis=0) * rng.lognormal(0, 0.3, (N_LANES, N_GENES))
    scaling = rng.lognormal(0, 0.3, (N_BATCHES, N_GENES))
    theta = np.exp(rng.uniform(np.log(1), np.log(10), (N_LANES, N_GENES)))
    library = rng.lognormal(0.7, 0.35, N)
    truth = Truth(np.empty(0), z, library, native, background, scaling, theta, batch, lane)
    own = theta[lane]
    truth.counts = rng.poisson(rng.gamma(own, truth.mean / own))
    return truth


@pytest.fixture(scope="module")
def truth():
    return simulate()


@pytest.fixture(scope="module")
def model(truth):
    obs = pd.DataFrame(
        {"batch": truth.batch.astype(str), "lane": truth.lane.astype(str)}, index=[f"cell{i}" for i in range(N)]
    )
    var = pd.DataFrame(index=[f"gene{i}" for i in range(N_GENES)])
    adata = ad.AnnData(sp.csr_matrix(truth.counts, dtype=np.float32), obs=obs, var=var)
    AmbientRegularizedSCVI.setup_anndata(
        adata,
        ambient_covariate_keys=["lane"],
        feature_scaling_covariate_keys=["batch"],
        dispersion_key="lane",
        library_size_key="batch",
    )
    model = AmbientRegularizedSCVI(adata, n_hidden=64, n_latent=8, background="free")
    return model.train(max_epochs=50, lr=2e-3, train_size=1.0, early_stopping=False, compile=True)


def part(model):
    return model.module.modality("rna")


def scaling_of(model):
    """Feature scaling, batches x genes."""
    codes = {column: torch.arange(N_BATCHES) for column in part(model).scaling.gamma.columns}
    return part(model).scaling(codes)[0].detach().exp().numpy()


def theta_of(model):
    return part(model).dispersion.mean.detach().exp().numpy()


def library_of(model):
    return model.get_latent_library_size().ravel()


def slope(x, y):
    return np.polyfit(x, y, 1)[0]


def contrasts(log_scaling):
    """What a gene's factors say beyond their mean, which the decoder can take up."""
    return (log_scaling - log_scaling.mean(axis=0)).ravel()


def mode_of_scaling(truth, prior):
    """Posterior mode of log scaling and a factor of each gene, given all else, under Gamma(prior, prior)."""
    x, mean = torch.from_numpy(truth.counts).double(), torch.from_numpy(truth.unscaled)
    theta, batch = torch.from_numpy(truth.theta[truth.lane]), torch.from_numpy(truth.batch)
    log_scaling = torch.zeros(N_BATCHES, N_GENES, dtype=torch.float64, requires_grad=True)
    common = torch.zeros(N_GENES, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([log_scaling, common], max_iter=100, line_search_fn="strong_wolfe")

    def step():
        optimiser.zero_grad()
        expected = mean * (log_scaling[batch] + common).exp()
        loss = ((x + theta) * (theta + expected).log() - x * expected.log()).sum()
        loss = loss + prior * (log_scaling.exp() - log_scaling).sum()
        loss.backward()
        return loss

    optimiser.step(step)
    return log_scaling.detach().numpy()


def agreement(found, truth):
    """Rank correlation, slope, and the median and the 90 % quantile of the log ratio."""
    ratio = np.log(found / truth)
    rank = stats.spearmanr(found.ravel(), truth.ravel()).statistic
    return (
        rank,
        slope(np.log(truth).ravel(), np.log(found).ravel()),
        np.median(ratio),
        np.quantile(np.abs(ratio - np.median(ratio)), 0.9),
    )


def test_inverse_dispersions_of_each_group_are_recovered_in_rank_and_scale(model, truth):
    # Found over two seeds: rank .965 and .974, slope .87 and .90, median -.10 and -.11. Overdispersion is taken for a
    # tenth larger than it is: by what the posteriors of z and library size leave open.
    rank, steepness, median, spread = agreement(theta_of(model), truth.theta)
    assert rank > 0.95
    assert 0.8 < steepness < 1.1
    assert abs(median) < 0.15
    assert spread < 0.4


def test_those_of_the_other_group_would_be_told_apart(model, truth):
    rank, steepness, _, spread = agreement(theta_of(model)[::-1], truth.theta)
    assert rank < 0.3
    assert steepness < 0.3
    assert spread > 1


def test_library_sizes_are_recovered_better_than_by_totals(model, truth):
    # Totals also depend on what a cell expresses. Found: r .946, against .894; slope .92.
    known, found = np.log(truth.library), np.log(library_of(model))
    totals = np.log(truth.counts.sum(axis=1))
    assert np.corrcoef(known, found)[0, 1] > 0.93
    assert 0.85 < slope(known, found) < 1.1
    assert np.std(found - known) < 0.8 * np.std(totals - known)


def test_ambient_profiles_differ_between_lanes_as_those_that_were_simulated(model, truth):
    # What the background of one lane has in common with the other's, the decoder can take up: only the ratio of lanes
    # tells it from native expression. Found over seeds 0 to 3: r .81 to .85, slope .60 to .75. The mean counts of the
    # lanes have r .50 to .59.
    def ratio(lanes):
        return np.log(lanes[0] / lanes[1])

    known, found = ratio(truth.background), ratio(model.get_ambient_profile().to_numpy())
    counted = ratio(np.stack([truth.counts[truth.lane == lane].mean(axis=0) for lane in range(N_LANES)]))
    r = np.corrcoef(known, found)[0, 1]
    assert r > 0.75
    assert 0.5 < slope(known, found) < 0.9
    assert r > np.corrcoef(known, counted)[0, 1] + 0.15
    shuffled = np.random.default_rng(0).permutation(found)
    assert abs(np.corrcoef(known, shuffled)[0, 1]) < 0.3
    assert abs(slope(known, shuffled)) < 0.3


def test_feature_scaling_is_at_the_mode_of_its_posterior(model, truth):
    found, known = contrasts(np.log(scaling_of(model))), contrasts(np.log(truth.scaling))
    mode = contrasts(mode_of_scaling(truth, 200.0))
    # The prior, Gamma(200, 200), leaves the mode at 0.82 of the truth with so many cells. Found: .98 of the mode.
    assert 0.75 < slope(known, mode) < 0.9
    assert slope(mode, found) == pytest.approx(1, abs=0.06)
    assert stats.spearmanr(mode, found).statistic > 0.98
    assert np.std(found - mode) < 0.03
    # Another prior would be told apart.
    for prior in (20.0, 1000.0):
        assert abs(slope(contrasts(mode_of_scaling(truth, prior)), found) - 1) > 0.1


def test_expected_counts_are_recovered(model, truth):
    both = model.get_normalized_expression(library_size="latent", include_background=True, return_numpy=True)
    ratio = np.log(both * scaling_of(model)[truth.batch] / truth.mean)
    # Cell by cell, with 360 counts in 100 genes: sd of the log .20, correlation before scaling .977.
    assert abs(np.median(ratio)) < 0.05
    assert ratio.std() < 0.25
    assert np.corrcoef(np.log(both).ravel(), np.log(truth.unscaled).ravel())[0, 1] > 0.97
    for batch in range(N_BATCHES):
        own = truth.batch == batch
        means = np.log((both * scaling_of(model)[truth.batch])[own].mean(axis=0) / truth.mean[own].mean(axis=0))
        # Found: .065 to .069, of which the counts' own error is .035 and what the prior keeps from scaling .055.
        assert np.std(means) < 0.08
        other = np.log(both[own].mean(axis=0) / truth.mean[own].mean(axis=0))
        assert np.std(other) > 2 * np.std(means)
