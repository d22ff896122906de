from __future__ import annotations

import itertools
import json
import re
import warnings
from functools import partial

import anndata
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse as sp
import torch

from cellstill import SCDD
from cellstill.condense import GeneratorConfig, LatentConfig, MatchingConfig, Variant
from cellstill.condense import model as model_module
from cellstill.condense import solver as solver_module
from cellstill.condense.choice import validation_score
from cellstill.condense.output import provenance_of
from cellstill.errors import (
    CellstillWarning,
    GeneMismatchError,
    InvalidArgumentError,
    InvalidCountsError,
    MissingKeyError,
    NotTrainedError,
    StoreError,
)
from cellstill.io import store as store_module

TINY = {
    "latent_settings": LatentConfig(n_latent=4, n_hidden=12, max_epochs=3),
    "generator_settings": GeneratorConfig(n_hidden=12, n_blocks=1, n_steps=9, n_tuning_steps=6, n_teacher_steps=2),
}
QUICK = MatchingConfig(n_steps=6)


@pytest.fixture(autouse=True)
def two_judges(monkeypatch):
    monkeypatch.setattr(solver_module, "validation_score", partial(validation_score, judges=("logistic", "knn")))


@pytest.fixture(scope="module")
def condensed(trained) -> anndata.AnnData:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(solver_module, "validation_score", partial(validation_score, judges=("logistic", "knn")))
        return trained.model.condense(3, matching=QUICK)


def fresh(trained, labels_key="cell_type", *, donor_key="donor", **settings) -> SCDD:
    """An untrained small model of the same cells."""
    adata = trained.adata.copy()
    SCDD.setup_anndata(adata, labels_key, layer="counts", donor_key=donor_key)
    return SCDD(adata, **TINY | settings)


def weights(model: SCDD) -> dict[str, torch.Tensor]:
    return model.module.state_dict()


def assert_same_weights(one: SCDD, other: SCDD) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def assert_same_cells(one: anndata.AnnData, other: anndata.AnnData) -> None:
    np.testing.assert_array_equal(one.X.toarray(), other.X.toarray())
    pd.testing.assert_frame_equal(one.obs, other.obs)
    for key in ("X_scdd", "X_scdd_latent"):
        np.testing.assert_array_equal(one.obsm[key], other.obsm[key])
    assert provenance_of(one) == provenance_of(other)


# Condensed cells


@pytest.mark.parametrize("kind", ["int", "category", "bool"])
def test_integer_and_boolean_labels_come_back_as_they_were(trained, tmp_path, kind):
    adata = trained.adata.copy()
    late = (adata.obs["stage"] == "late").to_numpy()
    of_kind = {"int": np.where(late, 10, 9), "category": pd.Categorical(np.where(late, 10, 9)), "bool": late}
    adata.obs["label"] = of_kind[kind]
    SCDD.setup_anndata(adata, ["label", "cell_type"], layer="counts")
    model = SCDD(adata, **TINY).train(progress=False)
    model.save(tmp_path / "model")
    loaded = SCDD.load(tmp_path / "model", adata)
    how = {"counts": "expected", "start": "random", "matching": MatchingConfig(n_steps=0)}
    found = loaded.condense(2, **how)
    found.write_h5ad(tmp_path / "tiny.h5ad")
    first, last = sorted({*np.asarray(of_kind[kind]).tolist()})
    for tiny in (model.condense(2, **how), found, anndata.read_h5ad(tmp_path / "tiny.h5ad")):
        labels = np.asarray(tiny.obs["label"])
        assert labels.dtype == (bool if kind == "bool" else np.int64)
        assert [name.split(" | ")[0] for name in tiny.obs_names] == [str(label) for label in labels]
        assert set(labels) == {first, last}
        assert tiny.obs["label"].cat.categories.tolist() == [first, last]
        assert tiny.obs["cell_type"].cat.categories.tolist() == ["B cell", "T cell", "rare/odd"]
    generated = SCDD.load(tmp_path / "model").generate(f"{last} | T cell", 3)
    assert np.asarray(generated.obs["label"]).tolist() == [last] * 3


