"""Counts corrected by the ratio of decoded proportions, and draws that know the donors' own counts."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from cellstill.data import simulate_counts
from cellstill.data.pca import PCA
from cellstill.de import BayesianConfig, PseudobulkConfig, StratifiedDEResult, bayesian_de, pseudobulk_sums
from cellstill.distill.contrast import posterior_draws
from cellstill.distill.correction import LARGEST_RATIO, batch_ratios, corrected_ratios
from cellstill.errors import CellstillWarning, InvalidArgumentError

from .conftest import train

TREATED = {"groupby": "condition", "group1": "treat", "group2": "ctrl"}


@pytest.fixture(scope="module")
def free(simulated):
    """A model without covariates."""
    return train(simulated.copy(), epochs=(5, 10), batch_size=128)


def whole(chunks):
    rows, ratios = zip(*chunks, strict=True)
    np.testing.assert_array_equal(np.concatenate(rows), np.arange(sum(map(len, rows))))
    return np.concatenate(ratios)


@pytest.mark.parametrize("target", [["batch_1"], ["batch_0", "batch_2"]], ids=["one", "two"])
def test_ratios_are_those_of_decoded_expression(free, target):
    codes = [free.batch_names.index(name) for name in target]
    found = whole(corrected_ratios(free._fitted(), free._cells(), codes, batch_size=300))
    wanted = free.get_normalized_expression(transform_batch=target, return_numpy=True)
    own = free.get_normalized_expression(return_numpy=True)
    np.testing.assert_allclose(found, np.clip(wanted / own, 1 / LARGEST_RATIO, LARGEST_RATIO), rtol=2e-4)
    if len(target) == 1:
        there = (free.adata.obs["batch"] == target[0]).to_numpy()
        np.testing.assert_allclose(found[there], 1, rtol=1e-4)
    np.testing.assert_allclose(
        found, whole(corrected_ratios(free._fitted(), free._cells(), codes, batch_size=1000)), rtol=1e-4
    )


def test_cells_are_projected_once_for_all_draws(model, monkeypatch):
    fitted, cells = model._fitted(), model._cells()
    latent = fitted.encode(cells)
    blocks = [fitted.encode(cells[start : start + 300]) for start in range(0, len(cells), 300)]
    np.testing.assert_allclose(fitted.encode(cells, projected=fitted.project(cells)), latent, atol=1e-6)
    np.testing.assert_allclose(np.concatenate(blocks), latent, atol=1e-4)
    assert not np.allclose(fitted.encode(cells, projected=np.zeros_like(fitted.project(cells))), latent)

    projected, transform = [], PCA.transform
    monkeypatch.setattr(PCA, "transform", lambda self, counts: projected.append(counts) or transform(self, counts))
    wanted = np.arange(0, len(cells), 2)
    for draw in posterior_draws(fitted, cells, wanted, [0], BayesianConfig(n_samples=3)):
        assert sum(len(rows) for rows, *_ in draw) == len(wanted)
    assert [counts.shape[0] for counts in projected] == [len(wanted)]


def test_ratios_do_not_depend_on_the_condition_a_cell_is_told_to_have(model):
    fitted, cells = model._fitted(), model._cells()
    latent, covariates = fitted.encode(cells), fitted.design.encode(cells.obs)

    def ratios(covariates):
        blocks = batch_ratios(fitted, latent, covariates, cells.batch, [0, 1, 2], batch_size=512)
        return np.concatenate([ratio for _, ratio in blocks])

    exchanged = covariates[np.random.default_rng(0).permutation(len(covariates))]
    assert not np.array_equal(exchanged, covariates)
    np.testing.assert_allclose(ratios(exchanged), ratios(covariates), rtol=1e-4)


def test_logarithms_of_ratios_are_the_true_shifts_between_batches(model, simulated):
    ratio = whole(corrected_ratios(model._fitted(), model._cells(), [2]))
    first = (simulated.obs["batch"] == "batch_0").to_numpy()
    shift = simulated.varm["batch_shift"]
    expected = (shift["batch_2"] - shift["batch_0"]).to_numpy()
    expressed = np.asarray(simulated.X.mean(axis=0)).ravel() > 1
    fit = stats.linregress(expected[expressed], np.log(ratio[first]).mean(axis=0)[expressed])
    assert fit.rvalue > 0.9
    assert fit.slope == pytest.approx(1, abs=0.15)


def test_cells_of_an_unknown_batch_are_corrected_from_the_mean_batch(free):
    cells = free._cells()
    unknown = type(cells)(cells.counts[:50], np.full(50, -1), cells.obs.iloc[:50])
    found = whole(corrected_ratios(free._fitted(), unknown, [1]))
    wanted = free.get_normalized_expression(indices=np.arange(50), transform_batch="batch_1", return_numpy=True)
    other = free.adata[:50].copy()
    other.obs["batch"] = "new"
    own = free.get_normalized_expression(other, return_numpy=True)
    np.testing.assert_allclose(found, wanted / own, rtol=2e-4)


def test_ratios_are_bounded_where_a_batch_does_not_show_a_gene():
    class Extreme:
        def rates(self, latent, covariates, batch, *, per_cell, **_):
            yield (
                slice(0, 2),
                np.array([[1e-3, 0.0, 0.5], [1e-3, 0.0, 0.5]] if per_cell else [[0.9, 0.0, 0.0]] * 2, "f4"),
            )

    nothing = np.zeros((2, 0), dtype=np.float32)
    found = next(batch_ratios(Extreme(), nothing, nothing, np.zeros(2, int), [0], batch_size=2))[1]
    np.testing.assert_allclose(found, [[16, 1, 1 / 16]] * 2)


def test_a_decoder_that_does_not_know_the_batch_has_nothing_to_correct(simulated):
    blind = train(simulated[:200].copy(), epochs=(1, 1), use_batch_conditioning=False)
    with pytest.raises(InvalidArgumentError, match="use_batch_conditioning=False"):
        blind.differential_expression(**TREATED, sample_key="donor", how=PseudobulkConfig(expression="corrected"))


def test_corrected_sums_of_donors_are_alike_in_all_batches_and_keep_their_depth(model, simulated):
    ratio = whole(corrected_ratios(model._fitted(), model._cells(), [0, 1, 2]))
    obs = simulated.obs.assign(unit=simulated.obs["donor"].astype(str))
    raw, _ = pseudobulk_sums(simulated.X, obs, "unit")
    corrected = pd.DataFrame(simulated.X.toarray() * ratio).groupby(obs["unit"].to_numpy()).sum()
    batch = obs.groupby("unit")["batch"].first()
    condition = obs.groupby("unit")["condition"].first()
    expressed = raw.mean(axis=0).to_numpy() > 200

    def between(sums):
        logs = np.log2(sums.div(sums.sum(axis=1), axis=0)).to_numpy()[:, expressed]
        means = pd.DataFrame(logs, index=sums.index).groupby([condition, batch], observed=True).mean()
        return np.square(means.groupby(level=0, observed=True).std(ddof=1)).to_numpy().mean()

    # Donors differ too, by 0.14 each; two in a batch.
    donors = (0.1 / np.log(2)) ** 2 / 2
    assert between(raw) > 0.2
    assert between(corrected) < 2 * donors

    how = PseudobulkConfig(expression="corrected")
    result = model.differential_expression(**TREATED, sample_key="donor", how=how)
    totals = raw.sum(axis=1)[result.units["donor"]].to_numpy()
    np.testing.assert_allclose(result.units["total_counts"], totals, rtol=1e-3)


def clear(simulated):
    """Genes with large effects and more than a count in a cell."""
    expressed = np.asarray(simulated.X.mean(axis=0)).ravel() > 1
    return expressed & (simulated.var["log2fc_proportion_treat"].abs() > 0.6) & simulated.var["is_de_treat"]


@pytest.mark.parametrize("expression", ["raw", "corrected"])
def test_corrected_counts_tell_the_true_effects(model, simulated, expression):
    how = PseudobulkConfig(expression=expression)
    table = model.differential_expression(**TREATED, sample_key="donor", how=how).table
    effect = simulated.var["is_de_treat"].to_numpy()
    true = simulated.var["log2fc_proportion_treat"].to_numpy()
    tested = table["p_value"].notna().to_numpy()
    assert np.polyfit(true[effect & tested], table["lfc"][effect & tested], 1)[0] == pytest.approx(1, abs=0.1)
    assert (table["p_value"][~effect & tested] < 0.05).mean() < 0.09
    assert table["is_de"][clear(simulated).to_numpy()].mean() > 0.9


def test_intervals_of_decoded_expression_cover_only_with_the_donors_own_counts(model, simulated):
    config = BayesianConfig(n_samples=8)
    true = simulated.var["log2fc_proportion_treat"].to_numpy()

    def covered(table):
        return ((table["ci_low"] <= true) & (true <= table["ci_high"])).mean()

    result = model.differential_expression(**TREATED, sample_key="donor", how=config)
    assert covered(result.table) > 0.9
    called = result.table["is_de"].to_numpy()
    effect = simulated.var["is_de_treat"].to_numpy()
    assert called[clear(simulated)].mean() > 0.9
    assert (~effect[called]).mean() <= 0.1
    assert np.polyfit(true[effect], result.table["lfc_mean"][effect], 1)[0] == pytest.approx(1, abs=0.1)

    cells = model._cells()
    draws = posterior_draws(model._fitted(), cells, np.arange(len(cells)), [0, 1, 2], config)
    blind = (((rows, rates) for rows, rates, _ in draw) for draw in draws)
    decoded = bayesian_de(blind, cells.obs, model.gene_names, **TREATED, sample_key="donor", batch_key="batch")
    assert covered(decoded.table) < 0.75


def test_draws_are_corrected_proportions_and_the_counts_expected_of_each_cell(free):
    """On average over dropout masks, what the getters decode without dropout."""
    fitted, cells = free._fitted(), free._cells()
    n_draws, wanted = 30, np.arange(5, 105)
    mean = {"return_numpy": True, "indices": wanted}
    draws = posterior_draws(fitted, cells, wanted, [1], BayesianConfig(n_samples=n_draws, batch_size=64))
    rates, expected = np.zeros((100, free.adata.n_vars)), np.zeros((100, free.adata.n_vars))
    for draw in draws:
        rows, *values = (np.concatenate(parts) for parts in zip(*draw, strict=True))
        np.testing.assert_array_equal(rows, wanted)
        np.testing.assert_allclose(values[0].sum(axis=1), 1, rtol=1e-4)
        np.testing.assert_allclose(values[1].sum(axis=1), cells.counts[wanted].sum(axis=1).A1, rtol=1e-3)
        rates += values[0] / n_draws
        expected += values[1] / n_draws
    expressed = rates.mean(axis=0) > 1e-3
    for found, decoded in (
        (rates, free.get_normalized_expression(transform_batch="batch_1", **mean)),
        (expected, free.get_normalized_expression(library_size="observed", **mean)),
    ):
        assert np.abs(np.log(found / decoded).mean(axis=0)[expressed]).max() < 0.15


def test_bayesian_comparison_inside_cell_types_and_without_donors(model):
    how = BayesianConfig(n_samples=2)
    within = model.differential_expression(**TREATED, sample_key="donor", within="cell_type", how=how)
    assert isinstance(within, StratifiedDEResult)
    assert list(within) == ["type_0", "type_1", "type_2", "type_3"]
    kinds = model.adata.obs["cell_type"].value_counts()
    assert {kind: sum(within[kind].n_cells.values()) for kind in within} == kinds[list(within)].to_dict()
    with pytest.warns(CellstillWarning, match="sample_key=None takes cells as the replicates"):
        alone = model.differential_expression(**TREATED, how=how)
    assert "Cells, not donors, are the replicates" in repr(alone)
    assert alone.design == "~ batch + condition"
    donors = model.differential_expression(**TREATED, sample_key="donor", how=how)
    assert np.corrcoef(alone.table["lfc_mean"], donors.table["lfc_mean"])[0, 1] > 0.95


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the kernel's record of peak memory")
def test_memory_of_a_comparison_does_not_grow_with_the_number_of_draws():
    adata = simulate_counts(n_obs=600, n_vars=1000, n_batches=2, n_donors_per_group=2, seed=1)
    small = train(adata, epochs=(1, 1), n_hidden=16)

    def peak(n_samples):
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")
        small.differential_expression(**TREATED, sample_key="donor", how=BayesianConfig(n_samples=n_samples))
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024

    peak(2)
    few, many = peak(2), peak(18)
    # Kept, each draw would take 4.8 MB.
    assert many < few + 25
