from __future__ import annotations

import dataclasses
import re
import tracemalloc

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse, stats
from sklearn.decomposition import TruncatedSVD
from sklearn.neighbors import NearestNeighbors

from cellstill.data.simulate import SimulationConfig, simulate_counts
from cellstill.errors import CellstillError, InvalidArgumentError

HOMOGENEOUS = {
    "n_batches": 1,
    "n_cell_types": 1,
    "conditions": ("ctrl",),
    "n_donors_per_group": 1,
    "donor_sd": 0.0,
    "library_size_sigma": 0.0,
}
SCENARIOS = {
    "3_imbalanced": {"n_obs": 1000, "n_vars": 300, "n_batches": 4, "batch_fractions": (0.4, 0.3, 0.2, 0.1)},
    "4_confounded": {"n_obs": 800, "n_vars": 300, "condition_fractions": ((0.3, 0.7), (0.5, 0.5), (0.7, 0.3))},
    "5_all_or_none": {"n_obs": 800, "n_vars": 300, "condition_fractions": ((0, 1), (0.5, 0.5), (1, 0))},
    "6_zero_inflated": {"n_obs": 500, "n_vars": 200, "n_batches": 2, "dropout_rate": 0.2},
}


def proportions(adata):
    """rho, cell by cell, from nothing but the truth that the object carries."""
    rho = np.empty(adata.shape)
    reference = adata.uns["simulation"]["conditions"][0]
    for row, cell in enumerate(adata.obs.itertuples()):
        log_rate = adata.varm["cell_type_log_mean"][cell.cell_type] + adata.varm["batch_shift"][cell.batch]
        log_rate = log_rate + adata.varm["donor_shift"][cell.donor]
        rate = np.exp(log_rate.to_numpy())
        if cell.condition != reference:
            rate = rate * 2.0 ** adata.var[f"log2fc_{cell.condition}"].to_numpy()
        rho[row] = rate / rate.sum()
    return rho


def means(adata):
    batch = adata.obs["batch"].cat.codes.to_numpy()
    share = adata.uns["simulation"]["ambient_fraction"][batch][:, None]
    ambient = adata.varm["ambient_profile"].to_numpy().T[batch]
    return adata.obs["library_size"].to_numpy()[:, None] * ((1 - share) * proportions(adata) + share * ambient)


def cpm(adata, mask):
    total = np.asarray(adata.X[np.asarray(mask)].sum(axis=0)).ravel()
    return total / total.sum() * 1e6


def assert_identical(a, b):
    for part in ("data", "indices", "indptr"):
        np.testing.assert_array_equal(getattr(a.X, part), getattr(b.X, part))
    pd.testing.assert_frame_equal(a.obs, b.obs, check_exact=True)
    pd.testing.assert_frame_equal(a.var, b.var, check_exact=True)
    assert set(a.varm) == set(b.varm)
    for key in a.varm:
        pd.testing.assert_frame_equal(a.varm[key], b.varm[key], check_exact=True)


# The counts


def test_counts_follow_the_negative_binomial_gene_by_gene():
    adata = simulate_counts(n_obs=5000, n_vars=120, **HOMOGENEOUS, library_size_median=400, theta_median=2, seed=3)
    counts = adata.X.toarray()
    theta = adata.var["theta"].to_numpy()
    mu = 400 * np.exp(adata.varm["cell_type_log_mean"]["type_0"].to_numpy())
    p_values = []
    for g in range(adata.n_vars):
        edges = np.arange(counts[:, g].max() + 2)
        expected = np.append(stats.nbinom.pmf(edges[:-1], theta[g], theta[g] / (theta[g] + mu[g])), 0) * adata.n_obs
        expected[-1] = adata.n_obs - expected.sum()
        n_bins = max((expected >= 5).sum(), 2)
        observed = np.bincount(counts[:, g].astype(int), minlength=len(edges))
        pooled = [np.append(x[: n_bins - 1], x[n_bins - 1 :].sum()) for x in (observed, expected)]
        if pooled[1].min() >= 5:
            p_values.append(stats.chisquare(*pooled).pvalue)
    assert len(p_values) > 100
    assert stats.kstest(p_values, "uniform").pvalue > 0.01

    expressed = mu > 0.5
    variance = counts.var(axis=0, ddof=1)
    chi2 = (((counts.mean(axis=0) - mu) ** 2) / ((mu + mu**2 / theta) / adata.n_obs)).sum()
    assert stats.chi2.sf(chi2, adata.n_vars) > 0.001
    slope = np.polyfit(np.log(mu + mu**2 / theta)[expressed], np.log(variance)[expressed], 1)
    np.testing.assert_allclose(slope, [1, 0], atol=0.06)


