"""`cellstill de`: what it writes is what the library finds in the same file, and what it finds is true."""

from __future__ import annotations

import hashlib
import json
import shlex
import subprocess
import sys
from dataclasses import asdict

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from cellstill.cli import _differential
from cellstill.data import simulate_counts
from cellstill.de import PseudobulkConfig, differential_expression
from cellstill.errors import CellstillWarning
from cellstill.io.anndata import StoredMatrix

COMPARED = ["--groupby", "condition", "--group1", "treat", "--group2", "ctrl", "--sample-key", "donor"]
KEYS = {"groupby": "condition", "group1": "treat", "group2": "ctrl", "sample_key": "donor"}


@pytest.fixture(scope="module")
def simulated():
    """8 donors under one condition each, in 2 batches; a tenth of the genes changes 2-fold or more; a rare type."""
    return simulate_counts(
        n_obs=800,
        n_vars=300,
        n_batches=2,
        n_cell_types=3,
        cell_type_fractions=(0.6, 0.38, 0.02),
        n_donors_per_group=2,
        base_log_sd=0.8,
        de_fraction=0.1,
        min_abs_log2fc=1.0,
        library_size_median=400,
        seed=0,
    )


@pytest.fixture
def cells(simulated):
    return simulated.copy()


@pytest.fixture
def no_figures(monkeypatch):
    """Leave out figures, which take longer than all the rest; one test has them."""
    monkeypatch.setattr(_differential, "_draw", lambda result, folder: None)


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


def read(path):
    return pd.read_csv(path, float_precision="round_trip", keep_default_na=False, na_values=[""])


def same(written, found):
    """Whether a CSV file holds a table, to the last bit."""
    pd.testing.assert_frame_equal(read(written), found.reset_index(drop=True), check_dtype=False, check_exact=True)


def as_layer(adata, form):
    adata.layers["counts"] = form(adata.X)
    adata.X = adata.X.log1p()


FORMS = {"csr": sp.csr_matrix, "csc": sp.csc_matrix, "dense": lambda matrix: matrix.toarray()}


@pytest.mark.parametrize(
    ("suffix", "form"), [("h5ad", "csr"), ("h5ad", "csc"), ("h5ad", "dense"), ("zarr", "csr"), ("zarr", "dense")]
)
@pytest.mark.usefixtures("no_figures")
def test_tables_are_what_the_library_finds(cellstill, cells, here, monkeypatch, suffix, form):
    as_layer(cells, FORMS[form])
    path = here / f"in.{suffix}"
    cells.write_h5ad(path) if suffix == "h5ad" else cells.write_zarr(path)

    def refuse(self):
        raise AssertionError(f"{self.where} was read whole")

    monkeypatch.setattr(StoredMatrix, "to_csr", refuse)
    result = cellstill("de", path, *COMPARED, "--layer", "counts")
    assert result.exit_code == 0, result.stderr
    folder = here / "in_cellstill_de"
    found = differential_expression(cells, **KEYS, layer="counts")
    same(folder / "de.csv", found.table)
    same(folder / "samples.csv", found.units)
    assert read(folder / "left_out.csv").columns.tolist() == found.left_out.columns.tolist()
    assert len(read(folder / "left_out.csv")) == 0
    assert summary_of(folder)["input"] == {"name": path.name, "n_obs": 800, "n_vars": 300, "counts": "layers/counts"}