def test_ordered_labels_come_back_in_their_order(trained, tmp_path):
    adata = trained.adata.copy()
    adata.obs["stage"] = pd.Categorical(adata.obs["stage"], categories=["late", "early"], ordered=True)
    SCDD.setup_anndata(adata, ["stage", "cell_type"], layer="counts")
    model = SCDD(adata, **TINY).train(progress=False)
    model.save(tmp_path / "model")
    for made in (model.generate("late | T cell", 2), SCDD.load(tmp_path / "model").generate("late | T cell", 2)):
        assert made.obs["stage"].cat.ordered
        assert made.obs["stage"].cat.categories.tolist() == ["late", "early"]
        assert not made.obs["cell_type"].cat.ordered


def test_parts_of_the_cells_are_known_after_training_and_loading(trained):
    for model in (trained.model, SCDD.load(trained.path, trained.adata.copy()), SCDD.load(trained.path)):
        learned, chose = model.train_indices, model.validation_indices
        assert sorted([*learned, *chose]) == list(range(420))
        assert len(model.test_indices) == 0
        donors = trained.adata.obs["donor"].to_numpy()
        assert not set(donors[learned]) & set(donors[chose])


def test_loading_with_other_values_says_where_the_model_reads_counts(trained):
    adata = trained.adata.copy()
    adata.X, adata.layers["counts"] = adata.layers["counts"], adata.layers["counts"].log1p()
    before = set(adata.uns)
    with pytest.raises(InvalidCountsError, match=r"The model reads adata.layers\['counts'\]. Put counts there"):
        SCDD.load(trained.path, adata)
    assert set(adata.uns) == before


def test_a_label_may_be_given_as_the_integer_that_it_is(trained):
    adata = trained.adata.copy()
    adata.obs["label"] = (adata.obs["stage"] == "late").to_numpy().astype(int)
    SCDD.setup_anndata(adata, "label", layer="counts")
    model = SCDD(adata, **TINY).train(progress=False)
    assert (model.generate(1, 2).X != model.generate("1", 2).X).nnz == 0


def test_names_of_cells_as_labels_are_warned_of_before_training(trained, monkeypatch):
    adata = trained.adata[:40].copy()
    adata.obs["label"] = [*adata.obs_names[:38], "same", "same"]
    SCDD.setup_anndata(adata, "label", layer="counts")
    monkeypatch.setattr(model_module, "fit_space", lambda *args, **how: trained.model.space)
    with pytest.warns(CellstillWarning, match="38 of 39 classes have a single cell .40 cells in all.*labels_key"):
        SCDD(adata, **TINY).train(progress=False)


def test_condensed_cells_are_counts_with_labels_codes_and_provenance(trained, condensed):
    model = trained.model
    assert condensed.shape == (9, 60)
    assert sp.isspmatrix_csr(condensed.X)
    assert condensed.X.dtype == np.float32
    assert (condensed.X.data > 0).all()
    assert condensed.var_names.tolist() == model.gene_names.tolist()
    assert condensed.obs["cell_type"].tolist() == [name for name in model.classes for _ in range(3)]
    assert condensed.obs["cell_type"].cat.categories.tolist() == ["B cell", "T cell", "rare/odd"]
    assert condensed.obs_names.tolist()[:2] == ["B cell-0", "B cell-1"]
    assert condensed.obs_names.is_unique
    assert condensed.obsm["X_scdd"].shape == (9, 6)
    told = provenance_of(condensed)
    assert told["samples_per_class"] == 3
    assert told["of_class"] == [3, 3, 3]
    assert told["n_synthetic"] == 9
    assert told["n_real"] == len(model.problem.train)
    assert told["latent"] == "autoencoder"
    assert told["matching"]["n_steps"] == 6
    assert (told["labels_key"], told["layer"], told["donor_key"]) == (["cell_type"], "counts", "donor")
    assert (told["n_top_genes"], told["validation_size"], told["training_seed"]) == (2000, 0.15, 0)
    assert LatentConfig(**told["latent_settings"]) == model.latent_settings
    assert GeneratorConfig(**told["generator_settings"]) == model.generator_settings
    assert dict(zip(told["classes"], told["of_class"], strict=True)) == dict.fromkeys(model.classes, 3)
    assert told["cells"] == model.problem.fingerprint()
    best = int(np.argmax(condensed.uns["scdd"]["choice"]["mean"]))
    assert condensed.uns["scdd"]["choice"]["start"][best] == told["start"]
    assert condensed.uns["scdd"]["choice"]["steps"][best] == told["matching_steps"]


