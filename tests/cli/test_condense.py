"""`cellstill condense`: what it writes is what the library computes; nothing of the test cells gets in."""

from __future__ import annotations

import hashlib
import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from io import StringIO
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from rich.console import Console
from sklearn.metrics import f1_score

from cellstill import SCDD
from cellstill.cli import _condensation, _condensed_evaluation, _condensed_likeness
from cellstill.cli._condensed_kept import Kept
from cellstill.cli._condensed_model import CondensationSettings
from cellstill.cli._condensed_run import describe_settings, other_settings
from cellstill.condense import (
    BASELINES,
    TRAINED_WITH,
    Baseline,
    CondensationProblem,
    MatchingConfig,
    evaluate,
    get_evaluators,
)
from cellstill.condense.baselines import latent as latent_baselines
from cellstill.condense.cells import LabelledCells
from cellstill.condense.output import to_anndata
from cellstill.condense.shared import shared_space
from cellstill.data.expression import log_expression
from cellstill.errors import InvalidArgumentError
from cellstill.io.store import load_store

SMALL = ["--n-latent", "4", "--n-hidden", "16", "--max-epochs", "3", "--generator-steps", "20"]
QUICK = [*SMALL, "--matching-steps", "0", "--start", "centroids", "--counts", "expected"]


@pytest.fixture
def no_figures(monkeypatch):
    """Leave out figures and metrics of cells, which take longer than all the rest; one test has them."""

    def draw(folder, *args, **kwargs):
        folder.mkdir()
        return 0

    monkeypatch.setattr(_condensed_likeness, "draw_condensed", draw)
    monkeypatch.setattr(_condensed_likeness, "compare", lambda *args: None)


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_what_is_written_is_what_the_model_gives(cellstill, cells, write, here):
    cells.layers["counts"] = cells.X.copy()
    cells.X = cells.X.log1p()
    path = write(cells)
    before = digest(path)
    args = ["--label-key", "cell_type", "--label-key", "condition", "--layer", "counts", "--spc", "3", *SMALL]
    result = cellstill("condense", path, *args, "--start", "centroids", "--counts", "rounded", "--matching-steps", "4")
    assert result.exit_code == 0, result.stderr
    assert digest(path) == before
    folder = here / "in_cellstill_condensed"
    assert sorted(p.name for p in here.iterdir()) == ["in.h5ad", folder.name]
    assert sorted(p.name for p in folder.iterdir()) == ["condensed.h5ad", "figures", "model", "summary.json"]
    names = [
        "generated_mean_variance",
        "generated_zeros",
        "genes",
        "mean_variance",
        "training",
        "umap",
        "umap_2",
        "zeros",
    ]
    found = sorted(p.name for p in (folder / "figures").iterdir())
    assert found == [f"{name}.{kind}" for name in names for kind in ("pdf", "png")]
    assert all((folder / "figures" / name).stat().st_size > 1000 for name in found)

    tiny = ad.read_h5ad(folder / "condensed.h5ad")
    assert tiny.shape == (18, 60)
    assert tiny.obs.groupby(["cell_type", "condition"], observed=True).size().tolist() == [3] * 6
    assert sp.issparse(tiny.X)
    assert (tiny.X.data == np.round(tiny.X.data)).all()
    assert tiny.obsm["X_scdd"].shape == (18, 4)
    model = SCDD.load(folder / "model", ad.read_h5ad(path))
    again = model.condense(3, start="centroids", counts="rounded", matching=MatchingConfig(n_steps=4))
    assert (again.X != tiny.X).nnz == 0
    pd.testing.assert_frame_equal(again.obs, tiny.obs)

    summary = summary_of(folder)
    assert summary["cells"] == {
        "train": len(model.problem.train),
        "validation": len(model.problem.validation),
        "test": 0,
    }
    assert sum(summary["cells"].values()) == 240
    size = summary["condensed"]
    assert size["n_synthetic"] == 18
    assert size["compression"] == pytest.approx(summary["cells"]["train"] / 18)
    assert {name: each["synthetic"] for name, each in size["classes"].items()} == dict.fromkeys(model.classes, 3)
    assert sum(each["real"] for each in size["classes"].values()) == summary["cells"]["train"]
    assert summary["provenance"] == json.loads(tiny.uns["scdd"]["provenance"])
    assert [row["steps"] for row in summary["choice"]] == [0, 0, 1, 1, 4, 4]
    best = max(row["mean"] for row in summary["choice"])
    assert summary["validation"]["condensed"] == pytest.approx(best)
    assert f"{best:.3f} there" in result.stdout
    told = model.problem.validation
    forest = get_evaluators(["forest"])[0].fit(model.problem.train, 6, 0).predict(told.expression())
    all_cells = summary["validation"]["by_judge"]["all_cells"]["forest"]
    assert all_cells == pytest.approx(f1_score(told.codes, forest, average="macro"))
    realism = summary["realism"]
    assert set(realism) == {"generated"}
    assert 0.5 < realism["generated"]["forest_auroc"]["synthetic"] <= 1
    assert abs(realism["generated"]["forest_auroc"]["control"] - 0.5) < 0.15
    assert summary["evaluation"] is None
    assert set(summary["seconds"]) == {
        "load",
        "read",
        "check",
        "train",
        "condense",
        "compare",
        "draw",
        "write",
        "total",
    }
    assert summary["input"]["counts"] == "layers/counts"
    assert "6 of 6" not in result.stderr


