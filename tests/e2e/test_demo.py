"""`cellstill demo`: simulated data whose truth has to be recovered."""

from __future__ import annotations

import json

import anndata as ad
import numpy as np


def test_demo_recovers_the_truth(cellstill, tmp_path):
    done = cellstill("demo", "--out", "results", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "results"
    assert sorted(p.name for p in folder.iterdir()) == [
        *("figures", "integrated.h5ad", "model", "new_cells.h5ad", "simulated.h5ad", "summary.json", "truth.json")
    ]
    checks = {check["check"]: check for check in json.loads((folder / "truth.json").read_text())["checks"]}
    assert len(checks) == 11
    assert all(check["passed"] for check in checks.values())
    assert done.stdout.count("pass") == 11
    assert checks["batch shift left in expression: slope"]["value"] < 0.2
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["settings"]["covariate_keys"] == ["condition"]
    simulated, after = ad.read_h5ad(folder / "simulated.h5ad"), ad.read_h5ad(folder / "integrated.h5ad")
    assert (simulated.X != after.X).nnz == 0
    assert np.isfinite(after.obsm["X_cellstill"]).all()


def test_an_existing_folder_is_kept(cellstill, tmp_path):
    (tmp_path / "cellstill_demo").mkdir()
    done = cellstill("demo", cwd=tmp_path)
    assert done.returncode == 1
    assert "--overwrite" in done.stderr
    assert list((tmp_path / "cellstill_demo").iterdir()) == []
