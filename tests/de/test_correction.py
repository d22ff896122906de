"""The error of a correction enters the comparison of corrected counts."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm

from cellstill.de import PseudobulkConfig, pseudobulk_de
from cellstill.de.correction import correction_variance, widen
from cellstill.de.gene_tests import GeneTests
from cellstill.de.moderated import moderated_t
from cellstill.de.variances import VariancePosterior

N_GENES = 2000


def test_the_scatter_of_changes_is_found_at_each_level_whatever_a_tenth_of_the_genes_does():
    rng = np.random.default_rng(0)
    level = rng.uniform(np.log(2), np.log(2000), N_GENES)
    sums = np.exp(level)[None] * np.ones((6, 1))
    sd = 0.3 - 0.03 * level
    change = sd * rng.standard_normal(N_GENES)
    change[:: N_GENES // 200] += 3.0
    found = np.sqrt(correction_variance(change, sums))
    np.testing.assert_allclose(found, sd, rtol=0.25)
    assert abs(np.mean(found / sd) - 1) < 0.1


def test_few_genes_share_the_mean_square_of_all():
    change = np.array([0.1, -0.3, 0.2])
    np.testing.assert_allclose(correction_variance(change, np.ones((4, 3))), np.square(change).mean())


def test_variance_that_is_added_widens_the_normal_of_the_test():
    posterior = VariancePosterior(np.array([0.04, 0.25]), np.array([[0.3, 0.7], [1.0, 0.0]]))
    effect, unit, added = np.array([0.8, -1.1]), np.array([0.5, 0.7]), np.array([0.02, 0.3])
    found = posterior.two_sided(effect, unit, 0.2, added)
    sd = np.sqrt(unit[:, None] * posterior.values + added[:, None])
    tails = norm.sf(np.abs(effect)[:, None] - 0.2, scale=sd) + norm.sf(np.abs(effect)[:, None] + 0.2, scale=sd)
    np.testing.assert_allclose(found, (posterior.weights * tails).sum(axis=1))


@pytest.fixture(scope="module")
def misled():
    """Sums of 12 samples in two batches without any effect, before and after a correction that errs.

    It shifts the treated of one batch at random, gene by gene, and draws samples of a batch and group together.
    """
    rng = np.random.default_rng(1)
    batch, treated = np.repeat([0, 1], 6), np.tile([0, 0, 0, 1, 1, 1], 2)
    design = np.column_stack([np.ones(12), batch, treated]).astype(float)
    mean = np.exp(rng.uniform(np.log(20), np.log(2000), N_GENES))
    donors = np.exp(0.2 * rng.standard_normal((12, N_GENES)))
    raw = rng.poisson(mean * donors).astype(float)
    cell = batch * 2 + treated
    logs = np.log(raw + 1)
    centre = np.stack([logs[cell == group].mean(axis=0) for group in range(4)])[cell]
    shift = 0.15 * rng.standard_normal(N_GENES)[None] * (cell == 3)[:, None]
    corrected = np.rint(np.exp(centre + 0.9 * (logs - centre) + shift))
    return raw, corrected, design


def test_a_correction_that_errs_makes_no_false_calls(misled):
    raw, corrected, design = misled
    blind = moderated_t(corrected, design, lfc_threshold=0.0).columns
    found = moderated_t(corrected, design, lfc_threshold=0.0, uncorrected=raw).columns
    honest = moderated_t(raw, design, lfc_threshold=0.0).columns
    np.testing.assert_array_equal(found["lfc"], blind["lfc"])
    assert (blind["p_value"] < 0.05).mean() > 0.085
    assert 0.03 < (found["p_value"] < 0.05).mean() < 0.065
    assert (found["p_value"] < 0.001).mean() < 0.003
    assert np.median(found["lfc_se"] / honest["lfc_se"]) > 1.1
    assert (found["lfc_se"] > blind["lfc_se"]).mean() > 0.99


def test_without_a_correction_corrected_counts_are_tested_like_raw_ones(misled):
    raw, _, design = misled
    found = moderated_t(raw, design, lfc_threshold=0.3, shrink_lfc=True, uncorrected=raw).columns
    expected = moderated_t(raw, design, lfc_threshold=0.3, shrink_lfc=True).columns
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, err_msg=name)


def test_wald_tests_are_widened_and_keep_what_was_filtered():
    rng = np.random.default_rng(2)
    n = 400
    sums = np.exp(rng.uniform(2, 6, n))[None] * np.ones((4, 1))
    change = 0.3 * rng.standard_normal(n)
    raw_lfc = rng.standard_normal(n)
    error = np.full(n, 0.2)
    p_value = 2 * norm.sf(np.abs(raw_lfc + change) / error)
    p_value[3] = np.nan
    fdr = np.where(np.arange(n) < 5, np.nan, p_value)
    corrected = GeneTests({"lfc": raw_lfc + change, "lfc_se": error, "p_value": p_value, "fdr": fdr}, np.ones(4), ["x"])
    raw = GeneTests({"lfc": raw_lfc, "lfc_se": np.full(n, 0.4)}, np.ones(4), [])
    found = widen(corrected, raw, sums, 0.5)
    total = np.sqrt(0.4**2 + correction_variance(change, sums))
    np.testing.assert_allclose(found.columns["lfc_se"], total)
    assert 0.24 < np.sqrt(correction_variance(change, sums)).mean() < 0.36
    size = np.abs(raw_lfc + change)
    expected = norm.sf((size - 0.5) / total) + norm.sf((size + 0.5) / total)
    kept = np.arange(n) != 3
    np.testing.assert_allclose(found.columns["p_value"][kept], expected[kept])
    assert np.isnan(found.columns["p_value"][3])
    np.testing.assert_array_equal(np.isnan(found.columns["fdr"]), np.arange(n) < 5)
    assert found.notes == ["x"]


@pytest.mark.parametrize("method", ["ttest", "deseq2", "wilcoxon"])
def test_each_method_says_or_carries_what_the_correction_adds(method):
    rng = np.random.default_rng(3)
    n_genes, per_sample = 120, 10
    obs = pd.DataFrame({"sample": np.repeat([f"s{k}" for k in range(8)], per_sample)})
    obs["group"] = np.where(obs["sample"].str[1].astype(int) < 4, "a", "b")
    counts = rng.poisson(np.exp(rng.uniform(0, 3, n_genes)), (len(obs), n_genes)).astype(float)
    errs = np.where((obs["group"] == "a").to_numpy()[:, None], np.exp(0.5 * rng.standard_normal(n_genes)), 1.0)
    terms = {"groupby": "group", "group1": "a", "group2": "b", "sample_key": "sample"}
    names = [f"g{k}" for k in range(n_genes)]
    ratios = iter([(np.arange(len(obs)), errs)])
    how = PseudobulkConfig(method=method, expression="corrected")
    found = pseudobulk_de(counts, obs, names, **terms, ratios=ratios, config=how)
    if method == "wilcoxon":
        assert any("error of the correction is not in the p-values" in note for note in found.notes)
        return
    raw = pseudobulk_de(counts, obs, names, **terms, config=PseudobulkConfig(method=method))
    assert found.table["lfc"].std() > 0.5
    assert found.table["is_de"].mean() < 0.02
    assert (found.table["lfc_se"] > 3 * raw.table["lfc_se"]).mean() > 0.9
    assert not any("error of the correction" in note for note in found.notes)