@pytest.mark.usefixtures("no_figures")
@pytest.mark.filterwarnings("ignore:Observation names are not unique:UserWarning")
def test_the_evaluation_is_of_cells_that_nothing_was_made_of(cellstill, cells, write, here, monkeypatch):
    cells.obs["donor"] = [f"d{i % 8}" for i in range(cells.n_obs)]
    # Labels that cannot be learned by heart, so that scores tell which cells were learned from.
    wrong = np.random.default_rng(0).permutation(cells.n_obs)[:80]
    cells.obs["cell_type"] = cells.obs["cell_type"].astype(str)
    cells.obs.loc[cells.obs_names[wrong], "cell_type"] = np.roll(cells.obs["cell_type"].iloc[wrong], 1)
    cells.obs["cell_type"] = cells.obs["cell_type"].astype("category")
    path = write(cells)
    seen = []
    build = _condensation.build_model
    monkeypatch.setattr(
        _condensation, "build_model", lambda adata, *rest: seen.append(adata.obs.copy()) or build(adata, *rest)
    )
    judges = ["--evaluator", "forest", "--evaluator", "logistic"]
    args = ["--label-key", "cell_type", "--donor-key", "donor", "--spc", "4", "--seeds", "2", "--baseline", "random"]
    result = cellstill("condense", path, "--evaluate", *args, *judges, *QUICK, "--out", "out")
    assert result.exit_code == 0, result.stderr
    folder = here / "out"
    assert {"retention.png", "retention.pdf"} <= {p.name for p in (folder / "figures").iterdir()}

    (used,) = seen
    is_test = ~cells.obs_names.isin(used.index)
    summary = summary_of(folder)
    assert summary["cells"]["test"] == summary["evaluation"]["n_test"] == is_test.sum() > 0
    assert not set(cells.obs["donor"][is_test]) & set(used["donor"])
    held_out = pd.read_csv(folder / "test_cells.csv", dtype=str, keep_default_na=False)
    assert held_out["cell"].tolist() == cells.obs_names[is_test].tolist()
    assert held_out["row"].astype(int).tolist() == np.flatnonzero(is_test).tolist()
    stored = ad.read_h5ad(path)
    stored.obs_names = [f"barcode{i % 9}" for i in range(stored.n_obs)]
    with pytest.raises(InvalidArgumentError, match=rf"240 cells; the model was trained on {len(used)}. Leave") as told:
        SCDD.load(folder / "model", adata=stored)
    advice = re.search(r"held_out = .*copy\(\)", str(told.value)).group().replace("test_cells", f"{folder}/test_cells")
    scope = {"adata": stored, "np": np, "pd": pd}
    exec(advice, scope)
    attached = SCDD.load(folder / "model", adata=scope["adata"])
    how = {"counts": "expected", "start": "centroids", "matching": MatchingConfig(n_steps=0)}
    assert (attached.condense(4, **how).X != ad.read_h5ad(folder / "condensed.h5ad").X).nnz == 0
    scores = pd.read_csv(folder / "evaluation.csv")
    assert set(scores["method"]) == {"scdd", "random"}
    assert len(scores) == 2 * 2 * 2

    tiny = ad.read_h5ad(folder / "condensed.h5ad")
    test = cells[is_test]
    genes = test.var_names.get_indexer(tiny.var_names)
    learned = cells[used.index[load_store(folder / "model", "SCDD")[0]["rows.train"]]]
    assert len(learned) == summary["cells"]["train"]
    truth = test.obs["cell_type"].cat.codes.to_numpy()
    full = pd.DataFrame(summary["evaluation"]["all_cells"])
    for name in ("forest", "logistic"):
        of = {}
        for source, x, obs in (("scdd", tiny.X, tiny.obs), ("all", learned.X[:, genes], learned.obs)):
            codes = obs["cell_type"].cat.codes.to_numpy().astype(np.int64)
            fitted = get_evaluators([name])[0].fit(LabelledCells(sp.csr_matrix(x, dtype=np.float32), codes), 3, 0)
            of[source] = f1_score(truth, fitted.predict(log_expression(test.X[:, genes])), average="macro")
        row = scores.query("method == 'scdd' and seed == 0 and evaluator == @name").iloc[0]
        assert row["macro_f1"] == pytest.approx(of["scdd"])
        assert full.query("seed == 0 and evaluator == @name").iloc[0]["macro_f1"] == pytest.approx(of["all"])
        assert row["retention"] == pytest.approx(of["scdd"] / of["all"])
    mean = scores.groupby("method")["retention"].mean()
    for row in summary["evaluation"]["methods"]:
        assert row["retention"] == pytest.approx(mean[row["method"]])
        assert f"{row['retention']:.3f}" in result.stdout
    (difference,) = summary["evaluation"]["differences"]
    assert difference["difference"] == pytest.approx(mean["scdd"] - mean["random"])
    assert difference["low"] <= difference["difference"] <= difference["high"]
    assert f"{difference['difference']:+.3f} (" in result.stdout