def test_points_of_the_latent_space_teach_classifiers_of_it(trained, condensed):
    """kNN on them predicts new cells by their latent representation."""
    from sklearn.neighbors import KNeighborsClassifier

    points, choice = condensed.obsm["X_scdd_latent"], condensed.uns["scdd"]["point_choice"]
    assert {"points", "mean"} < set(choice)
    judge = KNeighborsClassifier(1).fit(points, condensed.obs["cell_type"])
    z = trained.model.get_latent_representation(trained.new)
    assert (judge.predict(z) == trained.new.obs["cell_type"]).mean() > 0.9
    if choice["points"][np.argmax(choice["mean"])] == "cells":
        np.testing.assert_allclose(points, trained.model.get_latent_representation(condensed), atol=1e-5)


def test_condensed_cells_teach_what_the_classes_are(trained, condensed):
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import f1_score

    def expression(counts):
        return np.log1p(1e4 * counts / counts.sum(axis=1, keepdims=True))

    new = trained.new[:, condensed.var_names]
    judge = LogisticRegression(max_iter=1000).fit(expression(condensed.X.toarray()), condensed.obs["cell_type"])
    predicted = judge.predict(expression(new.layers["counts"].toarray()))
    assert f1_score(new.obs["cell_type"], predicted, average="macro") > 0.9


@pytest.mark.parametrize("form", ["h5ad", "zarr"])
def test_condensed_cells_are_stored_and_read_with_all_that_is_told(condensed, tmp_path, form):
    path = tmp_path / f"tiny.{form}"
    getattr(condensed, f"write_{form}")(path)
    found = getattr(anndata, f"read_{form}")(path)
    assert_same_cells(condensed, found)
    assert found.var_names.tolist() == condensed.var_names.tolist()
    for name, column in condensed.uns["scdd"]["choice"].items():
        assert found.uns["scdd"]["choice"][name].tolist() == column.tolist()


def test_a_single_candidate_is_stored_as_well(trained, tmp_path):
    found = trained.model.condense(1, counts="expected", start="random", matching=MatchingConfig(n_steps=0))
    found.write_h5ad(tmp_path / "one.h5ad")
    assert_same_cells(found, anndata.read_h5ad(tmp_path / "one.h5ad"))
    assert provenance_of(found)["counts"] == "expected"


def test_scanpy_works_on_condensed_cells(condensed):
    adata = condensed.copy()
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    sc.pp.pca(adata, n_comps=2)
    # The classes lie apart: each cell's nearest neighbour is of its own.
    points = adata.obsm["X_pca"]
    distance = np.linalg.norm(points[:, None] - points[None], axis=2) + np.diag(np.full(9, np.inf))
    labels = adata.obs["cell_type"].to_numpy()
    assert (labels[distance.argmin(axis=1)] == labels).all()


def test_same_seed_same_file_and_other_seed_other_cells(trained, condensed):
    torch.manual_seed(31)
    assert_same_cells(trained.model.condense(3, matching=QUICK), condensed)
    how = {"counts": "sampled", "start": "random", "matching": MatchingConfig(n_steps=0)}
    one, same, other = (trained.model.condense(3, seed=seed, **how) for seed in (0, None, 1))
    assert_same_cells(one, same)
    assert not np.array_equal(one.X.toarray(), other.X.toarray())
    assert (provenance_of(other)["seed"], provenance_of(other)["training_seed"]) == (1, 0)