def test_every_effect_reaches_the_counts_as_the_truth_says():
    adata = simulate_counts(
        n_obs=2400,
        n_vars=300,
        n_batches=3,
        conditions=("ctrl", "low", "high"),
        batch_sd=0.5,
        donor_sd=0.3,
        ambient_fraction=(0.0, 0.1, 0.3),
        cell_type_fractions=((0.6, 0.2, 0.2), (0.2, 0.6, 0.2), (0.2, 0.2, 0.6)),
        n_cell_types=3,
        seed=5,
    )
    mu, counts, theta = means(adata), adata.X.toarray().astype(float), adata.var["theta"].to_numpy()
    variance = mu + mu**2 / theta
    # Sums over donor x cell type: any effect put in the wrong cell or scaled wrongly inflates their z scores.
    groups = adata.obs.groupby(["donor", "cell_type"], observed=True).ngroup().to_numpy()
    indicator = sparse.csr_matrix((np.ones(adata.n_obs), (groups, np.arange(adata.n_obs))))
    expected = indicator @ mu
    z = ((indicator @ counts - expected) / np.sqrt(indicator @ variance))[expected > 10]
    assert len(z) > 8000
    assert abs(np.mean(z)) < 0.05
    assert abs(np.mean(z**2) - 1) < 0.06
    residual = ((counts - mu) ** 2 / variance)[mu > 0.5]
    assert abs(residual.mean() - 1) < 0.03


def test_base_profile_and_markers_add_up_to_the_cell_type_profiles():
    adata = simulate_counts(n_obs=50, n_vars=2000, marker_log2fc_mean=2.0, marker_log2fc_sd=0.5, seed=2)
    assert np.exp(adata.var["base_log_mean"]).sum() == pytest.approx(1)
    assert adata.var["base_log_mean"].std() == pytest.approx(1.5, rel=0.05)
    assert np.log(adata.var["theta"]).std() == pytest.approx(0.5, rel=0.05)
    assert adata.var["theta"].median() == pytest.approx(10, rel=0.05)
    markers = []
    for name in adata.obs["cell_type"].cat.categories:
        profile = adata.varm["cell_type_log_mean"][name]
        assert np.exp(profile).sum() == pytest.approx(1)
        is_marker = adata.var[f"is_marker_{name}"]
        assert is_marker.sum() == 100
        change = (profile - adata.var["base_log_mean"]) / np.log(2)
        np.testing.assert_allclose(change[~is_marker], change[~is_marker].iloc[0], atol=1e-9)
        markers.append(change[is_marker] - change[~is_marker].iloc[0])
    assert np.concatenate(markers).mean() == pytest.approx(2.0, abs=0.08)
    assert np.concatenate(markers).std() == pytest.approx(0.5, abs=0.06)


def test_log2fc_is_recovered_from_pseudobulk():
    adata = simulate_counts(
        n_obs=6000, n_vars=400, n_donors_per_group=4, donor_sd=0.05, library_size_median=4000, base_log_sd=1.0, seed=7
    )
    estimate = np.mean(
        [
            np.log2(cpm(adata, in_batch & (adata.obs["condition"] == "treat")))
            - np.log2(cpm(adata, in_batch & (adata.obs["condition"] == "ctrl")))
            for in_batch in (adata.obs["batch"] == name for name in adata.obs["batch"].cat.categories)
        ],
        axis=0,
    )
    truth = adata.var["log2fc_treat"].to_numpy()
    assert adata.var["is_de_treat"].sum() == 40
    assert (np.abs(truth[adata.var["is_de_treat"]]) >= 0.3).all()
    assert not truth[~adata.var["is_de_treat"]].any()
    assert {-1.0, 1.0} <= set(np.sign(truth))
    fit = stats.linregress(adata.var["log2fc_proportion_treat"], estimate)
    assert fit.rvalue > 0.95
    assert fit.slope == pytest.approx(1, abs=0.05)
    assert fit.intercept == pytest.approx(0, abs=0.01)