def test_what_it_calls_is_true(cellstill, cells, write, here):
    path = write(cells)
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    result = cellstill("de", path, *COMPARED, "--batch-key", "batch", "--shrink-lfc")
    assert result.exit_code == 0, result.stderr
    assert hashlib.sha256(path.read_bytes()).hexdigest() == before
    folder = here / "in_cellstill_de"
    assert sorted(p.name for p in here.iterdir()) == ["in.h5ad", folder.name]
    assert sorted(p.name for p in folder.iterdir()) == sorted(_differential.RESULTS)
    figures = sorted(p.name for p in (folder / "figures").iterdir())
    assert figures == ["ma.pdf", "ma.png", "volcano.pdf", "volcano.png"]
    assert all((folder / "figures" / name).stat().st_size > 1000 for name in figures)

    table = read(folder / "de.csv")
    truth = cells.var["is_de_treat"].to_numpy()
    assert table["gene"].tolist() == cells.var_names.tolist()
    assert (table["is_de"] & truth).sum() / truth.sum() > 0.9
    assert (table["is_de"] & ~truth).sum() / table["is_de"].sum() <= 0.1
    both = table["is_de"] & truth
    up = cells.var["log2fc_treat"].to_numpy() > 0
    assert (table["direction"][both] == np.where(up[both], "up", "down")).all()
    assert table["lfc_shrunken"].notna().any()

    summary = summary_of(folder)
    (found,) = summary["comparisons"]
    calls = table["direction"].value_counts()
    assert (found["n_up"], found["n_down"]) == (calls["up"], calls["down"])
    assert found["n_tested"] == table["p_value"].notna().sum()
    assert found["top_genes"][:5] == table[table["is_de"]].sort_values("p_value")["gene"].tolist()[:5]
    assert found["design"] == "~ batch + condition"
    assert found["n_samples"] == {"treat": 4, "ctrl": 4}
    assert found["n_cells"] == cells.obs["condition"].value_counts().to_dict()
    samples = read(folder / "samples.csv")
    totals = pd.Series(np.asarray(cells.X.sum(axis=1)).ravel()).groupby(cells.obs["donor"].to_numpy()).sum()
    assert samples.set_index("donor")["total_counts"].to_dict() == totals.to_dict()
    assert set(summary["seconds"]) == {"load", "test", "write", "total"}
    assert summary["settings"]["method"] == "ttest"
    assert summary["settings"]["shrink_lfc"] is True
    assert "condition: treat over ctrl, ttest, ~ batch + condition" in result.stdout
    assert f"4 vs 4  {found['n_cells']['treat']} vs {found['n_cells']['ctrl']}" in result.stdout
    assert ", ".join(found["top_genes"][:3]) in result.stdout


@pytest.mark.parametrize("borrow", [False, True], ids=["each_alone", "borrowing"])
@pytest.mark.usefixtures("no_figures")
def test_within_each_cell_type(cellstill, cells, write, here, borrow):
    few = (cells.obs["donor"] == "donor_0").to_numpy() & (cells.obs["cell_type"] == "type_1").to_numpy()
    cells = cells[~few | (np.cumsum(few) <= 5)].copy()
    args = ["--within", "cell_type", "--covariate-key", "batch", *(["--borrow"] if borrow else [])]
    result = cellstill("de", write(cells), *COMPARED, *args)
    assert result.exit_code == 0, result.stderr
    with pytest.warns(CellstillWarning, match="type_2"):
        found = differential_expression(
            cells, **KEYS, within="cell_type", how=PseudobulkConfig(covariate_keys=["batch"], borrow=borrow)
        )
    folder = here / "in_cellstill_de"
    same(folder / "de.csv", found.table)
    samples = read(folder / "samples.csv")
    assert samples.columns[0] == "cell_type"
    assert samples.groupby("cell_type").size().to_dict() == {"type_0": 8, "type_1": 7}
    for level, units in samples.groupby("cell_type"):
        sizes = cells.obs[cells.obs["cell_type"] == level]["donor"].value_counts()
        assert (units.set_index("donor")["n_cells"] == sizes[units["donor"]].to_numpy()).all()
    (gone,) = read(folder / "left_out.csv").to_dict(orient="records")
    assert (gone["cell_type"], gone["donor"], gone["condition"], gone["n_cells"]) == ("type_1", "donor_0", "ctrl", 5)
    assert "'type_1': 1 of 8 samples left out: 'donor_0' in 'ctrl' (5 cells)" in result.stderr

    summary = summary_of(folder)
    assert [each["level"] for each in summary["comparisons"]] == ["type_0", "type_1"]
    assert [each["n_up"] + each["n_down"] for each in summary["comparisons"]] == [
        len(found[level].de_genes) for level in found
    ]
    assert list(summary["skipped"]) == ["type_2"]
    assert ("fdr_alone" in found.table) == ("note: Effects were judged together" in result.stdout) == borrow
    assert "Not compared, 'type_2': Samples are the replicates" in result.stderr
    assert "--min-cells" in result.stderr