def test_training_repeats_itself(trained):
    one, same, other = (fresh(trained, seed=seed).train(progress=False) for seed in (2, 2, 3))
    assert_same_weights(one, same)
    assert not torch.equal(weights(one)["autoencoder.center"], weights(other)["autoencoder.center"])
    assert_same_cells(*(model.generate("T cell", 4) for model in (one, same)))


def test_several_labels_are_all_given_to_a_synthetic_cell(trained):
    model = fresh(trained, ["cell_type", "stage"]).train(progress=False)
    found = model.condense(1, counts="expected", start="random", matching=MatchingConfig(n_steps=0))
    wanted = trained.adata.obs[["cell_type", "stage"]].astype(str).drop_duplicates()
    pairs = set(zip(found.obs["cell_type"], found.obs["stage"], strict=True))
    assert pairs == set(wanted.itertuples(index=False, name=None))
    assert len(found) == len(model.classes) == 5
    one = model.generate("B cell | early", 3)
    assert one.obs["stage"].tolist() == ["early"] * 3
    assert one.obs["cell_type"].tolist() == ["B cell"] * 3


# Generated cells


def test_generated_cells_are_like_real_ones_of_their_class(trained):
    adata, model = trained.new, trained.model
    for code, name in enumerate(["B cell", "T cell"]):
        made = model.generate(name, 400)
        assert made.obs["cell_type"].tolist() == [name] * 400
        real = adata[adata.obs["cell_type"] == name, made.var_names].layers["counts"].toarray()
        counts = made.X.toarray()
        np.testing.assert_array_equal(counts, np.round(counts))
        assert np.log(counts.sum(axis=1)).mean() == pytest.approx(np.log(real.sum(axis=1)).mean(), abs=0.05)
        assert (counts == 0).mean() == pytest.approx((real == 0).mean(), abs=0.03)
        # Two real sets agree up to the noise of their means; so do real and generated cells.
        own = trained.adata[trained.adata.obs["cell_type"] == name, made.var_names].layers["counts"].toarray()
        control = np.corrcoef(own.mean(axis=0), real.mean(axis=0))[0, 1]
        assert np.corrcoef(counts.mean(axis=0), real.mean(axis=0))[0, 1] > control - 0.01
        # Of the cells that were learned from: how far new cells spread is the encoder's, not the generator's.
        z = model.space.encode(model.problem.train[model.problem.train.of_class(code)]).numpy()
        seen = model.space.generator(
            torch.from_numpy(made.obsm["X_scdd"]), torch.full((400,), code, dtype=torch.int64)
        ).numpy()
        assert 0.7 < np.median(seen.var(axis=0) / z.var(axis=0)) < 1.3
        assert 0.7 < np.median(made.obsm["X_scdd_latent"].var(axis=0) / z.var(axis=0)) < 1.3
        assert (model.space.autoencoder.classify(torch.from_numpy(seen)).argmax(dim=1) == code).float().mean() > 0.97


def test_number_and_seed_of_generated_cells(trained):
    model = trained.model
    assert model.generate("rare/odd", np.int64(1)).shape == (1, 60)
    one, same, other = (model.generate("T cell", 5, counts="rounded", seed=seed) for seed in (0, 0, 1))
    assert_same_cells(one, same)
    assert not np.array_equal(one.X.toarray(), other.X.toarray())
    told = provenance_of(other)
    assert (told["method"], told["seed"], told["training_seed"]) == ("SCDD.generate", 1, 0)
    assert told["cells"] == model.problem.fingerprint()