def test_log2fc_proportion_takes_up_the_shift_of_normalisation():
    adata = simulate_counts(
        n_obs=4000,
        n_vars=300,
        n_batches=1,
        n_cell_types=2,
        cell_type_fractions=(0.8, 0.2),
        de_fraction=0.5,
        de_log2fc_sd=2.0,
        donor_sd=0.0,
        library_size_median=5000,
        library_size_sigma=0.0,
        seed=8,
    )
    treated = adata.obs["condition"] == "treat"
    estimate = np.log2(cpm(adata, treated) / cpm(adata, ~treated))
    deep = adata.var["base_log_mean"].to_numpy() > np.log(1e-3)
    raw = stats.linregress(adata.var["log2fc_treat"][deep], estimate[deep])
    normalised = stats.linregress(adata.var["log2fc_proportion_treat"][deep], estimate[deep])
    assert abs(raw.intercept) > 0.3
    assert normalised.intercept == pytest.approx(0, abs=0.02)
    assert normalised.slope == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("n_batches", [2, 3])
def test_batch_shifts_are_recovered_from_the_ratio_of_batch_means(n_batches):
    adata = simulate_counts(
        n_obs=3000, n_vars=400, n_batches=n_batches, donor_sd=0.0, library_size_median=5000, base_log_sd=0.7, seed=9
    )
    shift = adata.varm["batch_shift"]
    np.testing.assert_allclose(shift.sum(axis=1), 0, atol=1e-12)
    np.testing.assert_allclose(shift.std(axis=0), 0.3, rtol=0.12)
    # Treated and control cells of every batch are equally many, so differential expression cancels.
    first = cpm(adata, adata.obs["batch"] == "batch_0")
    for name in shift.columns[1:]:
        estimate = np.log(cpm(adata, adata.obs["batch"] == name) / first)
        fit = stats.linregress(shift[name] - shift["batch_0"], estimate)
        assert fit.rvalue > 0.98
        assert fit.slope == pytest.approx(1, abs=0.04)


def test_batch_shifts_spare_the_genes_they_are_told_to_spare():
    shift = simulate_counts(n_obs=50, batch_gene_fraction=0.25, seed=1).varm["batch_shift"]
    shifted = (shift != 0).any(axis=1)
    assert shifted.sum() == 250
    assert (shift[shifted] != 0).all(axis=None)
    assert not simulate_counts(n_obs=50, n_batches=1).varm["batch_shift"].to_numpy().any()


def test_depth_is_log_normal():
    adata = simulate_counts(
        n_obs=3000, n_vars=300, library_size_median=20000, library_size_sigma=0.5, theta_median=1000, seed=11
    )
    total = np.log(np.asarray(adata.X.sum(axis=1)).ravel())
    assert np.exp(np.median(total)) == pytest.approx(20000, rel=0.03)
    assert total.std() == pytest.approx(0.5, rel=0.04)
    assert stats.kstest((total - np.log(20000)) / 0.5, "norm").pvalue > 0.01
    assert np.corrcoef(total, np.log(adata.obs["library_size"]))[0, 1] > 0.999


@pytest.mark.parametrize(("rate", "decay"), [(0.3, 0.0), (0.8, 0.5)], ids=["constant", "fades_with_the_mean"])
def test_dropout_is_recovered_from_excess_zeros(rate, decay):
    adata = simulate_counts(n_obs=1500, n_vars=400, dropout_rate=rate, dropout_decay=decay, seed=12)
    mu, theta = means(adata), adata.var["theta"].to_numpy()
    nonzero = 1 - (theta / (theta + mu)) ** theta
    chance = nonzero * (1 - rate * np.exp(-decay * mu))
    observed = adata.X.toarray() > 0
    for low, high in [(0, 0.3), (0.3, 1), (1, 3), (3, 10), (10, np.inf)]:
        inside = (mu > low) & (mu <= high)
        excess = observed[inside].sum() - chance[inside].sum()
        assert abs(excess) < 4 * np.sqrt((chance * (1 - chance))[inside].sum())
    if decay == 0:
        assert 1 - observed.sum() / nonzero.sum() == pytest.approx(rate, abs=0.004)