@pytest.mark.usefixtures("no_figures")
def test_deseq2_against_the_rest(cellstill, cells, write, here):
    path = write(cells)
    chosen = ["--groupby", "condition", "--group1", "treat", "--sample-key", "donor", "--method", "deseq2"]
    limits = ["--min-cells", "20", "--min-counts", "2000", "--min-total-count", "400"]
    result = cellstill("de", path, *chosen, *limits, "--fdr", "0.01", "--lfc-threshold", "0.5")
    assert result.exit_code == 0, result.stderr
    config = PseudobulkConfig(
        method="deseq2",
        min_cells_per_sample=20,
        min_counts_per_sample=2000,
        min_total_count=400,
        fdr=0.01,
        lfc_threshold=0.5,
    )
    found = differential_expression(
        ad.read_h5ad(path), groupby="condition", group1="treat", sample_key="donor", how=config
    )
    same(here / "in_cellstill_de" / "de.csv", found.table)
    summary = summary_of(here / "in_cellstill_de")
    assert summary["comparisons"][0]["contrast"] == {"column": "condition", "group1": "treat", "group2": "rest"}
    assert 0 < summary["comparisons"][0]["n_tested"] < cells.n_vars
    assert summary["settings"].items() >= (asdict(config) | {"covariate_keys": []}).items()
    assert "treat over rest, deseq2" in result.stdout
    assert "pydeseq2" in summary["versions"]


def nothing(adata):
    pass


def log_normalise(adata):
    adata.X = adata.X.log1p()


def counts_elsewhere(adata):
    adata.layers["molecules"] = adata.X.copy()
    log_normalise(adata)


def no_condition_for_some(adata):
    adata.obs["condition"] = adata.obs["condition"].astype(object)
    adata.obs.loc[adata.obs_names[:3], "condition"] = np.nan


def one_batch_each(adata):
    adata.obs["lane"] = adata.obs["condition"].astype(str)


def one_donor_each(adata):
    adata.obs["donor"] = "of " + adata.obs["condition"].astype(str)


