"""The error of a correction enters the comparison of corrected counts."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm

from cellstill.de import PseudobulkConfig, pseudobulk_de
from cellstill.de.correction import correction_error, widen
from cellstill.de.gene_tests import GeneTests
from cellstill.de.moderated import moderated_t
from cellstill.de.variances import VariancePosterior

N_GENES = 2000


ERRORS = {
    "normal": lambda rng: 0.4 * rng.standard_normal(N_GENES),
    "heavy_tails": lambda rng: 0.25 * rng.standard_t(3, N_GENES),
    "a_third_of_the_genes": lambda rng: 0.4 * rng.standard_normal(N_GENES) * (rng.random(N_GENES) < 0.3),
    "few_and_large": lambda rng: 3.0 * rng.standard_normal(N_GENES) * (rng.random(N_GENES) < 0.02),
}


def test_the_size_of_errors_is_found_at_each_level():
    rng = np.random.default_rng(0)
    level = rng.uniform(np.log(2), np.log(2000), N_GENES)
    sums = np.exp(level)[None] * np.ones((6, 1))
    sd = 0.3 - 0.03 * level
    found = np.sqrt(correction_error(sd * rng.standard_normal(N_GENES), sums).mean())
    np.testing.assert_allclose(found, sd, rtol=0.2)
    assert np.mean(found / sd) == pytest.approx(1, abs=0.04)


@pytest.mark.parametrize("kind", ERRORS)
def test_the_distribution_of_errors_has_their_tails(kind):
    rng = np.random.default_rng(5)
    drawn = ERRORS[kind](rng)
    error = correction_error(drawn, np.ones((6, 1)) * rng.uniform(10, 1000, N_GENES))
    assert error.weights.sum() == pytest.approx(1)
    assert error.mean().mean() == pytest.approx(np.square(drawn).mean(), rel=0.15)
    for size in np.quantile(np.abs(drawn), [0.985, 0.995]):
        expected = (error.weights @ (2 * norm.sf(size / np.sqrt(error.variances)))).mean()
        # Rather heavier than lighter: EM leaves the widest components some weight.
        assert 0.8 < expected / (np.abs(drawn) > size).mean() < 2.5


@pytest.mark.parametrize("kind", ERRORS)
def test_errors_of_any_shape_make_no_false_calls(kind):
    rng = np.random.default_rng(6)
    design = np.column_stack([np.ones(16), np.repeat([0, 1], 8)]).astype(float)
    raw = rng.poisson(np.exp(rng.uniform(3, 8, N_GENES)) * np.exp(0.2 * rng.standard_normal((16, N_GENES)))).astype(
        float
    )
    corrected = np.rint(raw * np.exp(ERRORS[kind](rng) * design[:, 1:]))
    blind = moderated_t(corrected, design, lfc_threshold=0.0).columns
    found = moderated_t(corrected, design, lfc_threshold=0.0, uncorrected=raw).columns
    assert (blind["fdr"] <= 0.05).sum() >= 20
    assert (found["fdr"] <= 0.05).sum() <= 1
    assert (found["p_value"] < 0.05).mean() == pytest.approx(0.05, abs=0.015)


def test_few_genes_share_the_mean_square_of_all_and_nothing_moved_is_no_error():
    change = np.array([0.1, -0.3, 0.2])
    np.testing.assert_allclose(correction_error(change, np.ones((4, 3))).mean(), np.square(change).mean())
    np.testing.assert_array_equal(correction_error(np.zeros(50), np.ones((4, 50))).mean(), 0)
    tied = 0.3 * np.random.default_rng(0).standard_normal(500)
    assert np.sqrt(correction_error(tied, np.ones((4, 500))).mean().mean()) == pytest.approx(0.3, rel=0.1)


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


def test_samples_are_no_more_alike_than_their_raw_counts(misled):
    """A correction that halves what is particular to each sample, and moves no fold change by much."""
    raw, _, design = misled
    fitted = design @ (np.linalg.pinv(design) @ np.log(raw + 1))
    smooth = np.rint(np.exp(fitted + 0.5 * (np.log(raw + 1) - fitted)))
    blind = moderated_t(smooth, design, lfc_threshold=0.0).columns
    found = moderated_t(smooth, design, lfc_threshold=0.0, uncorrected=raw).columns
    honest = moderated_t(raw, design, lfc_threshold=0.0).columns
    assert np.median(blind["lfc_se"] / honest["lfc_se"]) < 0.7
    assert np.median(found["lfc_se"] / honest["lfc_se"]) > 0.95
    assert (found["p_value"] < 0.05).mean() < 0.06


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
    unknown = correction_error(change, sums)
    np.testing.assert_allclose(found.columns["lfc_se"], np.sqrt(0.4**2 + unknown.mean()))
    assert np.sqrt(unknown.mean()).mean() == pytest.approx(0.3, rel=0.1)
    beyond = (np.abs(raw_lfc + change) - 0.5) / np.sqrt(0.4**2 + unknown.variances)
    expected = unknown.weights @ np.minimum(2 * norm.sf(beyond), 1)
    kept = np.arange(n) != 3
    np.testing.assert_allclose(found.columns["p_value"][kept], expected[kept])
    assert np.isnan(found.columns["p_value"][3])
    np.testing.assert_array_equal(np.isnan(found.columns["fdr"]), np.arange(n) < 5)
    assert found.notes == ["x"]


@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_deseq2_of_counts_that_nothing_corrects_is_that_of_raw_ones(threshold):
    rng = np.random.default_rng(4)
    obs = pd.DataFrame({"sample": np.repeat([f"s{k}" for k in range(8)], 10)})
    obs["group"] = np.where(obs["sample"].str[1].astype(int) < 4, "a", "b")
    mean = np.exp(rng.uniform(0, 3, 80))
    changed = np.where(np.arange(80) < 20, 3.0, 1.0)
    counts = rng.poisson(np.where((obs["group"] == "a").to_numpy()[:, None], mean * changed, mean)).astype(float)
    terms = {"groupby": "group", "group1": "a", "group2": "b", "sample_key": "sample"}
    names = [f"g{k}" for k in range(80)]
    asked = {"method": "deseq2", "lfc_threshold": threshold}
    raw = pseudobulk_de(counts, obs, names, **terms, config=PseudobulkConfig(**asked))
    ratios = iter([(np.arange(len(obs)), np.ones((len(obs), 80)))])
    how = PseudobulkConfig(**asked, expression="corrected")
    found = pseudobulk_de(counts, obs, names, **terms, ratios=ratios, config=how)
    for column in ("lfc", "lfc_se", "p_value", "fdr"):
        np.testing.assert_allclose(found.table[column], raw.table[column], rtol=1e-6, err_msg=column)


def test_shrunken_fold_changes_of_deseq2_know_the_error():
    rng = np.random.default_rng(7)
    sums = np.exp(rng.uniform(2, 6, 400))[None] * np.ones((4, 1))
    change = 0.5 * rng.standard_normal(400)
    raw = GeneTests({"lfc": np.zeros(400), "lfc_se": np.full(400, 0.1)}, np.ones(4), [])
    p_value = 2 * norm.sf(np.abs(change) / 0.1)
    columns = {"lfc": change, "lfc_se": np.full(400, 0.1), "p_value": p_value, "fdr": p_value, "lfc_shrunken": change}
    found = widen(GeneTests(columns, np.ones(4), []), raw, sums, 0.0).columns["lfc_shrunken"]
    assert found.std() < 0.3 * change.std()


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
