"""A wrong call ends with exit code 1, one line that says what to do, and nothing on disk."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp


def log_normalise(adata):
    adata.X = adata.X.log1p()


def normalised_layer(adata):
    adata.layers["norm"] = adata.X.log1p()


def missing_batch(adata):
    adata.obs["batch"] = adata.obs["batch"].astype(object)
    adata.obs.loc[adata.obs_names[:3], "batch"] = np.nan


def one_batch(adata):
    adata.obs["batch"] = "b"


def twice_a_gene(adata):
    adata.var_names = ["g", "g", *adata.var_names[2:]]


def empty_cell(adata):
    adata.X = sp.diags(np.arange(adata.n_obs) != 5, dtype=np.float32) @ adata.X


def negative(adata):
    adata.X = adata.X.copy()
    adata.X.data[0] = -1


def embedding(adata):
    adata.obsm["X_other"] = np.ones((adata.n_obs, 2))


def nothing(adata):
    pass


CASES = {
    "log_normalised": (log_normalise, [], ["not integers", "bring raw counts", "--allow-noninteger"]),
    "normalised_layer": (normalised_layer, ["--layer", "norm"], ["not integers", "leave --layer out"]),
    "no_such_layer": (normalised_layer, ["--layer", "cuonts"], ["--layer cuonts is not", "'norm'"]),
    "missing_batch": (missing_batch, [], ["--batch-key", "3 of 240 cells", "'cell_0'", "notna()"]),
    "one_batch": (one_batch, [], ["'b'", "Name the column"]),
    "twice_a_gene": (twice_a_gene, [], ["'g'", "var_names_make_unique()"]),
    "empty_cell": (empty_cell, [], ["'cell_5'", "sc.pp.filter_cells(adata, min_counts=1)"]),
    "negative": (negative, [], ["negative", "bring raw counts"]),
    "no_such_label": (nothing, ["--label-key", "x"], ["--label-key x is not", "'cell_type'"]),
    "no_such_covariate": (nothing, ["--covariate-key", "x"], ["--covariate-key x is not", "'condition'"]),
    "batch_as_covariate": (nothing, ["--covariate-key", "batch"], ["--covariate-key", "to be removed"]),
    "no_such_teacher": (nothing, ["--teacher", "x"], ["--teacher x is not known", "'harmony'", "'combat'"]),
    "no_such_setting": (nothing, ["--teacher-setting", "x=1"], ["--teacher-setting x of harmony", "'theta'"]),
    "no_such_embedding": (embedding, ["--teacher", "latent", "--obsm-key", "x"], ["--obsm-key x is not", "'X_other'"]),
    "unprotecting_teacher": (
        embedding,
        ["--teacher", "latent", "--obsm-key", "X_other", "--covariate-key", "condition"],
        ["cannot protect", "leave them out"],
    ),
    "no_such_target": (nothing, ["--corrected", "--target-batch", "x"], ["--target-batch x", "'batch_0', 'batch_1'"]),
    "no_such_device": (nothing, ["--accelerator", "gpu"], ["--accelerator gpu", "Use --accelerator auto"]),
    "too_many_dimensions": (nothing, ["--n-latent", "60"], ["--n-latent 60", "at most 59"]),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input(cellstill, cells, write, here, monkeypatch, case):
    spoil, args, remedy = CASES[case]
    if case == "no_such_device":
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    spoil(cells)
    path = write(cells)
    before = path.read_bytes()
    result = cellstill("integrate", path, "--batch-key", "batch", *args)
    assert result.exit_code == 1
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if not line.startswith(("warning: ", "stage: "))]
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    for words in remedy:
        assert words in lines[0]
    assert [p.name for p in here.iterdir()] == ["in.h5ad"]
    assert path.read_bytes() == before


def test_no_such_batch_key_is_found_before_anything_heavy_is_imported(cells, write, here):
    import json
    import subprocess
    import sys

    code = (
        "import sys, json; from typer.testing import CliRunner; from cellstill.cli.app import app; "
        f"r = CliRunner().invoke(app, ['integrate', {str(write(cells))!r}, '--batch-key', 'donr']); "
        "print(json.dumps([r.exit_code, r.stderr, 'torch' in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=here)
    exit_code, err, torch_loaded = json.loads(done.stdout)
    assert exit_code == 1
    assert "--batch-key donr is not in adata.obs" in err
    assert "'donor'" in err
    assert not torch_loaded


def test_a_folder_with_other_files_is_never_replaced(cellstill, cells, write, here):
    (here / "in_cellstill").mkdir()
    (here / "in_cellstill" / "thesis.tex").write_text("x")
    result = cellstill("integrate", write(cells), "--batch-key", "batch", "--overwrite")
    assert result.exit_code == 1
    assert "thesis.tex" in result.stderr
    assert (here / "in_cellstill" / "thesis.tex").read_text() == "x"


def test_existing_folder(cellstill, cells, write, here):
    (here / "in_cellstill").mkdir()
    (here / "in_cellstill" / "precious").write_text("x")
    result = cellstill("integrate", write(cells), "--batch-key", "batch")
    assert result.exit_code == 1
    assert "in_cellstill exists" in result.stderr
    assert "--overwrite" in result.stderr
    assert (here / "in_cellstill" / "precious").read_text() == "x"


def test_a_folder_that_holds_the_input_is_not_replaced(cellstill, cells, write, here):
    path = write(cells)
    result = cellstill("integrate", path, "--batch-key", "batch", "--out", here, "--overwrite")
    assert result.exit_code == 1
    assert "lies in the output folder" in result.stderr
    assert path.exists()


@pytest.mark.parametrize("command", [["integrate", "--batch-key", "batch"], ["inspect"]])
def test_truncated_file(cellstill, cells, write, here, command):
    path = write(cells)
    path.write_bytes(path.read_bytes()[:-2000])
    result = cellstill(*command, path)
    assert result.exit_code == 1
    assert "is truncated" in result.stderr
    assert "download it again" in result.stderr
    assert [p.name for p in here.iterdir()] == ["in.h5ad"]