def test_generated_cells_of_different_classes_and_seeds_have_nothing_in_common(trained):
    made = [trained.model.generate(name, 200, seed=seed) for name in trained.model.classes[:2] for seed in (0, 1)]
    for one, other in itertools.combinations(made, 2):
        noise = np.corrcoef(one.obsm["X_scdd"].ravel(), other.obsm["X_scdd"].ravel())[0, 1]
        depth = np.corrcoef(*(np.log(cells.X.sum(axis=1).A1) for cells in (one, other)))[0, 1]
        assert abs(noise) < 0.12
        assert abs(depth) < 0.3
    assert made[0].obs_names[0] == "B cell-0-0"
    assert anndata.concat(made).obs_names.is_unique


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("NK cell", 3), "label='NK cell' is not known. Use one of: 'B cell', 'T cell', 'rare/odd'"),
        (("T cell", 0), "n=0 has to be an integer"),
        (("T cell", 2.5), "n=2.5 has to be"),
        (("T cell", True), "n=True has to be"),
        (("T cell", "ten"), "n='ten' has to be"),
    ],
    ids=["class", "none", "fraction", "boolean", "text"],
)
def test_what_cannot_be_generated(trained, arguments, message):
    with pytest.raises(InvalidArgumentError, match=message):
        trained.model.generate(*arguments)
    for call in (trained.model.condense, partial(trained.model.generate, "T cell", 2)):
        with pytest.raises(InvalidArgumentError, match="seed=-1 has to be an integer of at least 0"):
            call(seed=-1)
    with pytest.raises(InvalidArgumentError, match="counts='mixed'"):
        trained.model.generate("T cell", 3, counts="mixed")


# Latent spaces


def test_latent_representation_follows_cells_and_genes(trained):
    model, adata = trained.model, trained.adata
    z = model.get_latent_representation()
    assert z.shape == (420, 6)
    assert z.dtype == np.float32
    rows = model.problem.rows["train"]
    np.testing.assert_allclose(z[rows].mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(z[rows].std(axis=0, ddof=1), 1, rtol=1e-3)
    np.testing.assert_allclose(model.get_latent_representation(indices=[5, 2]), z[[5, 2]], rtol=1e-4, atol=1e-5)
    shuffled = adata[:, np.random.default_rng(0).permutation(60)].copy()
    np.testing.assert_allclose(model.get_latent_representation(shuffled), z, rtol=1e-4, atol=1e-5)
    other = adata.copy()
    other.var_names = [f"x{i}" for i in range(60)]
    with pytest.raises(GeneMismatchError, match="Only 0 of the model's 60 genes"):
        model.get_latent_representation(other)


class Encoder:
    def get_latent_representation(self, adata):
        return adata.layers["counts"].toarray()[:, :3] * 10


@pytest.mark.parametrize("form", ["key", "model"])
def test_an_embedding_teaches(trained, form):
    model = fresh(trained)
    model.adata.obsm["X_told"] = Encoder().get_latent_representation(model.adata)
    model.latent = "X_told" if form == "key" else Encoder()
    model.train(progress=False)
    assert model.space.autoencoder.n_told == 3
    assert "train_knowledge" in model.history_["latent"]
    found = model.condense(1, counts="expected", start="random", matching=MatchingConfig(n_steps=0))
    assert provenance_of(found)["latent"] == ("X_told" if form == "key" else "Encoder")
    # What teaches is needed no more.
    assert model.get_latent_representation(trained.new).shape == (420, 4)


@pytest.mark.parametrize(
    ("latent", "error", "message"),
    [
        ("X_nothing", MissingKeyError, "latent='X_nothing' is not in adata.obsm"),
        (7, InvalidArgumentError, "latent=7 embeds no cells"),
        ("holes", InvalidArgumentError, r"adata.obsm\['holes'\] has 1 values that are not finite"),
    ],
)
def test_bad_latent(trained, latent, error, message):
    model = fresh(trained, latent=latent)
    model.adata.obsm["holes"] = np.where(np.arange(840).reshape(420, 2) == 3, np.nan, 1)
    with pytest.raises(error, match=message):
        model.train(progress=False)


# Setting up and training


def test_cells_that_choose_are_of_other_donors(trained):
    donors = trained.adata.obs["donor"].to_numpy()
    rows = trained.model.problem.rows
    assert not set(donors[rows["train"]]) & set(donors[rows["validation"]])
    assert len(rows["test"]) == 0
    assert len(rows["train"]) + len(rows["validation"]) == 420


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"labels_key": "kind"}, MissingKeyError, "labels_key='kind' is not in adata.obs"),
        ({"labels_key": "constant"}, InvalidArgumentError, "all cells are labelled"),
        ({"labels_key": "holes"}, InvalidArgumentError, "is missing for 140 of 420 cells"),
        ({"donor_key": "who"}, MissingKeyError, "donor_key='who' is not in adata.obs"),
        ({"layer": "raw"}, MissingKeyError, "raw"),
        ({"layer": None}, InvalidCountsError, "negative"),
    ],
    ids=["no-labels", "one-class", "NaN-labels", "no-donors", "no-layer", "no-counts"],
)
def test_bad_data(trained, change, error, message):
    adata = trained.adata.copy()
    adata.obs["constant"] = "same"
    adata.obs["holes"] = [None if i % 3 == 0 else f"x{i % 2}" for i in range(420)]
    with pytest.raises(error, match=message):
        SCDD.setup_anndata(adata, **{"labels_key": "cell_type", "layer": "counts", **change})


