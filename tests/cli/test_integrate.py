"""`cellstill integrate` in this process, on small data: what it writes is what the library computes."""

from __future__ import annotations

import json
import warnings

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest

from cellstill import Distiller
from cellstill.cli import _pipeline
from cellstill.data import fit_pca
from cellstill.metrics import integration_table, knn_accuracy

ARGS = ["--batch-key", "batch", "--label-key", "cell_type", "--covariate-key", "condition"]


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


@pytest.fixture
def whole(cells):
    """A data set with something in every place."""
    cells.layers["counts"] = cells.X.copy()
    cells.X = cells.X.log1p()
    cells.raw = cells
    cells.obs["text"] = pd.Series([f"t{i % 7}" for i in range(cells.n_obs)], index=cells.obs_names, dtype=object)
    cells.obs["flag"] = np.arange(cells.n_obs) % 2 == 0
    cells.obsm["X_old"] = np.random.default_rng(0).normal(size=(cells.n_obs, 3))
    cells.uns["about"] = {"a": 1, "b": "text"}
    return cells


def assert_kept(before, after):
    """Everything of ``before`` is in ``after``, and is the same."""
    pd.testing.assert_frame_equal(after.obs, before.obs)
    pd.testing.assert_frame_equal(after.var, before.var)
    for first, second in [(before.X, after.X), *((before.layers[k], after.layers[k]) for k in before.layers)]:
        assert first.dtype == second.dtype
        assert (first != second).nnz == 0
    for key in before.obsm:
        np.testing.assert_array_equal(before.obsm[key], after.obsm[key])
    for key in before.varm:
        pd.testing.assert_frame_equal(before.varm[key], after.varm[key])
    assert (before.raw is None) == (after.raw is None)
    if before.raw is not None:
        assert (before.raw.X != after.raw.X).nnz == 0
    assert set(before.uns) | {"cellstill"} == set(after.uns)


@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
def test_everything_is_kept_and_the_results_are_the_models(cellstill, whole, here, suffix):
    path = here / f"in.{suffix}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole.write_h5ad(path) if suffix == "h5ad" else whole.write_zarr(path)
        before = ad.read_h5ad(path) if suffix == "h5ad" else ad.read_zarr(path)
    result = cellstill("integrate", path, *ARGS, "--layer", "counts", "--corrected", quick=True)
    assert result.exit_code == 0, result.stderr
    folder = here / "in_cellstill"
    assert sorted(p.name for p in folder.iterdir()) == ["figures", "integrated.h5ad", "model", "summary.json"]
    after = ad.read_h5ad(folder / "integrated.h5ad")
    assert_kept(before, after)
    assert set(after.obsm) == {"X_old", "X_cellstill", "X_teacher", "X_pca_uncorrected"}

    model = Distiller.load(folder / "model", after.copy())
    np.testing.assert_allclose(after.obsm["X_cellstill"], model.latent.student, atol=1e-5)
    np.testing.assert_array_equal(after.obsm["X_teacher"], model.latent.teacher)
    np.testing.assert_allclose(after.layers["corrected"], model.corrected_expression(), atol=1e-4)
    pcs = after.obsm["X_pca_uncorrected"]
    assert pcs.shape == (240, 5)
    np.testing.assert_allclose(pcs.mean(axis=0), 0, atol=1e-3)
    off_diagonal = np.corrcoef(pcs.T) - np.eye(5)
    assert np.abs(off_diagonal).max() < 1e-3

    record = after.uns["cellstill"]
    assert record["settings"]["batch_key"] == "batch"
    assert list(record["settings"]["covariate_keys"]) == ["condition"]
    assert record["settings"]["n_latent"] == 5
    assert set(record["versions"]) >= {"cellstill", "torch", "anndata", "harmonypy", "scvi-tools"}


def test_components_before_are_of_the_counts_as_they_are_when_genes_are_scaled(cellstill, cells, write, here):
    result = cellstill("integrate", write(cells), *ARGS, "--pca-method", "scaled_residuals", quick=True)
    assert result.exit_code == 0, result.stderr
    after = ad.read_h5ad(here / "in_cellstill" / "integrated.h5ad")
    model = Distiller.load(here / "in_cellstill" / "model", after.copy())
    assert model.pca_method == "scaled_residuals"
    np.testing.assert_allclose(after.obsm["X_cellstill"], model.latent.student, atol=1e-5)
    pca = fit_pca(cells.X, after.obsm["X_teacher"].shape[1], method="pearson_residuals")
    np.testing.assert_allclose(after.obsm["X_pca_uncorrected"], pca.transform(cells.X), atol=1e-3)


