from __future__ import annotations

import numpy as np
import pytest
from scipy import integrate, stats

from cellstill.de.posterior import prob_effect
from cellstill.de.variances import learn_variances, moderate_variances


@pytest.mark.parametrize("prior_df", [4.0, 15.0])
def test_moderation_finds_the_prior_it_was_drawn_from(prior_df):
    rng = np.random.default_rng(0)
    df, scale = 6, 0.3
    true = scale * prior_df / rng.chisquare(prior_df, 20_000)
    variances = true * rng.chisquare(df, true.shape) / df
    moderated, total_df = moderate_variances(variances, df)
    assert np.median(total_df) - df == pytest.approx(prior_df, rel=0.1)
    oracle = (prior_df * scale + df * variances) / (prior_df + df)
    # A thousandth in the upper tail may be taken for outliers, and keep more of their own variance.
    assert np.quantile(np.abs(moderated / oracle - 1), 0.999) < 0.1
    assert np.log(moderated / true).var() < 0.7 * np.log(variances / true).var()


def test_genes_that_vary_far_more_keep_their_own_variance():
    """Few of them, as genes that some donors only express, and the prior of all others is as without them."""
    rng = np.random.default_rng(0)
    df, prior_df = 5, 20.0
    variances = 0.3 * prior_df / rng.chisquare(prior_df, 4000) * rng.chisquare(df, 4000) / df
    wild = np.arange(40)
    variances[wild] = 60 * rng.chisquare(df, 40) / df
    moderated, total_df = moderate_variances(variances, df)
    _, clean_df = moderate_variances(variances[40:], df)
    assert np.median(total_df[40:]) == pytest.approx(np.median(clean_df), rel=0.15)
    assert np.median(total_df[wild]) < df + 0.1 * (np.median(total_df) - df)
    np.testing.assert_allclose(moderated[wild] / variances[wild], 1, atol=0.35)
    naive = (prior_df * 0.3 + df * variances[wild]) / (prior_df + df)
    assert (moderated[wild] > 2 * naive).all()


def test_genes_of_one_variance_share_it():
    rng = np.random.default_rng(0)
    # Equal steps of probability vary a little less than a sample would, so no variance between genes is left.
    variances = 2.0 * stats.chi2.ppf((np.arange(500) + 0.5) / 500, 4) / 4
    moderated, total_df = moderate_variances(rng.permutation(variances), 4)
    np.testing.assert_allclose(total_df, 1e6)
    np.testing.assert_allclose(moderated, 2.0, rtol=0.02)


def test_a_gene_without_variation_is_moderated_upwards():
    variances = np.append(0.0, 0.5 * np.random.default_rng(0).chisquare(3, 300) / 3)
    moderated, _ = moderate_variances(variances, 3)
    assert np.isfinite(moderated).all()
    assert 0 < moderated[0] <= moderated[1:].min()


def test_one_gene_and_constant_genes_do_not_break():
    assert np.isfinite(moderate_variances(np.array([0.3]), 2)[0]).all()
    moderated, df = moderate_variances(np.zeros(5), 2)
    assert (moderated > 0).all()
    assert (prob_effect(np.zeros(5), np.sqrt(moderated), df, 0.1) < 0.5).all()


def drawn(rng, true, df):
    """Residual variances, and effects of unit variance factor where there is none."""
    return true * rng.chisquare(df, true.shape) / df, rng.normal(0, np.sqrt(true))


@pytest.mark.parametrize(("df", "prior_df"), [(2, 8.0), (8, 4.0), (8, 30.0), (60, 10.0)])
def test_p_values_are_those_of_the_moderated_t_where_its_prior_holds(df, prior_df):
    rng = np.random.default_rng(0)
    true = 0.3 * prior_df / rng.chisquare(prior_df, 6000)
    variances, effect = drawn(rng, true, df)
    found = learn_variances(variances, df).two_sided(effect, np.ones(6000))
    moderated = (prior_df * 0.3 + df * variances) / (prior_df + df)
    oracle = 2 * stats.t.sf(np.abs(effect) / np.sqrt(moderated), prior_df + df)
    assert np.quantile(np.abs(found - oracle), 0.95) < 0.03
    assert np.mean(found < 0.01) == pytest.approx(0.01, abs=0.004)