@pytest.mark.usefixtures("no_figures")
def test_baselines_of_the_latent_space_share_the_one_that_was_trained(cellstill, cells, write, here, monkeypatch):
    cells.obsm["X_known"] = np.random.default_rng(0).normal(size=(cells.n_obs, 2)).astype(np.float32)
    used = []

    def keep(problem, size, seed):
        used.append(shared_space(problem, seed))
        return problem.train[np.unique(problem.train.codes, return_index=True)[1]]

    monkeypatch.setattr(latent_baselines, "N_STEPS", 3)
    monkeypatch.setattr("cellstill.condense.shared.fit_space", lambda *args, **kwargs: pytest.fail("a second space"))
    monkeypatch.setitem(BASELINES, "kept", Baseline("kept", keep, "", ""))
    names = ("kmeans_latent", "kmeans_latent_medoids", "generator", "feat_distill", "text_distill", "kept")
    baselines = [word for name in names for word in ("--baseline", name)]
    args = ["--label-key", "cell_type", "--obsm-key", "X_known", "--seeds", "2", "--evaluator", "knn", "--spc", "2"]
    result = cellstill("condense", write(cells), "--evaluate", *args, *baselines, *QUICK, "--out", "out")
    assert result.exit_code == 0, result.stderr
    assert " test cells, 1 evaluator, which reaches a macro-F1 of " in result.stdout
    scores = pd.read_csv(here / "out" / "evaluation.csv").set_index("method")
    assert set(scores.index) == {"scdd", *names}
    # Features of four dimensions in float32.
    assert (scores.loc["feat_distill", "bytes"] == scores.loc["feat_distill", "n_cells"] * 4 * 4).all()
    first, second = used
    assert first is second
    stored = SCDD.load(here / "out" / "model").space
    assert (first.autoencoder.config.n_latent, first.autoencoder.n_told) == (4, 2)
    weights = first.autoencoder.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in stored.autoencoder.state_dict().items())


def test_what_methods_trained_with_is_that_of_the_library(cells, here, monkeypatch):
    """Ours and two baselines, in whose place real cells are taken."""
    problem = CondensationProblem.from_anndata(cells, "cell_type", n_top_genes=None)
    random = BASELINES["random"].condense
    for name in ("dc", "dm"):
        monkeypatch.setitem(BASELINES, name, replace(BASELINES[name], condense=random))
    names, judges = ("dc", "random", "dm"), ("knn", "cnn", "mlp_small")

    def make(seed):
        return to_anndata(random(problem, 2, seed), problem.classes, problem.tasks, problem.genes, {})

    how = {"samples_per_class": 2, "evaluators": judges, "seeds": [0]}
    found, _ = _condensed_evaluation.evaluate_condensed(
        problem, make, baselines=names, kept=Kept(here), say=lambda words: None, **how
    )
    methods = {"scdd": "random", **dict(zip(names, names, strict=True))}
    of_library = evaluate(problem, methods, trained_with={"scdd": TRAINED_WITH}, progress=False, **how)
    assert found.trained_with == of_library.trained_with
    assert found.trained_with["scdd"] == TRAINED_WITH
    assert found.trained_with["dc"] == ("mlp_small",)
    assert found.trained_with["random"] == ()
    gap = "cross_architecture_gap"
    np.testing.assert_allclose(found.summary()[gap].sort_values(), of_library.summary()[gap].sort_values())
    assert found.summary()[gap].notna().sum() == 3


