from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from cellstill.de import PseudobulkConfig, pseudobulk_de
from cellstill.de.ranks import _signed_rank, _two_groups
from cellstill.errors import InvalidArgumentError

TREATED = {"groupby": "condition", "group1": "treated", "group2": "control", "sample_key": "donor"}
WILCOXON = PseudobulkConfig(method="wilcoxon")


def log_cpm(data, keys):
    sums = np.stack(
        [data.counts[(data.obs[["donor", "condition"]] == key).all(axis=1).to_numpy()].toarray().sum(0) for key in keys]
    )
    totals = sums.astype(float).sum(axis=1)
    prior = 2 * totals / totals.mean()
    return np.round(np.log2((sums + prior[:, None]) / (totals + 2 * prior)[:, None] * 1e6), 9)


def keys_of(result):
    return result.units[["donor", "condition"]].to_numpy()


def test_two_groups_are_ranked_as_scipy_ranks_them(simulate):
    data = simulate([(f"d{i}", "treated" if i % 2 else "control", "a") for i in range(12)], n_genes=60, n_cells=30)
    result = pseudobulk_de(data.counts, data.obs, data.genes, **TREATED, config=WILCOXON)
    assert result.design == "~ condition"
    values = log_cpm(data, keys_of(result))
    first = (result.units["condition"] == "treated").to_numpy()
    for gene in range(60):
        expected = stats.mannwhitneyu(values[first, gene], values[~first, gene], method="exact").pvalue
        assert result.table["p_value"][gene] == pytest.approx(expected)
    np.testing.assert_allclose(result.table["lfc"], values[first].mean(axis=0) - values[~first].mean(axis=0))
    pooled = stats.ttest_ind(values[first], values[~first]).statistic
    np.testing.assert_allclose(result.table["lfc"] / result.table["lfc_se"], pooled)
    strong = np.abs(data.lfc) > 1
    assert result.table["is_de"][strong].mean() > 0.8


def test_ties_in_one_gene_do_not_make_others_approximate():
    rng = np.random.default_rng(0)
    values = rng.normal(0, 1, (6, 40))
    first = np.repeat([True, False], 3)
    tied = np.column_stack([values, np.array([0.0, 0, 0, 1, 1, 1])])
    np.testing.assert_array_equal(_two_groups(tied, first)[:40], _two_groups(values, first))
    expected = stats.mannwhitneyu(values[first], values[~first], method="exact").pvalue
    np.testing.assert_allclose(_two_groups(values, first), expected)
    assert _two_groups(tied, first)[40] == pytest.approx(0.1)


def test_donors_in_both_groups_are_ranked_by_their_differences(simulate):
    donors = [(f"d{i}", group, "a") for i in range(9) for group in ("treated", "control")]
    data = simulate(donors, n_genes=50, n_cells=25)
    result = pseudobulk_de(data.counts, data.obs, data.genes, **TREATED, config=WILCOXON)
    assert result.design == "~ donor + condition"
    values = log_cpm(data, keys_of(result))
    first = (result.units["condition"] == "treated").to_numpy()
    difference = values[first] - values[~first]
    np.testing.assert_allclose(result.table["p_value"], stats.wilcoxon(difference, axis=0).pvalue)
    np.testing.assert_allclose(result.table["lfc"], difference.mean(axis=0))