def test_ambient_rna_brings_markers_into_types_that_do_not_express_them():
    fractions = (0.0, 0.1, 0.3)
    adata = simulate_counts(
        n_obs=3000,
        n_vars=400,
        n_cell_types=2,
        marker_fraction=0.05,
        marker_log2fc_mean=14,
        base_log_sd=0.5,
        ambient_fraction=fractions,
        seed=13,
    )
    markers = (adata.var["is_marker_type_0"] & ~adata.var["is_marker_type_1"]).to_numpy()
    for name, fraction in zip(adata.obs["batch"].cat.categories, fractions, strict=True):
        cells = ((adata.obs["cell_type"] == "type_1") & (adata.obs["batch"] == name)).to_numpy()
        depth = adata.obs["library_size"][cells].sum()
        share = adata.X[cells][:, markers].sum() / depth
        chi = adata.varm["ambient_profile"][name].to_numpy()[markers].sum()
        assert chi > 0.3
        assert share == pytest.approx(fraction * chi, rel=0.04, abs=2e-4)


def test_ambient_profile_is_the_pooled_expression_of_the_batch():
    adata = simulate_counts(n_obs=600, n_vars=100, ambient_fraction=0.2, batch_fractions=(0.2, 0.3, 0.5), seed=14)
    np.testing.assert_array_equal(adata.uns["simulation"]["ambient_fraction"], [0.2, 0.2, 0.2])
    rna = proportions(adata) * adata.obs["library_size"].to_numpy()[:, None]
    for name in adata.obs["batch"].cat.categories:
        pooled = rna[adata.obs["batch"] == name].sum(axis=0)
        np.testing.assert_allclose(adata.varm["ambient_profile"][name], pooled / pooled.sum(), rtol=1e-9)
    np.testing.assert_allclose(adata.varm["ambient_profile"].sum(), 1)


def test_cells_are_never_empty_and_follow_the_truncated_model():
    adata = simulate_counts(
        n_obs=4000, n_vars=50, **HOMOGENEOUS, library_size_median=0.5, theta_median=1e6, theta_sigma=0, seed=15
    )
    total = np.asarray(adata.X.sum(axis=1)).ravel()
    assert total.min() == 1
    assert total.mean() == pytest.approx(0.5 / (1 - np.exp(-0.5)), rel=0.02)
    with pytest.raises(InvalidArgumentError, match=r"library_size_median=0\.001 .* leaves cells without counts"):
        simulate_counts(n_obs=5, n_vars=10, **HOMOGENEOUS, library_size_median=0.001, dropout_rate=0.9999)


def test_counts_are_sparse_integers_in_float32():
    adata = simulate_counts(n_obs=300, n_vars=200)
    assert isinstance(adata.X, sparse.csr_matrix)
    assert adata.X.dtype == np.float32
    assert adata.X.has_canonical_format
    assert (adata.X.data == np.round(adata.X.data)).all()
    assert adata.X.data.min() == 1


def test_memory_stays_far_below_a_dense_matrix():
    tracemalloc.start()
    try:
        simulate_counts(n_obs=8000, n_vars=800, library_size_median=20, seed=1)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8000 * 800 * 8 / 3


def test_raw_neighbours_share_batch_and_cell_type_with_the_defaults():
    adata = simulate_counts(n_obs=1000, seed=4)
    depth = np.asarray(adata.X.sum(axis=1))
    log_cpm = adata.X.multiply(1e4 / depth).tocsr().log1p()
    pcs = TruncatedSVD(20, random_state=0).fit_transform(log_cpm)
    neighbours = NearestNeighbors(n_neighbors=16).fit(pcs).kneighbors(return_distance=False)[:, 1:]
    for key in ("batch", "cell_type"):
        labels = adata.obs[key].cat.codes.to_numpy()
        assert (labels[neighbours] == labels[:, None]).mean() > 0.95


# The design


def test_donors_are_nested_in_batch_and_condition():
    adata = simulate_counts(n_obs=600, n_vars=20, n_donors_per_group=3)
    groups = adata.obs.groupby("donor", observed=False)
    assert len(groups) == 3 * 2 * 3
    assert (groups["batch"].nunique() == 1).all()
    assert (groups["condition"].nunique() == 1).all()
    per_group = adata.obs.groupby(["batch", "condition"], observed=False)["donor"].nunique()
    assert (per_group == 3).all()
    assert groups.size().between(33, 34).all()
    assert not adata.obs["donor"].cat.codes.is_monotonic_increasing


