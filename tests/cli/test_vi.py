"""`cellstill vi`: what it writes is what the library computes; the input comes back whole."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import warnings
from pathlib import Path

import anndata as ad
import mudata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from cellstill import AmbientRegularizedSCVI, RegularizedMultimodalVI
from cellstill.cli import _regularised
from cellstill.metrics import integration_table

SMALL = ["--n-hidden", "16", "--n-latent", "4", "--max-epochs", "2"]
pytestmark = [
    pytest.mark.filterwarnings("ignore:From 0.4:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Cannot join columns:UserWarning"),
]


@pytest.fixture
def no_umap(monkeypatch):
    """Leave out the UMAP, which takes longer than all the rest; one test draws it."""
    monkeypatch.setattr(_regularised, "draw_figures", lambda folder, *args, **kwargs: folder.mkdir(exist_ok=True))


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


@pytest.fixture
def paired(cells, here):
    """RNA and protein; the protein of 40 cells is not there, and its cells have another order."""
    rng = np.random.default_rng(0)
    protein = ad.AnnData(
        sp.csr_matrix(rng.poisson(20, (cells.n_obs, 8)) + 1.0, dtype=np.float32),
        obs=pd.DataFrame(index=cells.obs_names),
        var=pd.DataFrame(index=[f"p{i}" for i in range(8)]),
    )
    protein = protein[rng.permutation(cells.n_obs)[:200]].copy()
    cells.layers["counts"] = cells.X.copy()
    cells.X = cells.X.log1p()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mdata = mudata.MuData({"gex": cells, "prot": protein})
        mdata.obs["batch"] = mdata["gex"].obs["batch"].reindex(mdata.obs_names).astype(str)
        mdata.write(here / "in.h5mu")
    return here / "in.h5mu"


def test_what_is_written_is_what_the_model_gives(cellstill, cells, write, here):
    cells.obs["text"] = pd.Series([f"t{i % 7}" for i in range(cells.n_obs)], index=cells.obs_names, dtype=object)
    path = write(cells)
    before = ad.read_h5ad(path)
    args = ["--batch-key", "batch", "--conditioning-key", "batch", "--feature-scaling-key", "batch"]
    result = cellstill("vi", path, *args, "--label-key", "cell_type", "--denoised", *SMALL)
    assert result.exit_code == 0, result.stderr
    folder = here / "in_cellstill_vi"
    names = ["ambient_profile", "cells.h5ad", "figures", "model", "summary.json"]
    assert sorted(p.name for p in folder.iterdir()) == names
    figures = sorted(p.name for p in (folder / "figures").iterdir())
    assert figures == [f"{name}.{kind}" for name in ("attribution", "training", "umap") for kind in ("pdf", "png")]

    after = ad.read_h5ad(folder / "cells.h5ad")
    assert (after.X != before.X).nnz == 0
    pd.testing.assert_frame_equal(after.obs.drop(columns="ambient_fraction"), before.obs)
    assert list(after.obs)[-1] == "ambient_fraction"
    model = AmbientRegularizedSCVI.load(folder / "model", after.copy())
    np.testing.assert_allclose(after.obsm["X_vi"], model.get_latent_representation(), atol=1e-5)
    assert after.obsm["X_vi"].shape == (240, 4)
    np.testing.assert_allclose(after.obs["ambient_fraction"], model.get_ambient_fraction(), atol=1e-6)
    denoised = after.layers["denoised"]
    assert (before.X - denoised).min() >= 0
    assert abs(denoised - model.get_denoised_counts()).max() < 1e-3

    profile = pd.read_csv(folder / "ambient_profile" / "rna.csv", index_col="feature")
    np.testing.assert_allclose(profile.T, model.get_ambient_profile(), rtol=1e-5)
    assert list(profile.index) == list(before.var_names)
    assert list(profile) == list(before.obs["batch"].cat.categories)

    summary = summary_of(folder)
    assert summary["settings"]["path"] == "in.h5ad"
    assert summary["training"]["epochs"] == 2
    ambient = summary["ambient"]["rna"]
    assert ambient["share"] == pytest.approx(after.obs["ambient_fraction"].mean())
    each = after.obs.groupby("batch", observed=True)["ambient_fraction"].mean()
    assert ambient["share_by_category"] == pytest.approx(each.to_dict())
    assert set(ambient["rates"]) == set(each.index)
    scores = summary["scores"]["embeddings"]["after (z)"]
    table = integration_table({"": after.obsm["X_vi"]}, before.obs["batch"], before.obs["cell_type"].astype(str))
    for column in table:
        assert scores[column] == pytest.approx(table.iloc[0][column], abs=1e-9), column
    assert f"{scores['cross_batch_knn_accuracy']:.3f}" in result.stdout
    assert f"ambient share of rna: {ambient['share']:.1%}" in result.stdout
    assert set(summary["seconds"]) == {"load", "read", "check", "train", "encode", "score", "draw", "write", "total"}


@pytest.mark.usefixtures("no_umap")
def test_every_modality_gets_its_own(cellstill, paired, here):
    args = ["--modality", "gex=counts", "--modality", "prot", "--role", "gex=rna"]
    result = cellstill("vi", paired, *args, "--batch-key", "batch", "--denoised", "--out", "out", *SMALL)
    assert result.exit_code == 0, result.stderr
    before, after = mudata.read_h5mu(paired), mudata.read_h5mu(here / "out" / "cells.h5mu")
    assert list(after.obs_names) == list(before.obs_names)
    for name in ("gex", "prot"):
        assert (before[name].X != after[name].X).nnz == 0
        assert list(after[name].obs_names) == list(before[name].obs_names)
    model = RegularizedMultimodalVI.load(here / "out" / "model", before)
    np.testing.assert_allclose(after.obsm["X_vi"], model.get_latent_representation(), atol=1e-5)
    for name, part in model.get_modality_latents().items():
        np.testing.assert_allclose(after.obsm[f"X_vi_{name}"], part, atol=1e-5)
        # By name, because the modality has an order of its own.
        fraction = model.get_ambient_fraction(modality=name)
        own = after[name].obs["ambient_fraction"]
        np.testing.assert_allclose(own, fraction.loc[own.index], atol=1e-6)
        denoised = pd.DataFrame.sparse.from_spmatrix(
            model.get_denoised_counts(modality=name), index=list(before.obs_names)
        )
        expected = denoised.loc[after[name].obs_names].to_numpy()
        np.testing.assert_allclose(after[name].layers["denoised"].toarray(), expected, atol=1e-3)
        assert (here / "out" / "ambient_profile" / f"{name}.csv").exists()
    found = summary_of(here / "out")["input"]["modalities"]
    assert (found["gex"]["n_obs"], found["prot"]["n_obs"]) == (240, 200)
    assert (found["gex"]["counts"], found["prot"]["counts"]) == ("layers/counts", "X")


@pytest.mark.usefixtures("no_umap")
def test_purposes_one_by_one_and_no_key_at_all(cellstill, cells, write, here):
    path = write(cells)
    keys = ["--ambient-key", "batch", "--ambient-key", "donor", "--dispersion-key", "batch"]
    result = cellstill("vi", path, *keys, "--library-size-key", "donor", "--out", "a", *SMALL)
    assert result.exit_code == 0, result.stderr
    profile = pd.read_csv(here / "a" / "ambient_profile" / "rna.csv", header=[0, 1], index_col=0)
    assert profile.columns.names == ["batch", "donor"]
    assert set(profile.columns) == set(map(tuple, cells.obs[["batch", "donor"]].astype(str).to_numpy()))
    assert "denoised" not in ad.read_h5ad(here / "a" / "cells.h5ad").layers
    result = cellstill("vi", path, "--out", "b", "--ambient-rate", "0.1", *SMALL)
    assert result.exit_code == 0, result.stderr
    summary = summary_of(here / "b")
    assert summary["scores"] is None
    assert summary["settings"]["ambient_rate"] == 0.1
    assert [row["identified"] for row in summary["ambient"]["rna"]["rates"].values()] == [True]


@pytest.fixture
def latents_of(cellstill, no_umap, here):
    """Run the command on a file, and read the latents that it writes."""

    def run(path, *args):
        result = cellstill("vi", path, "--out", "out", "--overwrite", *args, *SMALL)
        assert result.exit_code == 0, result.stderr
        return ad.read_h5ad(here / "out" / "cells.h5ad").obsm["X_vi"]

    return run


def test_counts_are_those_of_the_layer_and_of_the_store_named(latents_of, cells, write, here):
    expected = latents_of(write(cells))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cells.write_zarr(here / "in.zarr")
    np.testing.assert_array_equal(latents_of("in.zarr"), expected)
    cells.layers["counts"] = cells.X
    # Counts as well, but of other genes.
    cells.X = cells.X[:, ::-1].copy()
    np.testing.assert_array_equal(latents_of(write(cells), "--layer", "counts"), expected)
    assert summary_of(here / "out")["input"]["modalities"]["rna"]["counts"] == "layers/counts"
    assert abs(latents_of(here / "in.h5ad") - expected).max() > 0.01


def test_fractions_are_counts_on_request(latents_of, cellstill, cells, write):
    cells.X = cells.X * 0.5
    path = write(cells)
    refused = cellstill("vi", path, "--out", "out", *SMALL)
    assert refused.exit_code == 1
    assert "--allow-noninteger" in refused.stderr
    assert np.isfinite(latents_of(path, "--allow-noninteger")).all()


def test_networks_are_told_the_columns_named_for_them(latents_of, cells, write, here):
    cells.obs["age"] = np.random.default_rng(0).normal(40, 10, cells.n_obs)
    latents_of(write(cells), "--continuous-key", "age", "--encoder-key", "donor")
    model = AmbientRegularizedSCVI.load(here / "out" / "model", cells)
    before = model.get_latent_representation(), model.get_normalized_expression(return_numpy=True)
    cells.obs["age"] = cells.obs["age"].to_numpy()[::-1]
    # Encoders of z are not told numbers, and decoders are.
    np.testing.assert_array_equal(model.get_latent_representation(), before[0])
    assert abs(model.get_normalized_expression(return_numpy=True) - before[1]).max() > 1e-6
    cells.obs["donor"] = cells.obs["donor"].to_numpy()[::-1]
    assert abs(model.get_latent_representation() - before[0]).max() > 1e-5
    (warning,) = (text for text in summary_of(here / "out")["warnings"] if "encoders are told" in text)
    assert warning.startswith("--encoder-key donor: ")


def test_rates_may_be_known_of_some_batches_and_of_combinations(latents_of, cellstill, cells, write, here):
    path = write(cells)
    first, other = cells.obs["batch"].cat.categories
    latents_of(path, "--batch-key", "batch", "--ambient-rate", f"{first}=0.1")
    rates = summary_of(here / "out")["ambient"]["rna"]["rates"]
    assert (rates[first]["low"], rates[first]["high"]) == pytest.approx((0.1, 0.1))
    assert rates[other]["low"] < rates[other]["high"]

    cells.obs["pool"] = np.resize(["x", "y,z"], cells.n_obs)
    path = write(cells)
    keys = ["--ambient-key", "batch", "--ambient-key", "pool"]
    latents_of(path, *keys, "--ambient-rate", f"{first},x=0.1", "--ambient-rate", f'{other},"y,z"=0.2')
    summary = summary_of(here / "out")
    assert summary["settings"]["ambient_rate"] == {f"{first}: x": 0.1, f"{other}: y,z": 0.2}
    stated = {
        name: row["rate"] for name, row in summary["ambient"]["rna"]["rates"].items() if row["low"] == row["high"]
    }
    assert stated == pytest.approx(summary["settings"]["ambient_rate"])
    wrong = cellstill("vi", path, *keys, "--ambient-rate", f"{first}=0.1", *SMALL)
    assert "Name those, as category,category=RATE, or give one number" in " ".join(wrong.stderr.split())


@pytest.mark.usefixtures("no_umap")
def test_rates_may_be_known_of_one_modality(cellstill, paired, here):
    first, other = sorted(mudata.read_h5mu(paired).obs["batch"].unique())
    args = ["--modality", "gex=counts", "--modality", "prot", "--role", "prot=rna", "--batch-key", "batch"]

    def rates(*stated):
        given = [part for rate in stated for part in ("--ambient-rate", rate)]
        result = cellstill("vi", paired, *args, *given, "--out", "out", "--overwrite", *SMALL)
        assert result.exit_code == 0, result.stderr
        return {name: one["rates"] for name, one in summary_of(here / "out")["ambient"].items()}

    plain, of_all, of_one = rates(), rates("gex=0.1"), rates(f"gex:{first}=0.1")
    assert of_all["prot"] == of_one["prot"] == plain["prot"]
    assert {name: row["rate"] for name, row in of_all["gex"].items()} == pytest.approx({first: 0.1, other: 0.1})
    assert of_one["gex"][first]["low"] == of_one["gex"][first]["high"] == pytest.approx(0.1)
    assert of_one["gex"][other]["low"] < of_one["gex"][other]["high"]
    assert summary_of(here / "out")["settings"]["ambient_rate"] == {f"gex:{first}": 0.1}
    for stated, message in (
        (["gex=1.5"], "--ambient-rate gex=1.5 is no share"),
        ([f"gex:{first}=1.5"], f"--ambient-rate gex:{first}=1.5 is no share"),
        ([f"gex:{first}=0.1", "gex=0.2"], "--ambient-rate gex: the rate is stated of the whole modality and of"),
        ([f"gex:{first}=0.1", f"{other}=0.2"], f"--ambient-rate {other}: there is no such modality"),
        (["atac=0.1"], f"names ['atac']. Name modalities, ['gex', 'prot'], or categories, ['{first}', '{other}'], or "),
        (["atac=0.1"], f"or both: --ambient-rate gex:{first}=0.1."),
    ):
        given = [part for rate in stated for part in ("--ambient-rate", rate)]
        assert message in " ".join(cellstill("vi", paired, *args, *given, "--out", "no", *SMALL).stderr.split())


@pytest.mark.usefixtures("no_umap")
def test_the_role_named_is_taken_where_another_is_guessed(cellstill, paired, here):
    both = ["--ambient-rate", "0.1", "--modality", "gex=counts", "--modality"]
    result = cellstill("vi", paired, *both, "prot", "--role", "prot=rna", "--out", "out", *SMALL)
    assert result.exit_code == 0, result.stderr
    # Background of RNA is a rate times a profile, that of protein free.
    assert set(summary_of(here / "out")["ambient"]["prot"]) == {"share", "share_by_category", "rates"}
    data = mudata.read_h5mu(paired)
    data.mod["unheard"] = data.mod.pop("prot")
    data.write(here / "renamed.h5mu")
    assert "--role unheard=ROLE" in cellstill("vi", "renamed.h5mu", *both, "unheard", *SMALL).stderr
    result = cellstill("vi", "renamed.h5mu", *both, "unheard", "--role", "unheard=protein", "--out", "other", *SMALL)
    assert result.exit_code == 0, result.stderr
    assert "rates" not in summary_of(here / "other")["ambient"]["unheard"]


@pytest.mark.usefixtures("no_umap")
def test_a_batch_that_lacks_a_modality_has_no_share_of_it(cellstill, paired, here):
    data = mudata.read_h5mu(paired)
    data.obs["lane"] = np.where(data.obs_names.isin(data["prot"].obs_names), "both", "alone")
    data.write(paired)
    result = cellstill("vi", paired, "--modality", "gex=counts", "--modality", "prot", "--batch-key", "lane", *SMALL)
    assert result.exit_code == 0, result.stderr
    ambient = summary_of(here / "in_cellstill_vi")["ambient"]
    assert list(ambient["prot"]["share_by_category"]) == ["both"]
    assert ambient["prot"]["share_by_category"]["both"] == pytest.approx(ambient["prot"]["share"])
    assert set(ambient["gex"]["share_by_category"]) == {"alone", "both"}
    assert "nan%" not in result.stdout


def test_the_example_of_the_help_names_the_batch_three_times(cellstill):
    text = " ".join(cellstill("vi", "--help").output.replace("│", " ").split())
    example = text[text.index("Example") : text.index("Arguments")]
    assert all(option in example for option in ("--batch-key", "--conditioning-key", "--feature-scaling-key"))


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["--batch-key", "bacth"], 1, "--batch-key bacth"),
        (["--conditioning-key", "nothing"], 1, "--conditioning-key nothing"),
        (["--batch-key", "batch", "--ambient-key", "batch"], 1, "--batch-key batch stands for --ambient-key"),
        (["--layer", "nothing"], 1, "--layer nothing"),
        (["--label-key", "nothing"], 1, "--label-key nothing"),
        (["--modality", "rna"], 1, "--modality is for an .h5mu file; in.h5ad has one modality"),
        (["--role", "rna"], 2, "--role"),
        (["--ambient-rate", "much"], 2, "--ambient-rate"),
        (["--batch-key", "batch", "--ambient-rate", "x=0.1"], 1, "--ambient-rate names"),
        (["--ambient-rate", "1.5"], 1, "--ambient-rate 1.5 is no share of counts"),
        (["--batch-key", "batch", "--ambient-rate", "x=1.5"], 1, "--ambient-rate x=1.5 is no share of counts"),
        (["--batch-key", "batch", "--ambient-rate", "rna:x=0.1"], 1, "--ambient-rate names ['rna:x'], and the"),
        (["--continuous-key", "cell_type"], 1, "--continuous-key"),
        (["--out", "."], 1, "lies in the output folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_errors_name_the_option_and_leave_nothing(cellstill, cells, write, here, args, code, message):
    result = cellstill("vi", write(cells), *args, *SMALL)
    assert result.exit_code == code
    assert message in " ".join(result.stderr.split())
    assert [p.name for p in here.iterdir()] == ["in.h5ad"]


def test_what_is_no_mudata_is_said(cellstill, paired, here):
    assert "--modality NAME=LAYER" in cellstill("vi", paired, "--layer", "counts").stderr
    assert "--role gex=dna is not known" in cellstill("vi", paired, "--role", "gex=dna", *SMALL).stderr
    layer = " ".join(cellstill("vi", paired, "--modality", "prot=counts", *SMALL).stderr.split())
    assert "--modality prot=counts is not in mdata['prot'].layers." in layer
    missing = cellstill("vi", paired, "--modality", "atac", *SMALL)
    assert "atac" in missing.stderr
    assert "gex" in missing.stderr
    (here / "text.h5mu").write_text("no data")
    assert "is not an HDF5 file, so it is no h5mu" in cellstill("vi", "text.h5mu").stderr
    (here / "cut.h5mu").write_bytes(paired.read_bytes()[:5000])
    assert "cut.h5mu" in cellstill("vi", "cut.h5mu").stderr
    assert "does not exist. Beside it: cut.h5mu" in cellstill("vi", "other.h5mu").stderr
    assert "cellstill vi" in cellstill("inspect", paired).stderr
    assert {p.suffix for p in here.iterdir()} == {".h5mu"}


@pytest.mark.usefixtures("no_umap")
def test_results_are_replaced_on_request_only(cellstill, cells, write, here):
    path = write(cells)
    assert cellstill("vi", path, "--out", "r", *SMALL).exit_code == 0
    first = (here / "r" / "summary.json").read_bytes()
    assert "r exists" in cellstill("vi", path, "--out", "r", *SMALL).stderr
    assert (here / "r" / "summary.json").read_bytes() == first
    assert cellstill("vi", path, "--out", "r", "--overwrite", "--seed", "1", *SMALL).exit_code == 0
    assert summary_of(here / "r")["settings"]["seed"] == 1
    (here / "r" / "mine.txt").write_text("keep")
    assert "other files (mine.txt)" in cellstill("vi", path, "--out", "r", "--overwrite", *SMALL).stderr


def test_real_rna_and_protein_in_a_process(real_data, tmp_path):
    source = real_data("citeseq_pbmc_hashed.h5mu")
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    program = Path(sys.executable).with_name("cellstill")
    args = ["vi", source, "--modality", "rna", "--modality", "prot", *SMALL, "--denoised", "--out", "out"]
    done = subprocess.run([program, *args], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert hashlib.sha256(source.read_bytes()).hexdigest() == digest
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    before, after = mudata.read_h5mu(source), mudata.read_h5mu(tmp_path / "out" / "cells.h5mu")
    assert set(after.mod) == {"rna", "prot", "hto"}
    assert after.obsm["X_vi"].shape == (500, 8)
    assert (before["hto"].X != after["hto"].X).nnz == 0
    for name in ("rna", "prot"):
        assert (before[name].X - after[name].layers["denoised"]).min() >= 0
    assert f"results are in {Path('out')}" in done.stdout
