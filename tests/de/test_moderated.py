from __future__ import annotations

import re

import numpy as np
import pytest
from scipy import stats

from cellstill.de import PseudobulkConfig, pseudobulk_de
from cellstill.de.gene_tests import log_cpm
from cellstill.de.moderated import _precision, moderated_t
from cellstill.de.variances import learn_variances

PAIRED = np.column_stack([np.ones(12), np.repeat(np.eye(6), 2, axis=0)[:, 1:], np.tile([0.0, 1.0], 6)])


def two_groups(n_first: int, n_second: int) -> np.ndarray:
    return np.column_stack([np.ones(n_first + n_second), np.repeat([1.0, 0.0], [n_first, n_second])])


def negative_binomial(rng, mean, dispersion=0.02):
    return rng.poisson(mean * rng.gamma(1 / dispersion, dispersion, mean.shape))


@pytest.mark.parametrize("matrix", [two_groups(4, 4), two_groups(2, 7), PAIRED], ids=["equal", "unequal", "paired"])
def test_equals_weighted_regressions_one_by_one(matrix):
    from statsmodels.regression.linear_model import WLS

    rng = np.random.default_rng(0)
    depth = rng.uniform(0.3, 2.0, (len(matrix), 1))
    sums = 1 + negative_binomial(rng, depth * np.exp(rng.normal(3, 1.5, 80)))
    found = moderated_t(sums, matrix, lfc_threshold=0.0)

    logs = np.log(sums)
    factors = np.exp(np.median(logs - logs.mean(axis=0), axis=1))
    factors /= stats.gmean(factors)
    np.testing.assert_allclose(found.size_factors, factors)
    total = factors * stats.gmean(sums.sum(axis=1))
    prior = 2 * total / total.mean()
    y = np.log2((sums + prior[:, None]) / (total + 2 * prior)[:, None] * 1e6)
    weights = _precision(y, matrix, matrix, np.log2(total) - np.log2(1e6))
    fits = [WLS(y[:, gene], matrix, weights[:, gene]).fit() for gene in range(80)]
    posterior = learn_variances(np.array([fit.scale for fit in fits]), fits[0].df_resid)
    unscaled = np.array([fit.normalized_cov_params[-1, -1] for fit in fits])
    np.testing.assert_allclose(found.columns["lfc"], [fit.params[-1] for fit in fits], atol=1e-9)
    np.testing.assert_allclose(found.columns["lfc_se"], np.sqrt(posterior.mean() * unscaled), rtol=1e-9)
    z = np.abs(found.columns["lfc"])[:, None] / np.sqrt(unscaled[:, None] * posterior.values)
    np.testing.assert_allclose(
        found.columns["p_value"], (posterior.weights * 2 * stats.norm.sf(z)).sum(axis=1), rtol=1e-9
    )
    np.testing.assert_allclose(found.columns["fdr"], stats.false_discovery_control(found.columns["p_value"]))


@pytest.mark.parametrize("design", ["two_against_two", "three_against_five", "paired", "few_cells"])
def test_p_values_are_uniform_where_nothing_differs(design):
    matrix = {"two_against_two": two_groups(2, 2), "three_against_five": two_groups(3, 5)}.get(design, PAIRED)
    p_values = []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        depth = (
            rng.uniform(0.05, 1.0, (len(matrix), 1))
            if design == "few_cells"
            else rng.uniform(0.7, 1.4, (len(matrix), 1))
        )
        mean = np.exp(rng.normal(3.5, 1.2, 400)) * np.exp(rng.normal(0, 0.15, (len(matrix), 400)))
        sums = negative_binomial(rng, depth * mean)
        p_values.append(moderated_t(sums[:, sums.sum(axis=0) >= 10], matrix, lfc_threshold=0.0).columns["p_value"])
    every = np.concatenate(p_values)
    assert np.mean(every < 0.05) == pytest.approx(0.05, abs=0.015)
    assert np.mean(every < 0.001) < 0.0025
    calls = [(stats.false_discovery_control(p) <= 0.05).any() for p in p_values]
    assert sum(calls) <= 2


def test_weights_are_the_inverse_variances_of_observations():
    """Against the variance of log counts over many draws, up to a factor, in samples of four depths."""
    rng = np.random.default_rng(0)
    depth = np.repeat([1.0, 0.5, 0.25, 0.1], 2)[:, None]
    mean = np.exp(rng.uniform(np.log(20), np.log(2000), 1500))
    draws = np.stack([log_cpm(rng.poisson(depth * mean), depth[:, 0] * mean.sum()) for _ in range(60)])
    true = draws.var(axis=0)
    weights = _precision(draws[0], two_groups(4, 4), two_groups(4, 4), np.log2(depth[:, 0] * mean.sum()) - np.log2(1e6))
    scaled = weights * true
    low, high = np.quantile(scaled / np.median(scaled), [0.1, 0.9])
    assert low > 0.5
    assert high < 2.0


