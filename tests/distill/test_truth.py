"""What a distiller recovers of a simulation whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import optimize, stats

from cellstill.de import BayesianConfig, PseudobulkConfig
from cellstill.metrics import cross_batch_knn_accuracy, ilisi, ilisi_ceiling, knn_accuracy


def test_the_student_agrees_with_its_teacher_on_cells_it_never_saw(model):
    assert model.get_teacher_agreement("test") > 0.95
    test = model.test_indices_
    residual = np.square(model.latent.teacher[test] - model.latent.student[test]).sum(axis=0)
    total = np.square(model.latent.teacher[test] - model.latent.teacher[test].mean(axis=0)).sum(axis=0)
    assert model.get_teacher_agreement("test") == pytest.approx(np.mean(1 - residual / total), rel=1e-5)


def test_batches_mix_and_cell_types_and_condition_stay(model, simulated):
    obs = simulated.obs
    raw = model._fitted().pca.transform(simulated.X)
    assert ilisi(raw, obs["batch"]) < 0.1
    student = model.latent.student
    # Harmony's ridge penalty leaves a sixth of the shifts here, which bounds what its student can reach.
    assert ilisi(student, obs["batch"]) > 0.6 * ilisi_ceiling(student, obs["batch"])
    assert ilisi(student, obs["batch"]) > ilisi(model.latent.teacher, obs["batch"]) - 0.05
    across = cross_batch_knn_accuracy(student, obs["cell_type"], obs["batch"])
    assert across > cross_batch_knn_accuracy(raw, obs["cell_type"], obs["batch"])
    assert across > 0.93
    for kind in obs["cell_type"].cat.categories:
        cells = (obs["cell_type"] == kind).to_numpy()
        condition = obs["condition"][cells]
        assert knn_accuracy(student[cells], condition) > knn_accuracy(raw[cells], condition) - 0.02


def truth(simulated, batch: str, kind: str) -> np.ndarray:
    """True proportions of a control cell."""
    log_mean = simulated.varm["cell_type_log_mean"][kind] + simulated.varm["batch_shift"][batch]
    rates = np.exp(log_mean.to_numpy())
    return rates / rates.sum()


def controls(simulated, kind: str) -> np.ndarray:
    return np.flatnonzero((simulated.obs["cell_type"] == kind) & (simulated.obs["condition"] == "ctrl"))


@pytest.mark.parametrize("batch", ["batch_0", "batch_1", "batch_2"])
@pytest.mark.parametrize("kind", ["type_0", "type_3"])
def test_decoded_proportions_are_the_true_ones_of_the_batch_asked_for(model, simulated, batch, kind):
    decoded = model.get_normalized_expression(
        indices=controls(simulated, kind), transform_batch=batch, return_numpy=True
    )
    np.testing.assert_allclose(decoded.sum(axis=1), 1, rtol=1e-4)
    expected = truth(simulated, batch, kind)
    found = np.log(decoded.mean(axis=0))
    expressed = expected > 1e-4
    assert np.corrcoef(found[expressed], np.log(expected[expressed]))[0, 1] > 0.97
    # The right batch explains it better than any other.
    errors = {
        other: np.square(found - np.log(truth(simulated, other, kind)))[expressed].mean() for other in model.batch_names
    }
    assert min(errors, key=errors.get) == batch


def test_decoded_batch_differences_are_the_true_shifts(model, simulated):
    cells = controls(simulated, "type_1")
    log = [
        np.log(model.get_normalized_expression(indices=cells, transform_batch=b, return_numpy=True)).mean(axis=0)
        for b in ("batch_0", "batch_2")
    ]
    shift = simulated.varm["batch_shift"]
    expected = (shift["batch_0"] - shift["batch_2"]).to_numpy()
    expressed = truth(simulated, "batch_0", "type_1") > 5e-4
    fit = stats.linregress(expected[expressed], (log[0] - log[1])[expressed])
    assert fit.rvalue > 0.9
    assert fit.slope == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("target", [None, "batch_1", ["batch_0", "batch_2"]], ids=["average", "one", "two"])
def test_corrected_expression_no_longer_depends_on_the_batch(model, simulated, target):
    corrected = model.corrected_expression(target_batch=target)
    library = simulated.X.sum(axis=1)
    raw = np.log2(1 + 1e6 * simulated.X.toarray() / np.asarray(library))

    def between(values: np.ndarray) -> float:
        kinds = [controls(simulated, kind) for kind in simulated.obs["cell_type"].cat.categories]
        batches = simulated.obs["batch"].to_numpy()
        means = [[values[k[batches[k] == b]].mean(axis=0) for b in model.batch_names] for k in kinds]
        expressed = raw.mean(axis=0) > 8
        return float(np.std(means, axis=1)[:, expressed].mean())

    assert between(corrected) < 0.25 * between(raw)


def test_averaging_over_batches_is_the_mean_of_decoding_as_each(model):
    each = [
        model.get_normalized_expression(transform_batch=b, library_size=1e6, return_numpy=True)
        for b in model.batch_names
    ]
    np.testing.assert_allclose(model.corrected_expression(), np.log2(np.mean(each, axis=0) + 1), rtol=1e-4)
    np.testing.assert_allclose(
        model.corrected_expression(["batch_0", "batch_2"]), np.log2(np.mean([each[0], each[2]], axis=0) + 1), rtol=1e-4
    )


def dispersion_given_the_true_means(simulated, genes: np.ndarray) -> np.ndarray:
    """Most likely theta of each gene where nothing else is unknown: no model can know it better."""
    obs, varm = simulated.obs, simulated.varm
    log_mean = (
        varm["cell_type_log_mean"][obs["cell_type"]].to_numpy().T
        + varm["batch_shift"][obs["batch"]].to_numpy().T
        + varm["donor_shift"][obs["donor"]].to_numpy().T
        + np.outer(obs["condition"] == "treat", np.log(2) * simulated.var["log2fc_treat"])
    )
    rates = np.exp(log_mean)
    means = obs["library_size"].to_numpy()[:, None] * rates / rates.sum(axis=1, keepdims=True)
    counts = simulated.X.toarray()

    def fit(gene: int) -> float:
        def misfit(log_theta: float) -> float:
            theta = np.exp(log_theta)
            return -stats.nbinom.logpmf(counts[:, gene], theta, theta / (theta + means[:, gene])).sum()

        return float(np.exp(optimize.minimize_scalar(misfit, bounds=(-3, 8), method="bounded").x))

    return np.array([fit(gene) for gene in genes])


def test_inverse_dispersion_is_recovered(model, simulated):
    genes = np.flatnonzero(np.asarray(simulated.X.mean(axis=0)).ravel() > 3)
    found, true = model.module["decoder"].log_theta.exp().numpy()[genes], simulated.var["theta"].to_numpy()[genes]
    best = stats.spearmanr(dispersion_given_the_true_means(simulated, genes), true).statistic
    assert best > 0.9
    assert stats.spearmanr(found, true).statistic > best - 0.2
    # What the small decoder does not explain looks like dispersion, so theta comes out below the truth, not far below.
    assert 0.5 < np.median(found / true) < 1.3


def test_expected_counts_have_the_cells_own_depth_and_fit_the_observed(model, simulated):
    expected = model.get_normalized_expression(library_size="observed", return_numpy=True)
    np.testing.assert_allclose(expected.sum(axis=1), np.asarray(simulated.X.sum(axis=1)).ravel(), rtol=1e-3)
    own = np.corrcoef(np.log1p(expected).ravel(), np.log1p(simulated.X.toarray()).ravel())[0, 1]
    assert own > 0.9


@pytest.mark.parametrize(
    "how", [PseudobulkConfig(method="deseq2"), BayesianConfig(n_samples=20)], ids=["pseudobulk", "bayesian"]
)
def test_differential_expression_finds_the_true_effects(model, simulated, how):
    result = model.differential_expression(
        groupby="condition", group1="treat", group2="ctrl", sample_key="donor", how=how
    )
    table = result.table.set_index("gene")
    assert list(table.index) == list(simulated.var_names)
    lfc = table["lfc" if "lfc" in table else "lfc_mean"]
    true = simulated.var["log2fc_proportion_treat"]
    expressed = (np.asarray(simulated.X.mean(axis=0)).ravel() > 1) & lfc.notna()
    is_true = simulated.var["is_de_treat"] & expressed
    fit = stats.linregress(true[is_true], lfc[is_true])
    assert fit.rvalue > 0.9
    assert fit.slope == pytest.approx(1, abs=0.25)
    strong = is_true & (true.abs() > 0.5)
    assert table["is_de"][strong].mean() > 0.8
    called = table["is_de"] & expressed
    assert (called & ~simulated.var["is_de_treat"]).sum() <= 0.15 * called.sum() + 1