def test_views_are_refused(trained):
    with pytest.raises(InvalidArgumentError, match="view"):
        SCDD.setup_anndata(trained.adata[:100], "cell_type", layer="counts")


@pytest.mark.parametrize(
    "setting",
    [
        {"seed": -1},
        {"seed": 1.5},
        {"seed": True},
        {"validation_size": 0},
        {"validation_size": 1.0},
        {"validation_size": "x"},
        {"validation_size": None},
        {"latent_settings": {"n_latent": 5}},
        {"latent_settings": GeneratorConfig()},
        {"generator_settings": 5},
    ],
)
def test_bad_settings(trained, setting):
    ((name, value),) = setting.items()
    with pytest.raises(InvalidArgumentError, match=re.escape(f"{name}={value!r}")):
        fresh(trained, **setting)


def test_settings_of_another_kind_are_refused_before_anything_is_trained_or_made(trained):
    message = r"matching=\{'n_steps': 3\} is of the class dict. Give a MatchingConfig, such as MatchingConfig\(...\)"
    for call in (partial(trained.model.condense, 2), Variant):
        with pytest.raises(InvalidArgumentError, match=message):
            call(matching={"n_steps": 3})


def test_cells_that_do_not_exist_have_no_latent_representation(trained):
    with pytest.raises(InvalidArgumentError, match="indices does not fit the 420 cells .* from 0 to 419"):
        trained.model.get_latent_representation(indices=[5000])


def test_untrained_models_say_so(trained, tmp_path):
    model = fresh(trained)
    for call in (
        model.condense,
        lambda: model.generate("T cell", 1),
        model.get_latent_representation,
        lambda: model.save(tmp_path / "model"),
        lambda: model.classes,
    ):
        with pytest.raises(NotTrainedError, match="Call train"):
            call()
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("phase", ["latent space", "diffusion", "one step"])
def test_interrupted_training_goes_on_to_the_same_weights(trained, tmp_path, phase):
    straight = fresh(trained).train(progress=False)

    def stop(current: str, epoch: int, losses: object) -> None:
        if current == phase and epoch == 1:
            raise KeyboardInterrupt

    interrupted = fresh(trained)
    with pytest.raises(KeyboardInterrupt):
        interrupted.train(progress=stop, checkpoint=tmp_path)
    with pytest.raises(NotTrainedError):
        interrupted.generate("T cell", 1)
    with pytest.raises(StoreError, match="resume=True"):
        fresh(trained).train(progress=False, checkpoint=tmp_path)
    with pytest.raises(InvalidArgumentError, match=r"resume=True needs the checkpoint .* give checkpoint="):
        fresh(trained).train(progress=False, resume=True)
    resumed = fresh(trained).train(progress=False, checkpoint=tmp_path, resume=True)
    assert_same_weights(straight, resumed)
    for part in straight.history_:
        pd.testing.assert_frame_equal(straight.history_[part], resumed.history_[part])