@pytest.mark.parametrize("name", SCENARIOS)
def test_benchmark_scenarios_have_the_shares_they_ask_for(name):
    adata = simulate_counts(**SCENARIOS[name], seed=21)
    config = SimulationConfig(**SCENARIOS[name])
    assert adata.shape == (config.n_obs, config.n_vars)
    table = pd.crosstab(adata.obs["batch"], adata.obs["condition"]).to_numpy()
    np.testing.assert_allclose(table.sum(axis=1), config.batch_shares * config.n_obs, atol=1)
    np.testing.assert_allclose(table, config.condition_shares * table.sum(axis=1, keepdims=True), atol=1)
    if name == "5_all_or_none":
        assert table[0, 0] == 0
        assert table[2, 1] == 0
        assert adata.obs["donor"].nunique() == len(adata.obs["donor"].cat.categories) == 2 * (1 + 2 + 1)
    if name == "6_zero_inflated":
        full = simulate_counts(**SCENARIOS[name] | {"dropout_rate": 0.0}, seed=21)
        assert adata.X.nnz / full.X.nnz == pytest.approx(0.8, abs=0.02)


def test_leftover_cells_go_to_the_largest_remainders():
    adata = simulate_counts(n_obs=99, n_vars=10, n_batches=4, batch_fractions=(0.41, 0.3, 0.195, 0.095))
    # 40.59, 29.7, 19.305 and 9.405 cells.
    assert adata.obs["batch"].value_counts(sort=False).tolist() == [41, 30, 19, 9]


def test_cell_types_have_their_shares_in_every_batch():
    shares = np.array([[0.7, 0.2, 0.1], [0.0, 0.5, 0.5]])
    adata = simulate_counts(n_obs=6000, n_vars=10, n_batches=2, n_cell_types=3, cell_type_fractions=shares)
    table = pd.crosstab(adata.obs["batch"], adata.obs["cell_type"])
    np.testing.assert_allclose(table.div(table.sum(axis=1), axis=0), shares, atol=0.025)
    assert table.loc["batch_1", "type_0"] == 0


def test_one_row_of_shares_serves_all_batches():
    adata = simulate_counts(n_obs=900, n_vars=10, condition_fractions=[0.25, 0.75])
    table = pd.crosstab(adata.obs["batch"], adata.obs["condition"]).to_numpy()
    np.testing.assert_allclose(table / table.sum(axis=1, keepdims=True), [[0.25, 0.75]] * 3, atol=0.01)


# Seeds, records, files


def test_the_same_seed_gives_the_same_data_bit_for_bit():
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    first = simulate_counts(n_obs=600, n_vars=100, ambient_fraction=0.1, dropout_rate=0.1, seed=3)
    again = simulate_counts(
        SimulationConfig(n_obs=600, n_vars=50), n_vars=100, ambient_fraction=0.1, dropout_rate=0.1, seed=3
    )
    assert_identical(first, again)
    np.testing.assert_array_equal(np.random.get_state()[1], state)  # noqa: NPY002


def test_different_seeds_differ_in_truth_and_counts():
    a, b = (simulate_counts(n_obs=600, n_vars=100, seed=seed) for seed in (0, 1))
    assert (a.X != b.X).nnz > 1000
    for column in ("base_log_mean", "theta", "log2fc_treat"):
        assert not np.array_equal(a.var[column], b.var[column])


def test_chunks_of_cells_are_independent():
    adata = simulate_counts(n_obs=1024, n_vars=50, **HOMOGENEOUS)
    blocks = adata.X.toarray().reshape(4, 256, 50)
    centred = (blocks - blocks.mean(axis=(0, 1))).reshape(4, -1)
    correlation = np.corrcoef(centred)[np.triu_indices(4, 1)]
    assert np.abs(correlation).max() < 5 / np.sqrt(256 * 50)


def test_each_source_of_variation_has_its_own_generator():
    a = simulate_counts(n_obs=600, n_vars=100, seed=5)
    b = simulate_counts(n_obs=300, n_vars=100, seed=5, batch_sd=0.6, donor_sd=0.0, marker_fraction=0.2)
    for column in ("base_log_mean", "theta", "log2fc_treat"):
        np.testing.assert_array_equal(a.var[column], b.var[column])
    np.testing.assert_allclose(b.varm["batch_shift"], 2 * a.varm["batch_shift"])


@pytest.mark.parametrize("overrides", [{}, SCENARIOS["5_all_or_none"], {**HOMOGENEOUS, "ambient_fraction": 0.1}])
def test_h5ad_keeps_the_truth_and_its_record_redraws_the_data(tmp_path, overrides):
    adata = simulate_counts(**{"n_obs": 300, "n_vars": 40} | overrides, seed=6)
    adata.write_h5ad(tmp_path / "simulated.h5ad")
    read = ad.read_h5ad(tmp_path / "simulated.h5ad")
    assert_identical(adata, read)
    assert read.uns["simulation"].keys() == adata.uns["simulation"].keys()
    for key, value in adata.uns["simulation"].items():
        np.testing.assert_array_equal(read.uns["simulation"][key], value)
    record = dict(read.uns["simulation"])
    seed = record.pop("seed")
    assert set(record) == {field.name for field in dataclasses.fields(SimulationConfig)}
    assert_identical(simulate_counts(SimulationConfig(**record), seed=seed), adata)