CASES = {
    "no_such_column": (nothing, ["--groupby", "x"], ["--groupby x is not in", "'condition'"]),
    "no_such_group": (nothing, ["--group1", "x"], ["--group1 x is not known", "'treat'"]),
    "no_such_second_group": (nothing, ["--group2", "x"], ["--group2 x is not known", "'ctrl'"]),
    "twice_the_same_group": (nothing, ["--group1", "ctrl"], ["--group1 and --group2 are both 'ctrl'"]),
    "no_such_sample": (nothing, ["--sample-key", "x"], ["--sample-key x is not in", "'donor'"]),
    "groups_as_samples": (nothing, ["--sample-key", "condition"], ["--sample-key and --groupby are both"]),
    "no_such_level": (nothing, ["--within", "x"], ["--within x is not in", "'cell_type'"]),
    "no_such_batch": (nothing, ["--batch-key", "x"], ["--batch-key x is not in", "'batch'"]),
    "no_such_covariate": (nothing, ["--covariate-key", "x"], ["--covariate-key x is not in", "'batch'"]),
    "no_such_layer": (nothing, ["--layer", "x"], ["--layer x is not in"]),
    "missing_condition": (no_condition_for_some, [], ["--groupby condition", "3 of 800 cells", "'cell_0'"]),
    "confounded": (one_batch_each, ["--batch-key", "lane"], ["cannot be told from 'lane'", "no --batch-key"]),
    "one_sample_each": (one_donor_each, [], ["each group needs at least 2", "'treat' has 1", "--sample-key"]),
    "ranks_of_a_design": (nothing, ["--method", "wilcoxon", "--covariate-key", "batch"], ["--covariate-key", "ttest"]),
    "no_counts": (log_normalise, [], ["raw counts", "bring raw counts"]),
    "counts_elsewhere": (
        counts_elsewhere,
        [],
        ["adata.X holds values that are", "These look like counts: --layer molecules"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input(cellstill, cells, write, here, case):
    spoil, args, remedy = CASES[case]
    spoil(cells)
    path = write(cells)
    result = cellstill("de", path, *COMPARED, *args)
    assert result.exit_code == 1
    assert result.stdout == ""
    said = [line for line in result.stderr.splitlines() if not line.startswith(("warning: ", "stage: ", "  "))]
    assert len(said) == 1
    assert said[0].startswith("error: ")
    for words in remedy:
        assert words in result.stderr
    assert [p.name for p in here.iterdir()] == ["in.h5ad"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--borrow"], "give --within KEY"),
        (["--fdr", "5"], "above 0 and below 1"),
        (["--lfc-threshold", "-1"], "--lfc-threshold"),
        (["--method", "edger"], "'deseq2'"),
    ],
)
def test_wrong_use(cellstill, here, args, words):
    result = cellstill("de", "in.h5ad", *COMPARED, *args)
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.split())


def test_keys_and_groups_are_checked_before_anything_heavy_is_imported(cells, write, here):
    path = str(write(cells))
    calls = [["de", path, *COMPARED, "--within", "celltype"], ["de", path, *COMPARED, "--group1", "x"]]
    code = (
        "import sys, json; from typer.testing import CliRunner; from cellstill.cli.app import app; "
        f"found = [CliRunner().invoke(app, args) for args in {calls!r}]; "
        "heavy = sorted({'torch', 'matplotlib'} & set(sys.modules)); "
        "print(json.dumps([[r.exit_code, r.stderr] for r in found] + [heavy]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=here)
    level, group, heavy = json.loads(done.stdout)
    assert level[0] == group[0] == 1
    assert "--within celltype is not in adata.obs" in level[1]
    assert "--group1 x is not known" in group[1]
    assert heavy == []


@pytest.mark.parametrize("overwrite", [False, True], ids=["kept", "foreign_files"])
def test_a_folder_that_exists(cellstill, cells, write, here, overwrite):
    (here / "out").mkdir()
    (here / "out" / "thesis.tex").write_text("x")
    args = ["--out", "out", *(["--overwrite"] if overwrite else [])]
    result = cellstill("de", write(cells), *COMPARED, *args)
    assert result.exit_code == 1
    assert ("thesis.tex" if overwrite else "--overwrite") in result.stderr
    assert (here / "out" / "thesis.tex").read_text() == "x"
    assert sorted(p.name for p in here.iterdir()) == ["in.h5ad", "out"]


def test_an_interrupted_run_leaves_what_was_there(cellstill, cells, write, here, monkeypatch):
    path = write(cells)
    with monkeypatch.context() as patch:
        patch.setattr(_differential, "_draw", lambda result, folder: None)
        assert cellstill("de", path, *COMPARED, "--out", "out").exit_code == 0
    before = {p.name: p.read_bytes() for p in (here / "out").iterdir()}
    seen = []

    def stop(result, folder):
        seen.extend(p.name for p in folder.parent.iterdir())
        sys.exit(130)

    monkeypatch.setattr(_differential, "_draw", stop)
    for folder, args in (("out", ["--overwrite", "--fdr", "0.2"]), ("other", [])):
        stopped = cellstill("de", path, *COMPARED, "--out", folder, *args)
        assert stopped.exit_code == 130
        assert "nothing was written" in stopped.stderr
    assert "de.csv" in seen
    assert sorted(p.name for p in here.iterdir()) == ["in.h5ad", "out"]
    assert {p.name: p.read_bytes() for p in (here / "out").iterdir()} == before


@pytest.mark.usefixtures("no_figures")
def test_the_command_that_inspect_suggests_runs(cellstill, cells, write, here):
    as_layer(cells, sp.csr_matrix)
    path = write(cells)
    found = json.loads(cellstill("inspect", path, "--json").stdout)
    assert f"to find the genes that differ:\n  {found['comparison']}\n" in cellstill("inspect", path).stdout
    command = shlex.split(found["comparison"])
    assert command[3:] == [*COMPARED, "--within", "cell_type", "--batch-key", "batch", "--layer", "counts"]
    result = cellstill(*command[1:])
    assert result.exit_code == 0, result.stderr
    assert (here / "in_cellstill_de" / "de.csv").exists()


def test_defaults_are_those_of_the_library():
    import inspect

    from cellstill.cli.de import de

    options, config = inspect.signature(de).parameters, PseudobulkConfig()
    names = {"min_cells": "min_cells_per_sample", "min_counts": "min_counts_per_sample"}
    for name in ("min_cells", "min_counts", "min_total_count", "fdr", "lfc_threshold", "borrow", "shrink_lfc"):
        assert options[name].default == getattr(config, names.get(name, name))
    assert options["method"].default == config.method
