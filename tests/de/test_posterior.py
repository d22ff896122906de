from __future__ import annotations

import numpy as np
import pytest
from scipy import integrate, stats

from cellstill.de.posterior import effect_if_any, expected_fdr, normal_scale, prob_effect, shrunken_effect
from cellstill.de.variances import moderate_variances


def test_probabilities_are_calibrated_where_the_prior_is_known():
    """Of the genes given a probability, that share has the effect."""
    rng = np.random.default_rng(1)
    true = np.where(rng.random(20_000) < 0.2, rng.normal(0, 1, 20_000), 0.0)
    scale = rng.uniform(0.15, 0.6, true.shape)
    prob = prob_effect(rng.normal(true, scale), scale, 1e6, 0.25)
    has_effect = np.abs(true) > 0.25
    for low, high in ((0.05, 0.2), (0.2, 0.5), (0.5, 0.8), (0.8, 0.95), (0.95, 1.0)):
        within = (prob >= low) & (prob < high)
        tolerance = 4 * np.sqrt(0.25 / within.sum()) + 0.01
        assert has_effect[within].mean() == pytest.approx(prob[within].mean(), abs=tolerance)


def test_probability_equals_the_integral_over_the_estimated_prior():
    """With all effects normal the prior is one normal, and the posterior is in closed form."""
    rng = np.random.default_rng(2)
    true = rng.normal(0, 1.0, 8_000)
    scale = np.full(true.shape, 0.5)
    loc = rng.normal(true, scale)
    prob = prob_effect(loc, scale, 1e6, 0.5)
    for gene in range(0, 40, 4):
        density = lambda effect, gene=gene: stats.norm.pdf(loc[gene], effect, 0.5) * stats.norm.pdf(effect)  # noqa: E731
        oracle = 1 - integrate.quad(density, -0.5, 0.5)[0] / integrate.quad(density, -10, 10)[0]
        assert prob[gene] == pytest.approx(oracle, abs=0.08)


def test_a_gene_known_badly_is_not_called():
    rng = np.random.default_rng(3)
    loc, scale = rng.normal(0, 0.1, 500), np.full(500, 0.1)
    loc[0], scale[0] = 3.0, 3.0
    flat = stats.norm.sf(0.25, 3.0, 3.0) + stats.norm.cdf(-0.25, 3.0, 3.0)
    assert flat > 0.9
    assert prob_effect(loc, scale, 20, 0.25)[0] < 0.2


def small_and_large(rng):
    return rng.choice([-1, 1], 2000) * (0.3 + rng.exponential(0.7, 2000))


def large_only(rng):
    return rng.choice([-1, 1], 2000) * rng.uniform(1.0, 2.5, 2000)


def upward_only(rng):
    return rng.normal(1.2, 0.2, 2000)


@pytest.mark.parametrize("effects", [small_and_large, large_only, upward_only])
@pytest.mark.parametrize(("n_donors", "share"), [(2, 0.1), (3, 0.0), (4, 0.1), (4, 0.3), (8, 0.1)])
@pytest.mark.parametrize("delta", [0.0, 0.25])
def test_the_called_set_keeps_its_expected_fdr(effects, n_donors, share, delta):
    rng = np.random.default_rng(4)
    n_false, n_called = 0, 0
    for _ in range(4):
        sd = np.sqrt(0.06 * 6 / rng.chisquare(6, 2000))[:, None]
        true = np.where(rng.random(2000) < share, effects(rng), 0.0)
        treated, control = rng.normal(true[:, None], sd, (2000, n_donors)), rng.normal(0, sd, (2000, n_donors))
        df = 2 * n_donors - 2
        pooled = (treated.var(axis=1, ddof=1) + control.var(axis=1, ddof=1)) / 2
        moderated, total_df = moderate_variances(pooled, df)
        loc, scale = treated.mean(axis=1) - control.mean(axis=1), np.sqrt(moderated * 2 / n_donors)
        called = expected_fdr(prob_effect(loc, scale, total_df, delta)) <= 0.05
        n_called += called.sum()
        n_false += (called & ~(np.abs(true) > delta)).sum()
    if share == 0:
        assert n_called <= 2
    else:
        assert n_called > 20 * n_donors
        assert n_false / n_called < 0.05 + 2 * np.sqrt(0.05 * 0.95 / n_called)


def test_expected_fdr_equals_a_loop_with_ties():
    prob = np.array([0.9, 1.0, 0.5, 0.9, 0.0, 0.7, 0.9, 1.0])
    oracle = [np.mean([1 - other for other in prob if other >= own]) for own in prob]
    np.testing.assert_allclose(expected_fdr(prob), oracle)


def test_shrunken_effects_are_nearer_the_truth_and_keep_large_ones():
    rng = np.random.default_rng(2)
    true = np.where(rng.random(5000) < 0.1, rng.choice([-1, 1], 5000) * (0.5 + rng.exponential(0.7, 5000)), 0.0)
    scale = rng.uniform(0.2, 0.8, true.shape)
    estimate = rng.normal(true, scale)
    shrunken = shrunken_effect(estimate, scale, 1e6)
    assert np.square(shrunken - true).mean() < 0.35 * np.square(estimate - true).mean()
    noise = true == 0
    assert np.abs(shrunken[noise]).mean() < 0.3 * np.abs(estimate[noise]).mean()
    large = (np.abs(true) > 2) & (scale < 0.3)
    np.testing.assert_allclose(shrunken[large], estimate[large], rtol=0.1)


def test_a_normal_test_with_the_scale_returned_has_the_p_value_given():
    loc, p_value = np.array([-2.0, 0.3, 1.0]), np.array([1e-8, 0.4, 0.03])
    scale = normal_scale(loc, np.full(3, 9.0), p_value)
    np.testing.assert_allclose(2 * stats.norm.sf(np.abs(loc) / scale), p_value, rtol=1e-9)


def test_an_estimate_near_zero_is_not_taken_for_a_precise_one():
    error = np.full(3, 0.3)
    loc = np.array([1e-6, 0.0, -0.01])
    scale = normal_scale(loc, error, 2 * stats.t.sf(np.abs(loc) / error, 8))
    np.testing.assert_allclose(scale, error)


def test_an_effect_if_any_has_the_mean_and_spread_of_the_true_ones():
    """Of effects from N(8, 1), half of them 0, measured with a normal error of 1: the closed form."""
    rng, n = np.random.default_rng(0), 20000
    estimate = np.where(rng.random(n) < 0.5, rng.normal(8, 1, n), 0.0) + rng.normal(size=n)
    prob, mean, variance = effect_if_any(estimate, np.ones(n), 1e6)
    there = (estimate > 6) & (estimate < 10)
    assert (prob[there] > 0.99).all()
    np.testing.assert_allclose(mean[there], (8 + estimate[there]) / 2, atol=0.2)
    np.testing.assert_allclose(variance[there], 0.5, atol=0.15)
    np.testing.assert_allclose(prob * mean, shrunken_effect(estimate, np.ones(n), 1e6), rtol=1e-10)