@pytest.mark.parametrize(("share", "ratio"), [(0.1, 3.0), (0.1, 10.0), (0.5, 6.0)])
def test_p_values_are_uniform_where_variances_come_in_kinds(share, ratio):
    p_values = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        variances, effect = drawn(rng, np.where(rng.random(2000) < share, 0.1 * ratio, 0.1), 8)
        p_values.append(learn_variances(variances, 8).two_sided(effect, np.ones(2000)))
    every = np.concatenate(p_values)
    for level in (0.05, 1e-2, 1e-3, 1e-4):
        assert np.mean(every < level) == pytest.approx(level, abs=4 * np.sqrt(level / every.size))


def test_the_posterior_is_that_of_the_true_distribution():
    rng = np.random.default_rng(1)
    true = rng.choice([0.1, 1.0], 20_000, p=[0.8, 0.2])
    variances, _ = drawn(rng, true, 5)
    found = learn_variances(variances, 5).mean()
    likelihood = np.stack([stats.chi2.pdf(5 * variances / value, 5) / value for value in (0.1, 1.0)], axis=1)
    weights = likelihood * [0.8, 0.2]
    oracle = weights @ [0.1, 1.0] / weights.sum(axis=1)
    assert np.corrcoef(np.log(found), np.log(oracle))[0, 1] > 0.98
    assert np.mean(np.abs(np.log(found / oracle))) < 0.1


def test_p_value_with_a_floor_is_an_integral_over_the_posterior():
    rng = np.random.default_rng(2)
    posterior = learn_variances(*[0.2 * rng.chisquare(6, 300) / 6, 6])
    effect, unit = np.array([0.8, -0.1, 0.5]), np.array([0.5, 2.0, 1.0])
    posterior = type(posterior)(posterior.values, posterior.weights[:3])
    found = posterior.two_sided(effect, unit, threshold=0.3)
    for gene in range(3):

        def density(y, gene=gene):
            errors = np.sqrt(unit[gene] * posterior.values)
            return posterior.weights[gene] @ stats.norm.pdf(y, 0.3, errors)

        size = abs(effect[gene])
        inside = integrate.quad(density, -size, size, limit=200)[0]
        assert found[gene] == pytest.approx(min(1 - inside, 1), abs=1e-6)


@pytest.mark.parametrize("n_genes", [1, 3, 12])
def test_few_genes_lean_on_the_shape(n_genes):
    """Alone, a handful of variances would be taken for known, and p-values be those of a normal."""
    small = []
    for seed in range(3000 // n_genes):
        rng = np.random.default_rng(seed)
        variances, effect = drawn(rng, 0.2 * 10 / rng.chisquare(10, n_genes), 4)
        small.append(learn_variances(variances, 4).two_sided(effect, np.ones(n_genes)) < 0.01)
    naive = 2 * stats.norm.sf(stats.t.isf(0.005, 4))
    assert naive < 0.001
    assert np.mean(np.concatenate(small)) < {1: 0.05, 3: 0.03, 12: 0.02}[n_genes]


@pytest.mark.parametrize("scale", [1e-6, 1e4])
def test_the_unit_of_variances_does_not_matter(scale):
    rng = np.random.default_rng(3)
    variances, effect = drawn(rng, rng.gamma(2.0, 1.0, 400), 6)
    found = learn_variances(variances, 6).two_sided(effect, np.ones(400))
    scaled = learn_variances(scale * variances, 6).two_sided(np.sqrt(scale) * effect, np.ones(400))
    np.testing.assert_allclose(scaled, found, rtol=1e-6)


def test_genes_without_variation_get_finite_p_values():
    flat = learn_variances(np.zeros(5), 2).two_sided(np.zeros(5), np.ones(5))
    assert np.isfinite(flat).all()
    mixed = learn_variances(np.append(0.0, 0.5 * np.random.default_rng(0).chisquare(3, 300) / 3), 3)
    assert mixed.mean()[0] == pytest.approx(mixed.mean().min())
    assert mixed.mean()[0] > 0
