from __future__ import annotations

import json
import shlex

import numpy as np
import pytest
import scipy.sparse as sp


def report(cellstill, path):
    result = cellstill("inspect", path, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
def test_what_it_says_of_a_file(cellstill, cells, here, suffix):
    cells.layers["log"] = cells.X.log1p()
    cells.obsm["X_pca"] = np.ones((cells.n_obs, 3))
    cells.write_h5ad(here / "in.h5ad") if suffix == "h5ad" else cells.write_zarr(here / "in.zarr")
    found = report(cellstill, here / f"in.{suffix}")
    assert (found["n_obs"], found["n_vars"]) == cells.shape
    assert {m["where"]: m["counts"] for m in found["matrices"]} == {"X": True, "layers/log": False}
    totals = np.asarray(cells.X.sum(axis=1)).ravel()
    assert found["matrices"][0]["total_per_cell"]["median"] == np.median(totals)
    assert found["matrices"][0]["density"] == pytest.approx(cells.X.nnz / np.prod(cells.shape))
    assert found["obsm"] == {"X_pca": [240, 3]}
    assert found["counts"] == "X"
    assert shlex.split(found["command"])[3:] == [
        *("--batch-key", "batch", "--label-key", "cell_type", "--covariate-key", "condition")
    ]


def test_the_suggested_command_runs(cellstill, cells, write):
    cells.layers["counts"] = cells.X.copy()
    cells.X = cells.X.log1p()
    # Batches of unequal depth: a Poisson thinning of one of them.
    rng = np.random.default_rng(0)
    thin = np.repeat((cells.obs["batch"] == "batch_0").to_numpy(), np.diff(cells.layers["counts"].indptr))
    data = cells.layers["counts"].data
    data[thin] = 1 + rng.binomial(data[thin].astype(int) - 1, 0.2)
    found = report(cellstill, write(cells))
    command = shlex.split(found["command"])
    assert command[-4:] == ["--layer", "counts", "--pca-method", "pearson_residuals"]
    assert any("library sizes differ" in problem for problem in found["problems"])
    result = cellstill(*command[1:], quick=True)
    assert result.exit_code == 0, result.stderr


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda a: setattr(a, "X", a.X.log1p()), "bring raw counts"),
        (lambda a: setattr(a, "var_names", ["g", "g", *a.var_names[2:]]), "1 gene names occur twice (g)"),
        (lambda a: setattr(a, "obs_names", ["c", "c", *a.obs_names[2:]]), "adata.obs_names_make_unique()"),
        (lambda a: setattr(a, "X", sp.diags(np.arange(240) != 5, dtype=np.float32) @ a.X), "1 cells without a count"),
        (lambda a: a.obs.insert(0, "donor_id", [None, *["d", "e"] * 119, "e"]), "obs['donor_id'] is missing for 1"),
        (lambda a: a.obs.drop(columns=["batch", "donor"], inplace=True), "No column of obs looks like a batch"),
        (lambda a: a.obs.drop(columns=["batch"], inplace=True), "'donor' names samples, which can serve as batches"),
    ],
)
def test_what_stands_in_the_way(cellstill, cells, write, spoil, words):
    spoil(cells)
    path = write(cells)
    assert any(words in problem for problem in report(cellstill, path)["problems"])
    printed = cellstill("inspect", path)
    assert printed.exit_code == 0
    assert words[:30] in printed.stdout


def test_it_prints_for_people(cellstill, cells, write):
    cells.obs["odd[/]name"] = "x"
    text = cellstill("inspect", write(cells)).stdout
    assert "in.h5ad: 240 cells x 60 genes" in text
    assert "nested in batch and condition" in " ".join(text.split())
    assert "odd[/]name" in text
    assert "memory for an integration: about" in text
    assert "cellstill integrate" in text


def test_the_matrix_is_never_held_whole(cells, write, cellstill, monkeypatch):
    from cellstill.io import anndata as stored

    def refuse(*args):
        raise AssertionError("the whole matrix was asked for")

    monkeypatch.setattr(stored.StoredMatrix, "to_csr", refuse)
    monkeypatch.setattr(stored.StoredMatrix, "lazy", refuse)
    sizes = []
    blocks = stored.StoredMatrix.blocks

    def watched(self, size=1000):
        for block in blocks(self, size):
            sizes.append(len(block[0]))
            yield block

    monkeypatch.setattr(stored.StoredMatrix, "blocks", watched)
    assert cellstill("inspect", write(cells), "--json").exit_code == 0
    assert len(sizes) > 1
    assert max(sizes) <= 1000
