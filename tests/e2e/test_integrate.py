"""`cellstill integrate` on real counts, from file to folder."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import numpy as np
import pytest

from cellstill import Distiller

BEFORE, AFTER = "before (PCA)", "after (student)"


@dataclass
class Run:
    source: Path
    folder: Path
    stdout: str
    stderr: str
    summary: dict

    @property
    def scores(self):
        return self.summary["scores"]["embeddings"]


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


KEYS = ("--batch-key", "batch", "--label-key", "cell_type")
RUNS = {
    "cellbench": ("cellbench_3cl_3tech.h5ad", *KEYS, "--epochs-encoder", "15", "--epochs-decoder", "2"),
    "cellbench_residuals": (
        *("cellbench_3cl_3tech.h5ad", *KEYS, "--pca-method", "pearson_residuals"),
        *("--epochs-encoder", "15", "--epochs-decoder", "2"),
    ),
    "kang": (
        *("kang_pbmc.h5ad", "--batch-key", "donor", "--label-key", "cell_type", "--covariate-key", "condition"),
        *("--epochs-encoder", "10", "--epochs-decoder", "2"),
    ),
}


@pytest.fixture(scope="module")
def integrate(cellstill, real_data, tmp_path_factory):
    """Integrate the data sets of ``RUNS``, two at a time, and hand out each run by its name."""
    folders = {name: tmp_path_factory.mktemp(name) for name in RUNS}
    sources = {name: real_data(RUNS[name][0]) for name in RUNS}

    def run(name: str) -> Run:
        source, cwd = sources[name], folders[name]
        before = digest(source)
        process = cellstill("integrate", source, *RUNS[name][1:], cwd=cwd)
        assert process.returncode == 0, process.stderr
        assert digest(source) == before, "the input was changed"
        folder = cwd / f"{source.stem}_cellstill"
        assert [p.name for p in cwd.iterdir()] == [folder.name]
        summary = json.loads((folder / "summary.json").read_text())
        return Run(source, folder, process.stdout, process.stderr, summary)

    with ThreadPoolExecutor(max_workers=2) as pool:
        runs = {name: pool.submit(run, name) for name in RUNS}
    return lambda name: runs[name].result()


def test_cell_lines_are_found_across_technologies(integrate):
    run = integrate("cellbench")
    assert run.scores[AFTER]["cross_batch_knn_accuracy"] >= 0.98
    assert run.scores[AFTER]["clisi"] >= 0.99
    assert run.scores[AFTER]["ilisi"] > run.scores[BEFORE]["ilisi"] + 0.05
    assert run.summary["student_teacher_r2"] >= 0.95
    assert "consider --pca-method pearson_residuals" in run.stderr


def test_pearson_residuals_mix_technologies_of_different_depth(integrate):
    run = integrate("cellbench_residuals")
    assert run.scores[AFTER]["ilisi"] > 0.17
    assert run.scores[AFTER]["cross_batch_knn_accuracy"] >= 0.98
    assert "pearson_residuals" not in run.stderr


def test_donors_mix_and_the_condition_stays(integrate):
    run = integrate("kang")
    assert run.scores[AFTER]["ilisi"] > run.scores[BEFORE]["ilisi"]
    condition = {name: values["condition"] for name, values in run.summary["scores"]["covariate_knn_accuracy"].items()}
    assert condition[AFTER] >= condition[BEFORE] - 0.03
    assert run.summary["student_teacher_r2"] >= 0.9


@pytest.mark.parametrize("name", ["cellbench", "kang"])
def test_the_data_come_back_whole(integrate, name):
    run = integrate(name)
    before, after = ad.read_h5ad(run.source), ad.read_h5ad(run.folder / "integrated.h5ad")
    for part in ("data", "indices", "indptr"):
        first, second = getattr(before.X, part), getattr(after.X, part)
        assert first.dtype == second.dtype
        assert first.tobytes() == second.tobytes()
    assert before.obs.equals(after.obs)
    assert before.var.equals(after.var)
    assert {*before.uns, "cellstill"} == set(after.uns)
    assert set(after.obsm) == {"X_pca_uncorrected", "X_teacher", "X_cellstill"}
    assert not [key for key in after.obs if key.startswith("_scvi")]


@pytest.mark.parametrize("name", ["cellbench_residuals", "kang"])
def test_the_saved_model_gives_the_written_latent(integrate, name):
    run = integrate(name)
    after = ad.read_h5ad(run.folder / "integrated.h5ad")
    model = Distiller.load(run.folder / "model", after.copy())
    np.testing.assert_allclose(model.latent.student, after.obsm["X_cellstill"], rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(model.latent.teacher, after.obsm["X_teacher"])
    # Without data, and from genes in another order.
    shuffled = after[:100, np.random.default_rng(0).permutation(after.n_vars)].copy()
    latent = Distiller.load(run.folder / "model").get_latent_representation(shuffled)
    np.testing.assert_allclose(latent, after.obsm["X_cellstill"][:100], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["cellbench", "kang"])
def test_figures_show_something(integrate, name):
    from matplotlib.image import imread

    figures = integrate(name).folder / "figures"
    assert sorted(p.name for p in figures.iterdir()) == ["training.pdf", "training.png", "umap.pdf", "umap.png"]
    for path in figures.glob("*.png"):
        image = imread(path)[..., :3]
        assert min(image.shape[:2]) > 300, path.name
        inked = (image < 0.97).any(axis=-1).mean()
        assert 0.005 < inked < 0.6, path.name
    umap = np.round(imread(figures / "umap.png")[..., :3] * 255).astype(int)
    strong = umap[np.ptp(umap, axis=-1) > 60]
    counts = np.unique(strong // 8, axis=0, return_counts=True)[1]
    # Each batch and each label has a colour of its own.
    assert (counts > 100).sum() >= {"cellbench": 6, "kang": 12}[name]
    rows = {"cellbench": 2, "kang": 3}[name]
    assert umap.shape[0] / umap.shape[1] == pytest.approx(rows / 2.4, rel=0.25)
    for path in figures.glob("*.pdf"):
        content = path.read_bytes()
        assert content.startswith(b"%PDF-")
        assert b"%%EOF" in content[-32:]
        assert len(content) > 5_000


def test_the_table_and_the_summary_agree(integrate):
    run = integrate("kang")
    rows = {line[:30].strip(): line[30:].split() for line in run.stdout.splitlines()}
    columns = [run.scores[name] for name in (BEFORE, "teacher (harmony)", AFTER)]
    assert rows["batch mixing: iLISI"] == [f"{scores['ilisi']:.3f}" for scores in columns]
    assert rows["label kNN across batches"] == [f"{scores['cross_batch_knn_accuracy']:.3f}" for scores in columns]
    assert f"peak memory {run.summary['memory_mb']['peak']:,.0f} MB" in run.stdout
    assert "FutureWarning" not in run.stderr
    for line in run.stderr.splitlines():
        assert line.startswith(("warning: ", "stage: "))


def test_inspect_estimates_the_memory_that_integrate_takes(integrate, cellstill, tmp_path):
    for name in ("cellbench", "kang"):
        run = integrate(name)
        report = json.loads(cellstill("inspect", run.source, "--json", cwd=tmp_path).stdout)
        assert report["memory_mb"] == pytest.approx(run.summary["memory_mb"]["peak"], rel=0.35)


def test_inspect_suggests_the_keys_of_kang(cellstill, real_data, tmp_path):
    report = json.loads(cellstill("inspect", real_data("kang_pbmc.h5ad"), "--json", cwd=tmp_path).stdout)
    assert report["command"].endswith("--batch-key donor --label-key cell_type --covariate-key condition")