def test_the_summary_holds_the_metrics_of_what_was_written(cellstill, cells, write, here):
    result = cellstill("integrate", write(cells), *ARGS, quick=True)
    assert result.exit_code == 0, result.stderr
    folder = here / "in_cellstill"
    summary, after = summary_of(folder), ad.read_h5ad(folder / "integrated.h5ad")
    names = ["before (PCA)", "teacher (harmony)", "after (student)"]
    embeddings = dict(
        zip(names, (after.obsm[k] for k in ("X_pca_uncorrected", "X_teacher", "X_cellstill")), strict=True)
    )
    table = integration_table(embeddings, after.obs["batch"].astype(str), after.obs["cell_type"].astype(str), seed=0)
    for name in names:
        scores = summary["scores"]["embeddings"][name]
        for column in table:
            assert scores[column] == pytest.approx(table.loc[name, column], abs=1e-9), (name, column)
        assert scores["ilisi_of_ceiling"] == pytest.approx(scores["ilisi"] / scores["ilisi_ceiling"])
        accuracy = knn_accuracy(embeddings[name], after.obs["condition"].astype(str))
        assert summary["scores"]["covariate_knn_accuracy"][name]["condition"] == pytest.approx(accuracy)
        assert f"{scores['cross_batch_knn_accuracy']:.3f}" in result.stdout

    model = Distiller.load(folder / "model")
    assert summary["student_teacher_r2"] == pytest.approx(model.get_teacher_agreement(), abs=1e-5)
    assert summary["training"]["encoder"]["epochs"] == 2
    best = model.history["encoder"]["validation_loss"]
    assert summary["training"]["encoder"]["best_epoch"] == best.idxmin()
    assert summary["input"]["batches"] == cells.obs["batch"].value_counts().to_dict()
    assert summary["input"]["median_library_size"] == np.median(np.asarray(cells.X.sum(axis=1)))
    assert summary["input"]["name"] == summary["settings"]["path"] == "in.h5ad"
    assert summary["teacher"]["record"]["n_iter"] >= 1
    seconds = dict(summary["seconds"])
    total = seconds.pop("total")
    assert set(seconds) == {"load", "read", "check", "train", "encode", "score", "draw", "write"}
    assert 0.9 * sum(seconds.values()) <= total <= sum(seconds.values()) + 2
    memory = summary["memory_mb"]
    assert memory["peak"] >= memory["loaded"] > 50
    assert memory["increase"] == pytest.approx(memory["peak"] - memory["loaded"])


def test_the_same_seed_gives_the_same_result(cellstill, cells, write, here):
    path = write(cells)
    latents = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert cellstill("integrate", path, *ARGS, "--seed", seed, "--out", here / name, quick=True).exit_code == 0
        latents[name] = ad.read_h5ad(here / name / "integrated.h5ad").obsm["X_cellstill"]
    np.testing.assert_array_equal(latents["a"], latents["b"])
    assert np.abs(latents["a"] - latents["c"]).max() > 1e-3


def test_counts_layer_is_found_and_said_so(cellstill, whole, write, here):
    result = cellstill("integrate", write(whole), *ARGS, quick=True)
    assert result.exit_code == 0
    assert "warning: adata.X holds no counts, so adata.layers['counts'] is used. Pass --layer counts" in result.stderr
    summary = summary_of(here / "in_cellstill")
    assert summary["input"]["counts"] == "layers/counts"
    warned = [line for line in result.stderr.splitlines() if not line.startswith("stage: ")]
    assert summary["warnings"] == [line.removeprefix("warning: ") for line in warned]
    # The model reads that layer of new data, too.
    query = ad.read_h5ad(here / "in_cellstill" / "integrated.h5ad")
    latent = Distiller.load(here / "in_cellstill" / "model").get_latent_representation(query)
    np.testing.assert_allclose(latent, query.obsm["X_cellstill"], atol=1e-5)


def test_cells_of_one_name(cellstill, cells, write, here):
    cells.obs_names = [f"c{i % 50}" for i in range(cells.n_obs)]
    result = cellstill("integrate", write(cells), "--batch-key", "batch", quick=True)
    assert result.exit_code == 0, result.stderr
    with h5py.File(here / "in_cellstill" / "integrated.h5ad") as file:
        assert list(ad.io.read_elem(file["obs"]).index) == list(cells.obs_names)