def test_differences_with_ties_and_zeros_and_many_pairs():
    rng = np.random.default_rng(0)
    ties = rng.integers(-2, 3, (7, 30)).astype(float)
    first = np.repeat([True, False], 7)
    found = _signed_rank(np.concatenate([ties, 0 * ties]), first, np.tile(np.arange(7), 2))
    for gene in range(30):
        ranks = stats.rankdata(np.abs(ties[ties[:, gene] != 0, gene]))
        observed = abs((np.sign(ties[ties[:, gene] != 0, gene]) * ranks).sum())
        null = [abs(np.dot(signs, ranks)) for signs in itertools.product([-1, 1], repeat=len(ranks))]
        assert found[gene] == pytest.approx(np.mean(np.array(null) >= observed - 1e-9))
    many = rng.normal(0.3, 1, (40, 20))
    found = _signed_rank(np.concatenate([many, 0 * many]), np.repeat([True, False], 40), np.tile(np.arange(40), 2))
    expected = stats.wilcoxon(many, axis=0, method="approx", correction=False).pvalue
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_batches_are_ranked_each_on_its_own(simulate):
    """Against all permutations within batches: 20 x 15 of them."""
    donors = [(f"d{i}", "treated" if i < 3 else "control", "a") for i in range(6)]
    donors += [(f"e{i}", "treated" if i < 2 else "control", "b") for i in range(6)]
    data = simulate(donors, n_genes=40, n_cells=25, batch_sd=1.5)
    result = pseudobulk_de(data.counts, data.obs, data.genes, **TREATED, batch_key="batch", config=WILCOXON)
    assert result.design == "~ batch + condition"
    units = result.units
    values = log_cpm(data, keys_of(result))
    of_batch = [np.flatnonzero(units["batch"] == batch) for batch in "ab"]
    ranks = np.zeros_like(values)
    for rows in of_batch:
        ranks[rows] = stats.rankdata(values[rows], axis=0) / (len(rows) + 1)
    treated = (units["condition"] == "treated").to_numpy()
    picks = [itertools.combinations(rows, int(treated[rows].sum())) for rows in of_batch]
    null = np.array([ranks[list(a + b)].sum(axis=0) for a, b in itertools.product(*picks)])
    z = (ranks[treated].sum(axis=0) - null.mean(axis=0)) / null.std(axis=0)
    np.testing.assert_allclose(result.table["p_value"], 2 * stats.norm.sf(np.abs(z)), rtol=1e-9)


def test_too_few_samples_for_any_call_are_noted(simulate):
    data = simulate([(f"d{i}", "treated" if i % 2 else "control", "a") for i in range(6)], n_genes=40, n_cells=20)
    result = pseudobulk_de(data.counts, data.obs, data.genes, **TREATED, config=WILCOXON)
    assert any("3 against 3 samples no rank test has a p-value below 0.1: none of" in note for note in result.notes)
    assert not result.table["is_de"].any()


@pytest.mark.parametrize(
    "options",
    [{"lfc_threshold": 0.5}, {"covariate_keys": ["age"]}, {"shrink_lfc": True}, {"borrow": True}],
    ids=lambda options: next(iter(options)),
)
def test_what_needs_a_model_of_counts_is_refused(options):
    with pytest.raises(InvalidArgumentError, match=f"{next(iter(options))}=.* needs a model of the counts"):
        PseudobulkConfig(method="wilcoxon", **options)


def test_a_batch_that_differs_inside_pairs_is_refused(simulate):
    donors = [(f"d{i}", group, "ab"[(i + j) % 2]) for i in range(6) for j, group in enumerate(("treated", "control"))]
    data = simulate(donors, n_genes=20, n_cells=20)
    with pytest.raises(InvalidArgumentError, match=r"differs inside them .*~ donor \+ batch \+ condition"):
        pseudobulk_de(data.counts, data.obs, data.genes, **TREATED, batch_key="batch", config=WILCOXON)


def test_the_note_on_few_samples_says_how_many_genes_it_takes(simulate):
    """With 8 against 8 samples of one batch the least p-value is 2 / 12,870."""
    donors = [(f"d{i}", "treated" if i % 2 else "control", "a") for i in range(16)]
    data = simulate(donors, n_genes=600, n_cells=12, share_de=0.5, seed=3)
    least = 2 / 12870
    result = pseudobulk_de(data.counts, data.obs, data.genes, **TREATED, config=WILCOXON)
    tested = result.table["p_value"].notna().sum()
    needed = int(np.ceil(least * tested / 0.05))
    assert needed > 1
    assert any(f"called only where at least {needed} of {tested} reach it" in note for note in result.notes)
    few = pseudobulk_de(data.counts[:, :300], data.obs, data.genes[:300], **TREATED, config=WILCOXON)
    assert not any("no rank test" in note for note in few.notes)