def test_the_table_shows_as_much_as_the_terminal_has_room_for(cells):
    problem = CondensationProblem.from_anndata(cells, "cell_type", n_top_genes=None)
    methods = {"scdd": "kmeans_centroids", "random": "random", "kmeans_centroids": "kmeans_pca"}
    judges = ["logistic", "knn"]
    how = {"samples_per_class": [2], "seeds": [0, 1], "evaluators": judges, "trained_with": {"scdd": ["knn"]}}
    evaluation = evaluate(problem, methods, **how)

    def drawn(width: int) -> list[str]:
        ((_, table),) = _condensed_evaluation.evaluation_tables(evaluation, width)
        console = Console(width=width, record=True, file=StringIO())
        console.print(table)
        return console.export_text().splitlines()

    names = ["retention", "sd", "macro-F1", "rare", "gap", "robust", "fewer", "seconds", "scdd", "is", "ahead", "by"]
    wide = drawn(110)
    assert wide[0].split() == names
    own = next(line for line in wide if line.startswith("scdd")).split()
    row = evaluation.summary().set_index("method").loc["scdd"]
    columns = ["retention", "retention_sd", "macro_f1", "rare_recall", "cross_architecture_gap", "label_robust_score"]
    assert own[1:7] == [f"{row[column]:.3f}" for column in columns]
    assert own[7] == f"{row['compression']:.1f}x"
    for width, gone in ((80, {"fewer", "seconds", "robust"}), (75, {"fewer", "seconds", "robust", "gap"})):
        narrow = drawn(width)
        assert narrow[0].split() == [name for name in names if name not in gone]
        assert len(narrow) == len(wide) == 4
        assert "…" not in "".join(narrow)


def test_cells_set_aside(cells):
    cells.obs["donor"] = [f"d{i % 5}" for i in range(cells.n_obs)]
    rest, test = _condensed_evaluation.hold_out(cells, ["cell_type"], None, 0.2, 0)
    assert np.array_equal(np.sort(np.concatenate([rest, test])), np.arange(cells.n_obs))
    sizes = cells.obs["cell_type"].value_counts()
    share = cells.obs["cell_type"].iloc[test].value_counts() / sizes
    assert (abs(share - 0.2) < 1 / sizes).all()
    rest, test = _condensed_evaluation.hold_out(cells, ["cell_type"], "donor", 0.2, 0)
    assert cells.obs["donor"].iloc[test].nunique() == 1
    assert cells.obs["donor"].iloc[rest].nunique() == 4
    assert not set(cells.obs["donor"].iloc[test]) & set(cells.obs["donor"].iloc[rest])
    with pytest.raises(InvalidArgumentError, match="no test cell"):
        _condensed_evaluation.hold_out(
            cells[np.unique(cells.obs["cell_type"], return_index=True)[1]], ["cell_type"], None, 0.2, 0
        )