def test_config_is_frozen_keyword_only_and_comparable():
    config = SimulationConfig(n_batches=2, condition_fractions=np.array([[0.5, 0.5], [1, 0]]))
    assert config == SimulationConfig(n_batches=2, condition_fractions=[[0.5, 0.5], [1, 0]])
    assert len({config, SimulationConfig(n_batches=2, condition_fractions=((0.5, 0.5), (1, 0)))}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.n_obs = 3
    with pytest.raises(TypeError):
        SimulationConfig(100)


# What is refused


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"n_obs": 0}, "n_obs=0 has to be an integer of at least 1"),
        ({"n_vars": 10.5}, "n_vars=10.5 has to be an integer"),
        ({"n_batches": 0}, "n_batches=0 has to be"),
        ({"n_cell_types": True}, "n_cell_types=True has to be"),
        ({"n_donors_per_group": -1}, "n_donors_per_group=-1 has to be"),
        ({"batch_sd": -0.1}, "batch_sd=-0.1 must be a number, finite and at least 0"),
        ({"donor_sd": np.inf}, "donor_sd=inf must be"),
        ({"library_size_sigma": "wide"}, "library_size_sigma='wide' must be"),
        ({"marker_log2fc_mean": np.nan}, "marker_log2fc_mean=nan must be"),
        ({"library_size_median": 0}, "library_size_median=0 must be a number, finite and above 0"),
        ({"theta_median": 0.0}, "theta_median=0.0 must be"),
        ({"de_fraction": 1.1}, "de_fraction=1.1 must be a number, in [0, 1]"),
        ({"dropout_rate": 1.0}, "dropout_rate=1.0 must be a number, in [0, 1)"),
        ({"ambient_fraction": 1.0}, "ambient_fraction=1.0 must lie in [0, 1)"),
        ({"ambient_fraction": (0.1, 0.2)}, "ambient_fraction has shape (2,). Give one number, or one for each of"),
        ({"batch_fractions": (0.5, 0.5)}, "batch_fractions has shape (2,), but the configuration asks for (3,)"),
        ({"batch_fractions": (0.5, 0.5, 0.5)}, "sum to 1 in every row; the sums are [1.5]"),
        ({"batch_fractions": (1.2, -0.4, 0.2)}, "batch_fractions=(1.2, -0.4, 0.2) must be non-negative"),
        ({"batch_fractions": (0.5, 0.5, 0)}, "leaves a batch empty"),
        ({"condition_fractions": ((0.5, 0.5), (1, 0))}, "asks for (3, 2) or (2,)"),
        ({"condition_fractions": ((0.5, 0.5), (1, 0), (1,))}, "in rows of one length"),
        ({"condition_fractions": (1, 0)}, "condition_fractions=(1.0, 0.0) has a column of zeros"),
        ({"cell_type_fractions": (0.2, 0.2, 0.2, 0.2, np.nan)}, "cell_type_fractions=(0.2, 0.2, 0.2, 0.2, nan) must"),
        ({"cell_type_fractions": "even"}, "cell_type_fractions='even' must hold numbers only"),
        ({"conditions": "ctrl"}, "conditions='ctrl' must be a sequence of different names"),
        ({"conditions": ("a", "a")}, "conditions=('a', 'a') must be"),
        ({"conditions": ()}, "conditions=() must be"),
        ({"conditions": ("ctrl", "5/10 uM")}, "without '/'"),
        ({"n_obs": 10}, "n_obs=10 leaves 2 of 12 donors without cells"),
        ({"n_genes": 10}, "override='n_genes' is not known. Use one of: 'n_obs', 'n_vars'"),
        ({"seed": -1}, "seed=-1 has to be an integer of at least 0"),
        ({"seed": 0.5}, "seed=0.5 has to be"),
    ],
)
def test_invalid_parameters_are_named(overrides, message):
    with pytest.raises(InvalidArgumentError, match=re.escape(message)) as caught:
        simulate_counts(**overrides)
    assert isinstance(caught.value, CellstillError)