# What is said of condensing


UNMATCHED = {"counts": "expected", "start": "random", "matching": MatchingConfig(n_steps=0)}


def test_classes_that_stay_below_the_budget_are_named(trained):
    problem = trained.model.problem
    sizes = np.bincount(problem.train.codes)
    with pytest.warns(CellstillWarning) as heard:
        cells = trained.model.condense(int(sizes.min()) + 1, **UNMATCHED)
    assert [str(each.message) for each in heard] == [
        f"1 of 3 classes have fewer than samples_per_class={sizes.min() + 1} cells to learn from, and get as many "
        f"synthetic cells as these: rare/odd ({sizes.min()})."
    ]
    assert heard[0].filename == __file__
    assert (cells.obs["cell_type"] == "rare/odd").sum() == sizes.min()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained.model.condense(int(sizes.min()), **UNMATCHED)


def test_a_budget_that_compresses_nothing_is_told(trained):
    most = int(np.bincount(trained.model.problem.train.codes).max())
    with pytest.warns(CellstillWarning, match=f"samples_per_class={most} leaves no class smaller: there is no compr"):
        cells = trained.model.condense(most, **UNMATCHED)
    assert cells.n_obs == len(trained.model.problem.train)


def test_progress_is_a_bar_for_each_phase_in_a_terminal(trained, monkeypatch, capsys):
    def shown(**how) -> str:
        trained.model.condense(2, counts="rounded", start="random", matching=QUICK, **how)
        return capsys.readouterr().err

    assert shown() == ""
    assert shown(progress=True) == ""
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm", "COLUMNS": "100"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("os.isatty", lambda fd: True)
    steps = []
    for err in (shown(), shown(progress=True, on_step=lambda *step: steps.append(step))):
        assert "matching, random" in err
        assert "choosing" in err
        assert "100%" in err
    assert steps[:2] == [("matching, random", 1, 6), ("matching, random", 2, 6)]
    assert steps[-1] == ("choosing", 6, 6)
    assert shown(progress=False) == ""
    assert shown(on_step=lambda *step: None) == ""


# Saving


def test_a_saved_model_goes_on_where_it_was(trained, condensed):
    loaded = SCDD.load(trained.path, trained.adata.copy())
    assert_same_weights(loaded, trained.model)
    assert_same_cells(loaded.condense(3, matching=QUICK), condensed)
    np.testing.assert_array_equal(loaded.get_latent_representation(), trained.model.get_latent_representation())
    for phase, losses in trained.model.history_.items():
        pd.testing.assert_frame_equal(loaded.history_[phase], losses, check_names=False)


def test_a_model_without_data_generates_but_does_not_condense(trained, tmp_path):
    loaded = SCDD.load(trained.path)
    assert loaded.classes == trained.model.classes
    assert_same_cells(loaded.generate("rare/odd", 6), trained.model.generate("rare/odd", 6))
    z = loaded.get_latent_representation(trained.new)
    np.testing.assert_array_equal(z, trained.model.get_latent_representation(trained.new))
    with pytest.raises(InvalidArgumentError, match=r"SCDD.load\(path, adata\)"):
        loaded.condense(1)
    with pytest.raises(InvalidArgumentError, match=r"SCDD.load\(path, adata\)"):
        loaded.get_latent_representation()
    # Saved again, it is as complete as it was.
    loaded.save(tmp_path / "again")
    again = SCDD.load(tmp_path / "again", trained.adata.copy())
    np.testing.assert_array_equal(again.problem.rows["train"], trained.model.problem.rows["train"])