def test_real_cells_and_control_are_two_halves(cells):
    of = cells.obs["cell_type"].astype(str).to_numpy()
    of[0], of[1:6] = "lonely", "rare"
    cells.obs["cell_type"] = of
    problem = CondensationProblem.from_anndata(cells, "cell_type", train_size=0.85, validation_size=0.15)
    sizes = np.bincount(problem.train.codes)
    assert problem.classes[:2] == ("lonely", "rare")
    assert sizes[:2].tolist() == [1, 4]
    made = problem.train[np.flatnonzero(problem.train.codes != 2)]
    real, synthetic, control = _condensed_likeness.matched(problem, made, 0)
    wanted = [0, 2, 0, *(sizes[3:] // 2)]
    assert [np.bincount(part.codes, minlength=5).tolist() for part in (real, synthetic, control)] == [wanted] * 3
    rows = [{row.tobytes() for row in part.counts.toarray()} for part in (real, control, problem.train)]
    assert not rows[0] & rows[1]
    assert rows[0] | rows[1] <= rows[2]


@pytest.mark.usefixtures("no_figures")
def test_rare_classes_are_kept_and_said(cellstill, cells, write, here):
    of = cells.obs["cell_type"].astype(str).to_numpy()
    of[0], of[1:5] = "lonely", "rare"
    cells.obs["cell_type"] = of
    result = cellstill("condense", write(cells), "--label-key", "cell_type", "--spc", "6", *QUICK, "--out", "out")
    assert result.exit_code == 0, result.stderr
    warning = " ".join(result.stderr.split())
    assert "2 of 5 classes have fewer than --spc 6 cells to learn from" in warning
    assert "lonely (1), rare (3)" in warning
    assert "synthesised from a single cell" in warning
    assert "no compression" not in warning
    found = ad.read_h5ad(here / "out" / "condensed.h5ad").obs["cell_type"].value_counts()
    assert found.to_dict() == {"lonely": 1, "rare": 3, "type_0": 6, "type_1": 6, "type_2": 6}
    assert summary_of(here / "out")["warnings"] == [
        line.removeprefix("warning: ") for line in result.stderr.splitlines() if not line.startswith("stage: ")
    ]


@pytest.mark.usefixtures("no_figures")
def test_the_same_seed_gives_the_same_file(cellstill, cells, write, here):
    path = write(cells)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        args = ["--label-key", "cell_type", "--spc", "2", "--seed", seed, "--out", name]
        assert cellstill("condense", path, *args, *QUICK).exit_code == 0
    assert digest(here / "a" / "condensed.h5ad") == digest(here / "b" / "condensed.h5ad")
    assert digest(here / "a" / "condensed.h5ad") != digest(here / "c" / "condensed.h5ad")


@pytest.mark.usefixtures("no_figures")
def test_an_interrupted_run_goes_on(cellstill, cells, write, here, monkeypatch):
    path = write(cells)
    args = ["condense", path, "--label-key", "cell_type", "--spc", "2", *QUICK]
    assert cellstill(*args, "--out", "whole").exit_code == 0
    with monkeypatch.context() as patch:
        patch.setattr("cellstill.condense.space.fit_generator", lambda *a, **k: sys.exit(143))
        stopped = cellstill(*args, "--out", "out")
    assert stopped.exit_code == 143
    assert "with --resume goes on from there" in stopped.stderr
    assert "nothing was written" in stopped.stderr
    kept = here / ".out.checkpoint"
    assert sorted(p.name for p in here.iterdir()) == [kept.name, "in.h5ad", "whole"]
    assert sorted(p.name for p in kept.iterdir()) == ["latent.ckpt", "run.json"]

    refused = cellstill(*args, "--out", "out")
    assert refused.exit_code == 1
    assert "Go on with --resume, or start afresh with --overwrite" in refused.stderr
    other = cellstill(*args, "--out", "out", "--resume", "--seed", "3")
    assert other.exit_code == 1
    assert "belongs to another run: --seed 0 there and --seed 3 here. Resume with what it was started" in other.stderr
    assert "start afresh: --overwrite without --resume" in other.stderr
    assert "goes on from there" not in other.stderr
    assert sorted(p.name for p in kept.iterdir()) == ["latent.ckpt", "run.json"]
    assert not (here / "out").exists()

    assert cellstill(*args, "--out", "out", "--resume").exit_code == 0
    assert sorted(p.name for p in here.iterdir()) == ["in.h5ad", "out", "whole"]
    assert digest(here / "out" / "condensed.h5ad") == digest(here / "whole" / "condensed.h5ad")


@pytest.mark.usefixtures("no_figures")
def test_an_interrupted_evaluation_goes_on(cellstill, cells, write, here, monkeypatch):
    judged = ["--evaluate", "--seeds", "2", "--evaluator", "knn", "--evaluator", "logistic"]
    baselines = ["--baseline", "random", "--baseline", "herding"]
    args = ["condense", write(cells), "--label-key", "cell_type", "--spc", "2", *QUICK, *judged]
    assert cellstill(*args, *baselines, "--out", "whole").exit_code == 0

    herding, asked = BASELINES["herding"], []

    def until_the_last(problem, size, seed):
        asked.append(seed)
        return herding.condense(problem, size, seed) if seed == 0 or len(asked) > 2 else sys.exit(143)

    monkeypatch.setitem(BASELINES, "herding", replace(herding, condense=until_the_last))
    stopped = cellstill(*args, "--baseline", "herding", "--out", "out")
    assert stopped.exit_code == 143
    assert "what is done is kept in" in stopped.stderr
    kept = here / ".out.checkpoint"
    done = ["all_cells-0", "all_cells-1", "cells", "herding-0", "run", "scdd-0", "scdd-1"]
    assert sorted(p.stem for p in kept.glob("*.json")) == done
    assert not list(kept.glob("*partial*"))

    other = cellstill(*args, *baselines, "--out", "out", "--resume", "--matching-steps", "5")
    assert other.exit_code == 1
    assert "belongs to another run: --matching-steps 0 there and --matching-steps 5 here." in other.stderr
    assert "start afresh: --overwrite without --resume" in other.stderr
    assert "goes on from there" not in other.stderr

    with monkeypatch.context() as patch:
        patch.setattr(SCDD, "condense", lambda *args, **kwargs: pytest.fail("condensed again"))
        patch.setattr(_condensed_evaluation, "train_full", lambda *args: pytest.fail("trained on all cells again"))
        resumed = cellstill(*args, *baselines, "--out", "out", "--resume")
    assert resumed.exit_code == 0, resumed.stderr
    assert asked == [0, 1, 1]
    assert sorted(p.name for p in here.iterdir()) == ["in.h5ad", "out", "whole"]
    assert digest(here / "out" / "condensed.h5ad") == digest(here / "whole" / "condensed.h5ad")
    one, two = (
        pd.read_csv(here / name / "evaluation.csv").drop(columns=["seconds", "added_mb"]) for name in ("out", "whole")
    )
    pd.testing.assert_frame_equal(one, two)
    out, whole = summary_of(here / "out"), summary_of(here / "whole")
    assert out["evaluation"]["differences"] == whole["evaluation"]["differences"]
    assert out["warnings"] == whole["warnings"]


@pytest.mark.usefixtures("no_figures")
def test_an_evaluation_does_not_go_on_with_other_test_cells(cellstill, cells, write, here, monkeypatch):
    args = ["condense", write(cells), "--label-key", "cell_type", "--spc", "2", *QUICK, "--evaluate", "--seeds", "1"]
    args += ["--evaluator", "knn", "--baseline", "random", "--out", "out"]
    with monkeypatch.context() as patch:
        patch.setattr(_condensation, "_validation", lambda *args: sys.exit(143))
        assert cellstill(*args).exit_code == 143
    _, test = _condensed_evaluation.hold_out(cells, ["cell_type"], None, 0.2, 0)
    order = np.arange(cells.n_obs)
    order[test] = np.roll(test, 1)
    cells.X = cells.X[order]
    write(cells)
    other = cellstill(*args, "--resume")
    assert other.exit_code == 1
    assert "belongs to another run: other cells, labels or counts." in other.stderr
    assert sorted(p.name for p in here.iterdir()) == [".out.checkpoint", "in.h5ad"]


@pytest.mark.usefixtures("no_figures")
def test_condensed_cells_are_not_made_again(cellstill, cells, write, here, monkeypatch):
    args = ["condense", write(cells), "--label-key", "cell_type", "--spc", "300", *QUICK, "--out", "out"]
    with monkeypatch.context() as patch:
        patch.setattr(_condensation, "_validation", lambda *args: sys.exit(143))
        stopped = cellstill(*args)
    assert stopped.exit_code == 143
    made = ad.read_h5ad(here / ".out.checkpoint" / "condensed.h5ad")
    genes, labels = cells.copy(), cells.copy()
    genes.var_names = [f"renamed_{name}" for name in cells.var_names]
    labels.obs["cell_type"] = cells.obs["cell_type"].cat.rename_categories({"type_1": "type_1b"})
    for other, words in (
        (genes, "other genes, or other names of genes"),
        (labels, "a category of 'cell_type' is 'type_1' there and 'type_1b' here"),
    ):
        write(other)
        refused = cellstill(*args, "--resume")
        assert refused.exit_code == 1
        assert f"belongs to another run: {words}." in refused.stderr
    write(cells)
    monkeypatch.setattr(SCDD, "condense", lambda *args, **kwargs: pytest.fail("condensed again"))
    resumed = cellstill(*args, "--resume")
    assert resumed.exit_code == 0, resumed.stderr
    assert (ad.read_h5ad(here / "out" / "condensed.h5ad").X != made.X).nnz == 0
    (warning,) = summary_of(here / "out")["warnings"]
    assert "3 of 3 classes have fewer than --spc 300 cells" in warning
    assert [line for line in stopped.stderr.splitlines() if line.startswith("warning: ")] == [f"warning: {warning}"]


def test_differences_of_runs_are_said_in_options(here):
    settings = CondensationSettings(path=here / "a b.h5ad", label_keys=("cell_type",))
    first = describe_settings(settings)
    assert other_settings(json.loads(json.dumps(first)), first) == []
    assert other_settings(first, describe_settings(replace(settings, baselines=("kip",), n_seeds=9))) == []
    for changes, words in (
        ({"label_keys": ("a", "b")}, "--label-key cell_type there and --label-key a --label-key b here"),
        ({"n_top_genes": None}, "--n-top-genes 2000 there and --n-top-genes 0 here"),
        ({"matching_steps": 0}, "--matching-steps 200 there and --matching-steps 0 here"),
        ({"samples_per_class": 3}, "--spc 10 there and --spc 3 here"),
        ({"layer": "raw"}, "no --layer there and --layer raw here"),
        ({"evaluate": True}, "no --evaluate there and --evaluate here"),
        ({"evaluators": ("knn",)}, "no --evaluator there and --evaluator knn here"),
        ({"path": here / "b.h5ad"}, "FILE 'a b.h5ad' there and FILE b.h5ad here"),
    ):
        assert other_settings(first, describe_settings(replace(settings, **changes))) == [words]
    assert other_settings(first, first | {"version": "9"}) == [f"cellstill {first['version']} there and 9 here"]


OTHER_SETTINGS = [
    ("--label-key cell_type", "--label-key condition"),
    ("no --donor-key", "--donor-key donor"),
    ("no --layer", "--layer counts"),
    ("--spc 2", "--spc 3"),
    ("--counts expected", "--counts rounded"),
    ("--start centroids", "--start random"),
    ("--n-top-genes 50", "--n-top-genes 40"),
    ("--n-top-genes 50", "--n-top-genes 0"),
    ("no --obsm-key", "--obsm-key X_known"),
    ("--n-latent 4", "--n-latent 5"),
    ("--n-hidden 16", "--n-hidden 17"),
    ("--max-epochs 3", "--max-epochs 4"),
    ("--generator-steps 20", "--generator-steps 21"),
    ("--matching-steps 0", "--matching-steps 1"),
    ("--seed 0", "--seed 1"),
    ("--accelerator auto", "--accelerator cpu"),
    ("no --evaluate", "--evaluate"),
    ("no --evaluator", "--evaluate --evaluator knn"),
    ("--test-size 0.2", "--evaluate --test-size 0.3"),
]


def test_every_other_setting_is_named_before_anything_is_trained(cellstill, cells, write, here, monkeypatch):
    cells.layers["counts"], cells.obsm["X_known"] = cells.X.copy(), np.eye(cells.n_obs, 2)
    cells.obs["donor"] = [f"d{i % 5}" for i in range(cells.n_obs)]
    given = {"--label-key": "cell_type", "--spc": "2", "--n-top-genes": "50"}
    given |= dict(zip(QUICK[::2], QUICK[1::2], strict=True))

    def words(options: dict[str, str]) -> list[str]:
        return [word for pair in options.items() for word in pair if word]

    args = ["condense", write(cells), "--out", "out"]
    with monkeypatch.context() as patch:
        # The training of the latent space is done, that of the generator is not.
        patch.setattr("cellstill.condense.space.fit_generator", lambda *a, **k: sys.exit(143))
        assert cellstill(*args, *words(given)).exit_code == 143
    monkeypatch.setattr(SCDD, "train", lambda *args, **kwargs: pytest.fail("trained"))
    named = set()
    for there, here_given in OTHER_SETTINGS:
        *_, option = (word for word in here_given.split() if word.startswith("--"))
        value = here_given.partition(f"{option} ")[2]
        more = {"--evaluate": ""} if "--evaluate " in here_given else {}
        other = cellstill(*args, *words(given | more | {option: value}), "--resume")
        assert other.exit_code == 1
        said = f"{there} there and {option} {value}".rstrip() + " here"
        assert said in other.stderr
        assert "Resume with what it was started with, or start afresh: --overwrite without --resume." in other.stderr
        if not more:
            assert f".out.checkpoint belongs to another run: {said}. Resume" in other.stderr
        named.add(option)
    settings = set(describe_settings(CondensationSettings(path=here, label_keys=()))["settings"])
    assert len(named) == len(settings - {"path"})
    assert [p.name for p in (here / ".out.checkpoint").glob("*.ckpt")] == ["latent.ckpt"]


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("resume", [["--resume"], []])
def test_a_run_that_was_killed_before_its_first_epoch_is_none(cellstill, cells, write, here, resume):
    (here / ".out.checkpoint").mkdir()
    (here / ".out.checkpoint" / ".partial-00000000-1-00000000-latent.ckpt").write_text("half")
    (here / ".out.checkpoint" / "run.json").write_text('{"settings": {}, "version": "0"}')
    args = ["condense", write(cells), "--label-key", "cell_type", "--spc", "1", *QUICK, "--out", "out"]
    assert cellstill(*args, *resume).exit_code == 0


@pytest.mark.usefixtures("no_figures")
def test_overwriting_starts_afresh(cellstill, cells, write, here):
    (here / ".out.checkpoint").mkdir()
    (here / ".out.checkpoint" / "latent.ckpt").write_text("damaged")
    args = ["condense", write(cells), "--label-key", "cell_type", "--spc", "1", *QUICK, "--out", "out"]
    assert "is not a checkpoint, or damaged" in cellstill(*args, "--resume").stderr
    assert cellstill(*args, "--overwrite").exit_code == 0
    assert sorted(p.name for p in here.iterdir()) == ["in.h5ad", "out"]


def training(path, here) -> subprocess.Popen:
    """A process of the command that has trained an epoch, and would train for hours."""
    program = Path(sys.executable).with_name("cellstill")
    args = ["condense", path, "--label-key", "cell_type", "--max-epochs", "100000", "--out", "out"]
    process = subprocess.Popen([program, *args], cwd=here, stderr=subprocess.PIPE, text=True)
    for _ in range(1200):
        if (here / ".out.checkpoint" / "latent.ckpt").exists() or process.poll() is not None:
            break
        time.sleep(0.1)
    assert process.poll() is None
    return process


def stages(log: str) -> list[str]:
    """What stages of the command a log names, in order, each with its time."""
    lines = [line for line in log.splitlines() if line.startswith("stage: ")]
    begun, ended = lines[::2], lines[1::2]
    for first, last in zip(begun, ended, strict=False):
        assert re.fullmatch(re.escape(first) + r": \d+\.\d s", last)
    return [line.removeprefix("stage: ") for line in begun]


def test_a_stopped_process_leaves_its_training_only(cells, write, here):
    process = training(write(cells), here)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "interrupted: nothing was written."
    assert "--resume" in err
    assert [name.split()[0] for name in stages(err)] == ["Loading", "Reading", "Checking", "Training"]
    assert sorted(p.name for p in here.iterdir()) == [".out.checkpoint", "in.h5ad"]


@pytest.mark.usefixtures("no_figures")
def test_what_a_killed_process_leaves_is_gone_after_the_next(cellstill, cells, write, here):
    path = write(cells)
    process = training(path, here)
    process.kill()
    process.communicate(timeout=60)
    assert len(list(here.glob(".partial-*-out"))) == 1
    args = ["condense", path, "--label-key", "cell_type", "--spc", "1", *QUICK, "--out", "out"]
    assert cellstill(*args, "--overwrite").exit_code == 0
    assert sorted(p.name for p in here.iterdir()) == ["in.h5ad", "out"]


def unlabelled(cells):
    cells.obs["cell_type"] = cells.obs["cell_type"].astype(object)
    cells.obs.loc[cells.obs_names[3:6], "cell_type"] = np.nan


def one_class(cells):
    cells.obs["cell_type"] = "B"


def two_donors(cells):
    cells.obs["donor"] = [f"d{i % 2}" for i in range(cells.n_obs)]


def one_donor(cells):
    cells.obs["donor"] = "d0"


def missing_donor(cells):
    cells.obs["donor"] = [np.nan, *["d0", "d1"] * 119, "d0"]


def donors_are_classes(cells):
    cells.obs["donor"] = cells.obs["cell_type"].astype(str)


def no_counts(cells):
    cells.X = cells.X.log1p()


def constant(cells):
    cells.obs["constant"] = "same"


def nothing(cells):
    pass


BAD = {
    "unlabelled": (unlabelled, [], ["--label-key: adata.obs['cell_type'] is missing for 3 of 240", "remove them"]),
    "one_class": (one_class, [], ["--label-key cell_type: all cells are labelled 'B'", "at least two categories"]),
    "no_such_label": (nothing, ["--label-key", "x"], ["--label-key x is not in adata.obs", "'cell_type'"]),
    "label_twice": (nothing, ["--label-key", "cell_type"], ["several different"]),
    "one_category": (
        constant,
        ["--label-key", "constant"],
        ["--label-key constant: all cells are labelled 'same'", "Leave it out"],
    ),
    "no_such_donor": (nothing, ["--donor-key", "x"], ["--donor-key x is not in adata.obs"]),
    "one_donor": (one_donor, ["--donor-key", "donor"], ["--donor-key has 1 donors (d0); 2 at least", "to split cells"]),
    "missing_donor": (missing_donor, ["--donor-key", "donor"], ["--donor-key: adata.obs['donor'] is missing for 1"]),
    "two_donors_to_evaluate": (
        two_donors,
        ["--donor-key", "donor", "--evaluate"],
        ["--donor-key donor has 2 donors (d0, d1)", "3 at least", "Leave --donor-key or --evaluate out"],
    ),
    "donors_are_classes": (donors_are_classes, ["--donor-key", "donor"], ["No training cell is left of the classes"]),
    "no_such_layer": (nothing, ["--layer", "x"], ["--layer x is not in adata.layers"]),
    "no_counts": (no_counts, [], ["counts"]),
    "no_such_embedding": (nothing, ["--obsm-key", "x"], ["--obsm-key x is not in adata.obsm"]),
    "one_gene": (nothing, ["--n-top-genes", "1"], ["--n-top-genes 1 has to be at least 2, or 0 for all genes"]),
    "no_such_baseline": (nothing, ["--evaluate", "--baseline", "x"], ["--baseline x is not known", "'herding'"]),
    "no_such_evaluator": (nothing, ["--evaluate", "--evaluator", "x"], ["--evaluator x is not known", "'forest'"]),
    "own_folder": (nothing, ["--out", "."], ["lies in the output folder"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(cellstill, cells, write, here, case):
    spoil, args, remedy = BAD[case]
    spoil(cells)
    path = write(cells)
    out = [] if "--out" in args else ["--out", "new/newer/out"]
    result = cellstill("condense", path, "--label-key", "cell_type", *args, *out)
    assert result.exit_code == 1
    assert result.stdout == ""
    (line,) = (line for line in result.stderr.splitlines() if not line.startswith(("warning: ", "stage: ")))
    assert line.startswith("error: ")
    for words in remedy:
        assert words in line
    assert [p.name for p in here.iterdir()] == ["in.h5ad"]


@pytest.mark.parametrize("name", ["geosketch", "scvalue"])
def test_a_missing_package_is_said_before_training(cellstill, cells, write, here, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    result = cellstill("condense", write(cells), "--label-key", "cell_type", "--evaluate", "--baseline", name)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == (
        f"error: The baseline '{name}' needs the package '{name}', which is not installed. Run: pip install "
        "'cellstill[condense]'."
    )
    assert [p.name for p in here.iterdir()] == ["in.h5ad"]


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["--label-key", "a", "--spc", "0"],
        ["--label-key", "a", "--counts", "x"],
        ["--label-key", "a", "--baseline", "random"],
        ["--label-key", "a", "--seeds", "2"],
        ["--label-key", "a", "--evaluate", "--test-size", "1"],
    ],
    ids=" ".join,
)
def test_usage_errors_touch_nothing(cellstill, here, args):
    assert cellstill("condense", "in.h5ad", *args).exit_code == 2
    assert list(here.iterdir()) == []