def test_results_of_an_earlier_run_are_replaced(cellstill, cells, write, here):
    assert cellstill("integrate", write(cells), "--batch-key", "batch", "--corrected", quick=True).exit_code == 0
    first = here / "in_cellstill" / "integrated.h5ad"
    again = cellstill(
        *("integrate", first, "--batch-key", "batch", "--corrected", "--seed", 5, "--out", here / "again"), quick=True
    )
    assert again.exit_code == 0, again.stderr
    one, two = ad.read_h5ad(first), ad.read_h5ad(here / "again" / "integrated.h5ad")
    assert (one.X != two.X).nnz == 0
    assert np.abs(one.obsm["X_cellstill"] - two.obsm["X_cellstill"]).max() > 1e-3
    assert np.abs(one.layers["corrected"] - two.layers["corrected"]).max() > 1e-3
    assert two.uns["cellstill"]["settings"]["seed"] == 5


def test_target_batch(cellstill, cells, write, here):
    args = ["--corrected", "--target-batch", "batch_1"]
    assert cellstill("integrate", write(cells), "--batch-key", "batch", *args, quick=True).exit_code == 0
    after = ad.read_h5ad(here / "in_cellstill" / "integrated.h5ad")
    model = Distiller.load(here / "in_cellstill" / "model", after.copy())
    np.testing.assert_allclose(after.layers["corrected"], model.corrected_expression("batch_1"), atol=1e-4)
    assert np.abs(after.layers["corrected"] - model.corrected_expression("batch_0")).max() > 1e-2


def test_latent_teacher(cellstill, cells, write, here):
    cells.obsm["X_mine"] = np.random.default_rng(0).normal(size=(cells.n_obs, 4)).astype(np.float32)
    args = ["--teacher", "latent", "--obsm-key", "X_mine"]
    result = cellstill("integrate", write(cells), "--batch-key", "batch", *args, quick=True)
    assert result.exit_code == 0, result.stderr
    after = ad.read_h5ad(here / "in_cellstill" / "integrated.h5ad")
    np.testing.assert_array_equal(after.obsm["X_teacher"], cells.obsm["X_mine"])
    assert after.obsm["X_cellstill"].shape == (240, 4)
    assert "teacher (latent)" in result.stdout


def test_teacher_settings_reach_the_teacher(cellstill, cells, write, here):
    args = ["--teacher-setting", "theta=0.5", "--teacher-setting", "max_iter=3"]
    assert cellstill("integrate", write(cells), "--batch-key", "batch", *args, quick=True).exit_code == 0
    teacher = summary_of(here / "in_cellstill")["teacher"]
    assert teacher["settings"]["theta"] == 0.5
    assert teacher["settings"]["max_iter"] == 3
    assert teacher["record"]["n_iter"] <= 3


@pytest.mark.parametrize(
    ("labels", "words"),
    [("of_batch", "no label that occurs in two batches"), ("constant", "holds only 'x'")],
)
def test_labels_that_cannot_be_scored_do_not_end_the_run(cellstill, cells, write, here, labels, words):
    cells.obs["of_batch"] = cells.obs["batch"].astype(str) + cells.obs["cell_type"].astype(str)
    cells.obs["constant"] = "x"
    result = cellstill("integrate", write(cells), "--batch-key", "batch", "--label-key", labels, quick=True)
    assert result.exit_code == 0, result.stderr
    assert f"warning: --label-key {labels}" in result.stderr
    assert words in result.stderr
    assert "clisi" not in summary_of(here / "in_cellstill")["scores"]["embeddings"]["after (student)"]


@pytest.mark.parametrize("existing", [False, True])
def test_a_failure_at_the_end_leaves_nothing_and_destroys_nothing(cellstill, cells, write, here, monkeypatch, existing):
    path = write(cells)
    if existing:
        (here / "in_cellstill").mkdir()
        (here / "in_cellstill" / "summary.json").write_text("old")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_pipeline, "write_json", full)
    result = cellstill("integrate", path, "--batch-key", "batch", "--overwrite", quick=True)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith("error: OSError: [Errno 28] No space left on device.")
    left = sorted(str(p.relative_to(here)) for p in here.rglob("*"))
    assert left == (["in.h5ad", "in_cellstill", "in_cellstill/summary.json"] if existing else ["in.h5ad"])
    if existing:
        assert (here / "in_cellstill" / "summary.json").read_text() == "old"


def test_large_data_are_scored_and_drawn_on_a_sample(cellstill, cells, write, here, monkeypatch):
    monkeypatch.setattr(_pipeline, "MAX_SCORED", 150)
    monkeypatch.setattr(_pipeline, "MAX_DRAWN", 100)
    result = cellstill("integrate", write(cells), *ARGS, quick=True)
    assert result.exit_code == 0, result.stderr
    assert "random sample of 150 cells" in result.stdout
    summary = summary_of(here / "in_cellstill")
    assert (summary["scores"]["n_cells_scored"], summary["n_cells_drawn"]) == (150, 100)
    assert len(ad.read_h5ad(here / "in_cellstill" / "integrated.h5ad")) == 240