def test_stored_files_hold_no_counts_and_no_pickle(trained):
    assert sorted(path.name for path in trained.path.iterdir()) == ["model.json", "tensors.safetensors"]
    assert json.loads((trained.path / "model.json").read_text())["kind"] == "SCDD"


@pytest.mark.parametrize("case", ["fewer", "more", "order", "labels", "counts", "class", "genes"])
def test_other_cells_are_refused(trained, case):
    adata = trained.adata.copy()
    if case == "fewer":
        adata = adata[:200].copy()
    elif case == "more":
        adata = anndata.concat([adata, trained.new], index_unique="-")
    elif case == "order":
        adata = adata[::-1].copy()
    elif case == "labels":
        adata.obs["cell_type"] = adata.obs["cell_type"].to_numpy()[::-1]
    elif case == "counts":
        adata = trained.new.copy()
        adata.obs = trained.adata.obs.copy()
    elif case == "class":
        adata.obs["cell_type"] = adata.obs["cell_type"].astype(str).str.upper().to_numpy()
    else:
        adata = adata[:, 1:].copy()
    error = GeneMismatchError if case == "genes" else InvalidArgumentError
    message = {
        "genes": "59 of the model's 60",
        "fewer": "adata has 200 cells; the model was trained on 420. Attach the cells of training",
        "more": "adata has 840 cells; the model was trained on 420. Leave out .* test_cells.csv",
        "class": "B CELL",
    }.get(case, "other cells, labels")
    with pytest.raises(error, match=message):
        SCDD.load(trained.path, adata)


def test_nothing_is_overwritten_unasked_and_damage_is_told(trained, tmp_path):
    with pytest.raises(StoreError, match="exists"):
        trained.model.save(trained.path)
    with pytest.raises(StoreError, match="is not a saved model"):
        SCDD.load(tmp_path)
    path = tmp_path / "model"
    trained.model.save(path)
    trained.model.save(path, overwrite=True)
    content = json.loads((path / "model.json").read_text())
    space = content["config"]["space"]
    without = {name: part for name, part in space.items() if name != "latent"}
    out_of_range = space | {"latent": space["latent"] | {"n_latent": 0}}
    for found, message in ((without, "'latent'"), (out_of_range, "n_latent=0 has to be an integer of at least 1.")):
        content["config"]["space"] = found
        (path / "model.json").write_text(json.dumps(content))
        with pytest.raises(StoreError, match=rf"damaged \({message}\)"):
            SCDD.load(path)


def test_an_interrupted_save_leaves_nothing(trained, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(store_module.json, "dumps", fail)
    with pytest.raises(KeyboardInterrupt):
        trained.model.save(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", ["cell", "gene"])
def test_any_label_column_can_be_written(trained, tmp_path, key):
    adata = trained.adata.copy()
    adata.obs[key] = adata.obs["cell_type"]
    SCDD.setup_anndata(adata, key, layer="counts")
    tiny = SCDD(adata, **TINY).train(progress=False).condense(2, matching=QUICK)
    tiny.write_h5ad(tmp_path / "tiny.h5ad")
    assert anndata.read_h5ad(tmp_path / "tiny.h5ad").obs[key].tolist() == tiny.obs[key].tolist()


def test_what_to_do_without_counts_is_what_can_be_done(trained):
    adata = trained.adata.copy()
    adata.layers["counts"] = adata.layers["counts"] * 1.5
    with pytest.raises(InvalidCountsError) as caught:
        SCDD.setup_anndata(adata, "cell_type", layer="counts")
    assert "allow_noninteger" not in str(caught.value)
    adata.layers["true"] = trained.adata.layers["counts"]
    remedy = r"The model reads adata.layers\['counts'\]. Put counts there: .* = adata.layers\['true'\].copy\(\)"
    with pytest.raises(InvalidCountsError, match=remedy):
        trained.model.get_latent_representation(adata)