@pytest.mark.parametrize("depths", [(1, 1, 1, 0.05), (1, 1, 0.1, 0.1)], ids=["one_shallow", "two_shallow"])
def test_shallow_samples_weigh_no_more_and_cost_no_error_rate(depths):
    p_values, found = [], []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        depth = np.array([*depths, *depths])[:, None]
        mean = np.exp(rng.normal(1.5, 1.5, 1200))
        fold = np.where(np.arange(1200) < 100, 2.5, 1.0)
        expected = depth * mean * np.where(np.arange(8)[:, None] < 4, fold, 1.0)
        sums = negative_binomial(rng, expected * np.exp(rng.normal(0, 0.1, (8, 1200))))
        keep = sums.sum(axis=0) >= 10
        tests = moderated_t(sums[:, keep], two_groups(4, 4), lfc_threshold=0.0).columns
        null, rare = (fold == 1)[keep], (mean < 10)[keep]
        p_values.append(tests["p_value"][null & rare])
        found.append((tests["fdr"] <= 0.05)[~null].mean())
        values = log_cpm(sums[:, keep], sums.sum(axis=1) * 1.0)
        log_depth = np.log2(sums.sum(axis=1)) - np.log2(1e6)
        weights = _precision(values, two_groups(4, 4), np.ones((8, 1)), log_depth)
        assert (weights[3] <= weights[0] * (1 + 1e-9)).all()
    assert np.mean(np.concatenate(p_values) < 0.05) < 0.065
    assert np.mean(found) > 0.1


def test_depth_that_differs_between_groups_is_no_effect():
    """Genes of few counts would seem to move with a smaller prior count, or one that does not grow with depth."""
    p_values, moved = [], []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        depth = np.repeat([3.0, 1.0], 4)[:, None]
        mean = np.exp(rng.normal(0, 2, 1500))
        sums = negative_binomial(rng, depth * mean * np.exp(rng.normal(0, 0.15, (8, 1500))))
        keep = sums.sum(axis=0) >= 10
        found = moderated_t(sums[:, keep], two_groups(4, 4), lfc_threshold=0.0)
        p_values.append(found.columns["p_value"])
        moved.append(np.median(found.columns["lfc"][mean[keep] < 1]))
        assert found.notes == []
    assert np.mean(np.concatenate(p_values) < 0.05) == pytest.approx(0.05, abs=0.015)
    assert np.mean(moved) == pytest.approx(0, abs=0.2)


def test_groups_of_very_different_depth_are_noted():
    rng = np.random.default_rng(1)
    sums = rng.poisson(np.repeat([60.0, 10.0], 3)[:, None] * np.ones((6, 50)))
    found = moderated_t(sums, two_groups(3, 3), lfc_threshold=0.0)
    assert any(re.search(r"[56]\.\d times as deep", note) for note in found.notes)


def test_one_cell_full_of_one_gene_is_no_effect():
    """A gene that a single sample has hundreds of counts of, as a red blood cell among others brings."""
    rng = np.random.default_rng(2)
    sums = negative_binomial(rng, np.exp(rng.normal(3, 1, (1, 500))) * np.ones((12, 1)))
    sums[:, 0] = 1
    sums[3, 0] = 900
    found = moderated_t(sums, PAIRED, lfc_threshold=0.0).columns
    assert found["p_value"][0] > 0.01
    assert found["fdr"][0] > 0.2


def test_one_cell_full_of_one_gene_gives_its_donor_no_weight():
    rng = np.random.default_rng(2)
    sums = negative_binomial(rng, np.exp(rng.normal(2, 1.5, (1, 800))) * np.ones((12, 1)))
    sums = sums[:, sums.sum(axis=0) >= 10]
    sums[:, 0] = 1
    sums[3, 0] = 900
    values = log_cpm(sums, sums.sum(axis=1) * 1.0)
    log_depth = np.log2(sums.sum(axis=1)) - np.log2(1e6)
    of_donors, common = (
        _precision(values, PAIRED, columns, log_depth)[:, 0] for columns in (PAIRED, PAIRED[:, [0, -1]])
    )
    assert of_donors[2:4].min() > 2 * np.median(of_donors)
    assert common.max() < 2 * common.min()


def test_an_effect_floor_is_tested_at_its_edge():
    rng = np.random.default_rng(3)
    fold = np.where(np.arange(400) < 200, 2.0, 1.0)
    mean = 200 * np.where(np.arange(10)[:, None] < 5, fold, 1.0)
    sums = negative_binomial(rng, mean, dispersion=0.01)
    matrix = two_groups(5, 5)
    plain, floored = (moderated_t(sums, matrix, lfc_threshold=floor).columns for floor in (0.0, 1.0))
    assert (floored["p_value"] >= plain["p_value"]).all()
    np.testing.assert_array_equal(floored["lfc"], plain["lfc"])
    # The first half lies on the edge of the null, apart from what normalisation by all counts takes.
    shift = np.median(plain["lfc"][200:])
    on_edge = moderated_t(sums, matrix, lfc_threshold=1.0 + shift).columns["p_value"][:200]
    assert np.mean(on_edge < 0.05) == pytest.approx(0.05, abs=0.04)
    assert floored["p_value"][200:].min() > 0.05


def test_shrunken_fold_changes_come_beside_the_others(simulate):
    data = simulate([(f"d{i}", "treated" if i % 2 else "control", "a") for i in range(6)], n_genes=300)
    config = PseudobulkConfig(shrink_lfc=True)
    table = pseudobulk_de(
        data.counts,
        data.obs,
        data.genes,
        groupby="condition",
        group1="treated",
        group2="control",
        sample_key="donor",
        config=config,
    ).table
    shift = table["lfc"][data.lfc == 0].median()
    error, shrunken = (np.square(table[name] - data.lfc).mean() for name in ("lfc", "lfc_shrunken"))
    assert abs(shift) < 0.1
    assert shrunken < 0.8 * error


def test_too_few_shared_genes_are_normalised_by_totals_and_said():
    sums = np.random.default_rng(4).poisson(0.4, (6, 40))
    sums = sums[:, sums.sum(axis=0) > 0]
    found = moderated_t(sums, two_groups(3, 3), lfc_threshold=0.0)
    totals = sums.sum(axis=1)
    np.testing.assert_allclose(found.size_factors, totals / stats.gmean(totals))
    assert any("totals" in note for note in found.notes)
