from __future__ import annotations

import sys
import time

import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import torch
from anndata import AnnData

from cellstill.condense.baselines import BASELINES
from cellstill.condense.cells import Features, LabelledCells
from cellstill.condense.evaluate import evaluate
from cellstill.condense.evaluators import EVALUATORS
from cellstill.condense.problem import CondensationProblem
from cellstill.errors import CellstillWarning, InvalidArgumentError
from cellstill.metrics.condensation import classification_scores, label_robust_score, paired_bootstrap

QUICK = ["logistic", "mlp_small", "knn"]


def labelled_counts(seed: int = 0) -> AnnData:
    """Four types of unequal size and two conditions, which move ten genes each."""
    rng = np.random.default_rng(seed)
    kind = np.repeat(np.arange(4), [80, 60, 40, 12])
    condition = rng.integers(2, size=len(kind))
    rate = np.full((len(kind), 60), 0.4)
    for k in range(4):
        rate[np.ix_(kind == k, np.arange(10 * k, 10 * k + 10))] = 1.6
    rate[np.ix_(condition == 1, np.arange(45, 55))] = 1.6
    obs = pd.DataFrame({"cell_type": [f"t{k}" for k in kind], "condition": [f"c{c}" for c in condition]})
    return AnnData(rng.poisson(rate).astype(np.float32), obs=obs.set_index(obs.index.astype(str)))


@pytest.fixture(scope="module")
def problem() -> CondensationProblem:
    return CondensationProblem.from_anndata(labelled_counts(), "cell_type", train_size=0.5)


@pytest.fixture(scope="module")
def evaluation(problem):
    methods = {"random": "random", "k-means": "kmeans_centroids", "first": first_cells}
    return evaluate(
        problem,
        methods,
        samples_per_class=(1, 5),
        seeds=(0, 1),
        evaluators=QUICK,
        trained_with={"first": ["mlp_small"]},
    )


def first_cells(problem: CondensationProblem, samples_per_class: int, seed: int) -> LabelledCells:
    chosen = [problem.train.of_class(c)[:n] for c, n in enumerate(problem.budget(samples_per_class))]
    return problem.train[np.concatenate(chosen)]


def test_scores_are_those_of_training_and_predicting_by_hand(problem, evaluation):
    scores = evaluation.scores
    assert len(scores) == 3 * 2 * 2 * 3
    test = problem.test.expression()
    sizes = np.bincount(problem.train.codes)
    for name in QUICK:
        predicted = EVALUATORS[name].fit(first_cells(problem, 5, 1), 4, seed=1).predict(test)
        by_hand = classification_scores(problem.test.codes, predicted, sizes)
        full = classification_scores(
            problem.test.codes, EVALUATORS[name].fit(problem.train, 4, seed=1).predict(test)
        ).macro_f1
        row = scores.query(f"method == 'first' and samples_per_class == 5 and seed == 1 and evaluator == '{name}'")
        assert len(row) == 1
        row = row.iloc[0]
        assert (row.accuracy, row.macro_f1) == (by_hand.accuracy, by_hand.macro_f1)
        assert (row.balanced_accuracy, row.rare_recall) == (by_hand.balanced_accuracy, by_hand.rare_recall)
        assert row.retention == pytest.approx(by_hand.macro_f1 / full)
        assert row.n_cells == 20
        assert row.compression == pytest.approx(len(problem.train) / 20)
    best = evaluation.full_scores.groupby("evaluator").macro_f1.mean().max()
    np.testing.assert_allclose(scores.retention_of_best, scores.macro_f1 / best)
    assert (scores.seconds > 0).all()
    assert (scores.bytes > 0).all()


def test_tables_are_copies(evaluation):
    before = evaluation.scores
    for table in (evaluation.scores, evaluation.full_scores):
        table["macro_f1"] = -1.0
    pd.testing.assert_frame_equal(evaluation.scores, before)
    assert (evaluation.full_scores.macro_f1 > 0).all()


def test_summary_means_over_evaluators_and_seeds(evaluation):
    summary = evaluation.summary().set_index(["samples_per_class", "method"])
    scores = evaluation.scores
    for (size, method), row in summary.iterrows():
        own = scores[(scores.samples_per_class == size) & (scores.method == method)]
        assert row.retention == pytest.approx(own.retention.mean())
        assert row.retention_sd == pytest.approx(own.groupby("seed").retention.mean().std(ddof=1))
        means = own.groupby("evaluator").retention.mean()
        if method == "first":
            gap = means["mlp_small"] - (means["logistic"] + means["knn"]) / 2
            assert row.cross_architecture_gap == pytest.approx(gap)
        else:
            assert np.isnan(row.cross_architecture_gap)
    full = evaluation.full_scores.set_index(["evaluator", "seed"]).accuracy
    of = scores.set_index(["samples_per_class", "method", "evaluator", "seed"]).accuracy
    by_hand = [
        label_robust_score(of[5, "first", e, s], full[e, s], of[5, "random", e, s]) for e in QUICK for s in (0, 1)
    ]
    assert summary.loc[(5, "first"), "label_robust_score"] == pytest.approx(np.mean(by_hand))
    at_five = evaluation.summary().query("samples_per_class == 5").retention
    assert (np.diff(at_five) <= 0).all()


def test_without_random_cells_there_is_no_label_robust_score(problem, evaluation):
    alone = evaluate(problem, {"first": first_cells}, samples_per_class=[1], seeds=[0], evaluators=["knn"])
    assert alone.summary().label_robust_score.isna().all()
    with pytest.raises(InvalidArgumentError, match="the only method"):
        alone.compare("first")


def test_comparison_is_the_paired_bootstrap_of_the_kept_predictions(problem, evaluation):
    table = evaluation.compare("k-means", n_resamples=200, seed=5)
    assert table[["samples_per_class", "baseline"]].values.tolist() == [
        [1, "random"], [1, "first"], [5, "random"], [5, "first"]
    ]  # fmt: skip
    scores = evaluation.scores.groupby(["samples_per_class", "method"]).retention.mean()
    for row in table.itertuples():
        assert row.difference == pytest.approx(
            scores[row.samples_per_class, "k-means"] - scores[row.samples_per_class, row.baseline]
        )
        assert row.low <= row.high
    runs = {(c.method, c.seed): c for c in evaluation.condensed if c.samples_per_class == 5}
    order = [(s, e) for s in (0, 1) for e in QUICK]
    a, b = ([runs[m, s].predictions[e, "cell_type"] for s, e in order] for m in ("k-means", "first"))
    expected = paired_bootstrap(problem.test.codes, a, b, n_resamples=200, seed=5)
    found = evaluation.compare("k-means", "first", score="macro_f1", n_resamples=200, seed=5).iloc[1]
    assert (found.difference, found.low, found.high) == (expected.difference, expected.low, expected.high)


def test_centroids_beat_single_random_cells(evaluation):
    """Of noisy cells, the mean of a class teaches more than any one of them."""
    row = evaluation.compare("k-means", "random", n_resamples=500).iloc[0]
    assert row.low > 0


def test_full_data_is_trained_on_once(problem, evaluation, monkeypatch):
    small = {"first": first_cells}
    sizes = []
    module = sys.modules[evaluate.__module__]

    monkeypatch.setattr(
        module,
        "predict_test",
        lambda problem, cells, *rest: sizes.append(len(cells)) or np.zeros(len(problem.test), np.int64),
    )
    again = evaluate(problem, small, samples_per_class=[1], seeds=[1], evaluators=["knn"], full=evaluation.full)
    assert sizes == [4]
    pd.testing.assert_frame_equal(
        again.full_scores.reset_index(drop=True),
        evaluation.full_scores.query("evaluator == 'knn'").reset_index(drop=True),
    )


def test_full_data_of_another_split_are_refused(evaluation):
    other = CondensationProblem.from_anndata(labelled_counts(), "cell_type", train_size=0.5, seed=1)
    with pytest.raises(InvalidArgumentError, match="another problem"):
        evaluate(other, ["random"], samples_per_class=[1], seeds=[0], evaluators=["knn"], full=evaluation.full)
    same = CondensationProblem.from_anndata(labelled_counts(), "cell_type", train_size=0.5)
    assert evaluation.full.belongs_to(same)


def test_a_budget_above_a_class_keeps_it_whole_and_says_so(problem):
    found = evaluate(problem, ["random"], samples_per_class=[30], seeds=[0], evaluators=["knn"]).scores.iloc[0]
    sizes = np.bincount(problem.train.codes)
    assert found.n_cells == np.minimum(30, sizes).sum()
    assert found.compression == pytest.approx(sizes.sum() / np.minimum(30, sizes).sum())


def test_tasks_are_judged_each_by_its_own_labels():
    both = CondensationProblem.from_anndata(labelled_counts(), ["cell_type", "condition"], train_size=0.5)
    found = evaluate(both, ["random"], samples_per_class=[5], seeds=[0], evaluators=["logistic"])
    assert found.scores.task.tolist() == ["cell_type", "condition"]
    for task in both.tasks:
        cells = BASELINES["random"].condense(both, 5, 0)
        own = LabelledCells(cells.counts, task.of_class[cells.codes])
        predicted = EVALUATORS["logistic"].fit(own, len(task.names), 0).predict(both.test.expression())
        accuracy = found.scores.set_index("task").accuracy[task.key]
        assert accuracy == (predicted == task.of_class[both.test.codes]).mean()
        assert accuracy > 0.6
    assert set(found.summary().task) == {"cell_type", "condition"}


def test_features_serve_each_task_through_their_encoder():
    """Features that are the expression itself score as the cells do; those of another encoder do not."""
    both = CondensationProblem.from_anndata(labelled_counts(), ["cell_type", "condition"], train_size=0.5)

    def same(problem, samples_per_class, seed):
        cells = first_cells(problem, samples_per_class, seed)
        return Features(cells.expression().toarray(), cells.codes, lambda cells: cells.expression().toarray())

    def reversed_genes(problem, samples_per_class, seed):
        features = same(problem, samples_per_class, seed)
        return Features(features.values, features.codes, lambda cells: features.encode(cells)[:, ::-1])

    methods = {"cells": first_cells, "same": same, "reversed": reversed_genes}
    found = evaluate(both, methods, samples_per_class=[5], seeds=[0], evaluators=QUICK).scores
    columns = ["evaluator", "task", "macro_f1", "retention", "n_cells"]
    of = {name: found.loc[found.method == name, columns].reset_index(drop=True) for name in methods}
    pd.testing.assert_frame_equal(of["cells"], of["same"])
    assert of["reversed"].macro_f1.mean() < of["same"].macro_f1.mean() - 0.2
    assert (found.loc[found.method == "same", "bytes"] == 4 * 60 * of["same"].n_cells[0]).all()


def test_a_problem_without_test_cells_is_refused_before_anything_is_condensed():
    untested = CondensationProblem.from_anndata(labelled_counts(), "cell_type", train_size=0.8, validation_size=0.2)
    assert len(untested.test) == 0
    with pytest.raises(InvalidArgumentError, match="problem has no test cells, .* train_size and validation_size"):
        evaluate(untested, {"never": lambda *args: pytest.fail("condensed")}, seeds=[0], evaluators=["knn"])


def normalised_in_place(problem, samples_per_class, seed):
    cells = first_cells(problem, samples_per_class, seed)
    adata = AnnData(problem.train.counts)
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    return cells


def encoded_in_place(problem, samples_per_class, seed):
    def encode(cells: LabelledCells) -> np.ndarray:
        cells.counts.data *= 2
        return cells.counts.toarray()

    cells = first_cells(problem, samples_per_class, seed)
    return Features(cells.counts.toarray(), cells.codes, encode)


@pytest.mark.parametrize("method", [normalised_in_place, encoded_in_place])
def test_a_method_that_changes_the_problem_is_named_before_others_run(method):
    """AnnData does not copy, so that scanpy works on the problem's own counts."""
    own = CondensationProblem.from_anndata(labelled_counts(), "cell_type", train_size=0.5)
    methods = {"mine": method, "never": lambda *args: pytest.fail("condensed")}
    with pytest.raises(InvalidArgumentError, match="'mine' changed the cells of the problem in place.*a copy"):
        evaluate(own, methods, samples_per_class=[1], seeds=[0], evaluators=["knn"])


def test_a_class_without_test_cells_does_not_count():
    adata = labelled_counts()[:185]
    adata = adata[np.r_[0:180, 184]].copy()
    with pytest.warns(CellstillWarning, match="t3"):
        lone = CondensationProblem.from_anndata(adata, "cell_type")
    found = evaluate(lone, ["random"], samples_per_class=[5], seeds=[0], evaluators=["knn", "logistic"])
    assert np.isfinite(found.scores.retention).all()


def test_progress_is_shown_in_a_terminal_unless_it_is_unwanted(problem, monkeypatch, capsys):
    def shown(**how) -> str:
        evaluate(problem, {"first": first_cells}, samples_per_class=[1], seeds=[0], evaluators=["knn"], **how)
        return capsys.readouterr().err

    assert shown() == ""
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm", "COLUMNS": "100"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("os.isatty", lambda fd: True)
    err = shown()
    assert "all cells, knn" in err
    assert "100%" in err
    assert shown(progress=False) == ""


def test_memory_of_the_method_is_seen(problem):
    def hungry(problem, samples_per_class, seed):
        # Above 32 MiB malloc always asks the system, so memory freed earlier can't serve it.
        held = np.ones(100 * 2**20 // 8)
        time.sleep(0.1)
        assert held.sum() > 0
        return first_cells(problem, samples_per_class, seed)

    found = evaluate(problem, {"hungry": hungry}, samples_per_class=[1], seeds=[0], evaluators=["knn"]).scores
    assert 90 < found.added_mb[0] < 150


def test_figure_shows_each_method_and_evaluator(evaluation):
    figure = evaluation.plot()
    assert [axes.get_title() for axes in figure.axes] == ["mean of 3", *QUICK]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["random", "k-means", "first"]
    drawn = figure.axes[0].containers[0].lines[0].get_ydata().astype(float)
    scores = evaluation.scores.query("method == 'random'").groupby("samples_per_class").retention.mean()
    np.testing.assert_allclose(drawn, scores)
    with pytest.raises(InvalidArgumentError, match="score='nope'"):
        evaluation.plot("nope")


def returns(**changes):
    def method(problem, samples_per_class, seed):
        cells = first_cells(problem, samples_per_class, seed)
        return changes["of"](cells, problem)

    return {"faulty": method}


@pytest.mark.parametrize(
    ("methods", "options", "match"),
    [
        (["nope"], {}, "methods='nope' is not known"),
        ([], {}, "methods is empty"),
        (["random"], {"evaluators": ["svm"]}, "evaluators='svm'"),
        (["random"], {"samples_per_class": [0]}, "samples_per_class=0"),
        (["random"], {"samples_per_class": [2, 2]}, "each once"),
        (["random"], {"seeds": []}, "seeds=.* at least one"),
        (["random"], {"seeds": 3}, r"seeds=3 may be one seed or so many. Give seeds=\[3\] or range\(3\)"),
        (["random"], {"seeds": [-1]}, "seeds=-1 has to be an integer of at least 0"),
        (["random"], {"samples_per_class": "10"}, "samples_per_class='10' has to be an integer"),
        (["random"], {"samples_per_class": [1.5]}, "samples_per_class=1.5 has to be an integer"),
        (["random"], {"trained_with": {"random": ["svm"]}}, "trained_with='svm' is not known"),
        (["random"], {"trained_with": {"zzz": ["knn"]}}, "trained_with='zzz' is not known. Use one of: 'random'"),
        (len, {}, "methods has <built-in function len> under the name <.*'mine': function"),
        ({"five": 5}, {}, "methods has 5 under the name 'five'"),
        ({"few": lambda problem: None}, {}, "under the name 'few'. Give functions of problem, samples per class"),
        ({"x": lambda *args: None}, {}, "'x' returned NoneType. A method has to return LabelledCells"),
        ({"x": lambda *args: labelled_counts()}, {}, "'x' returned AnnData. A method has to return LabelledCells"),
        (returns(of=lambda cells, p: cells[:2]), {}, "'faulty' returned .* one category of 'cell_type' only, 't0'"),
        (returns(of=lambda cells, p: LabelledCells(cells.counts[:, :5], cells.codes)), {}, "'faulty' returned 5 genes"),
        (returns(of=lambda cells, p: p.train), {}, "allows 1 to 8"),
        (returns(of=lambda cells, p: cells[np.arange(0)]), {}, "returned 0 cells"),
        (returns(of=lambda cells, p: LabelledCells(cells.counts, cells.codes + 1)), {}, "outside 0 .. 3"),
        (returns(of=lambda cells, p: Features(np.eye(9), np.arange(9) % 4, len)), {}, "returned 9 cells"),
        (
            returns(of=lambda cells, p: Features(np.eye(4), np.arange(4), lambda cells: cells.counts.toarray())),
            {},
            r"encoder gives shape \(\d+, 60\) of \d+ cells, 0 values not finite; values has 4 features",
        ),
    ],
    ids=[
        "unknown_method", "no_method", "unknown_evaluator", "no_cells", "budget_twice", "no_seeds",
        "seeds_or_how_many", "seed_below_0", "budget_text", "budget_fraction", "unknown_trained_with",
        "trained_with_of_no_method", "function_without_name", "no_function", "other_arguments", "none", "anndata",
        "one_class", "other_genes", "over_budget", "nothing", "unknown_class",
        "features_over_budget", "features_of_another_encoder",
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_all_cells_are_trained_on(problem, methods, options, match, monkeypatch):
    monkeypatch.setattr(sys.modules[evaluate.__module__], "train_full", lambda *args: pytest.fail("too late"))
    with pytest.raises(InvalidArgumentError, match=match):
        evaluate(problem, methods, **{"samples_per_class": [2], "seeds": [0], "evaluators": ["knn"], **options})


def test_one_of_each_may_stand_for_a_list(problem):
    alone = evaluate(
        problem, "random", samples_per_class=2, seeds=[0], evaluators="knn", trained_with={"random": "knn"}
    )
    listed = evaluate(problem, ["random"], samples_per_class=[2], seeds=range(1), evaluators=["knn"])
    columns = ["method", "samples_per_class", "seed", "evaluator", "macro_f1", "retention"]
    pd.testing.assert_frame_equal(alone.scores[columns], listed.scores[columns])
    assert alone.trained_with == {"random": ("knn",)}


def test_encoders_of_features_may_give_tensors_and_have_to_take_cells(problem):
    cells = first_cells(problem, 1, 0)
    wanted = cells.expression().toarray()
    features = Features(
        wanted, cells.codes, lambda cells: torch.tensor(cells.expression().toarray(), requires_grad=True)
    )
    np.testing.assert_array_equal(features.encode(cells), wanted)
    for encoder in (lambda: None, None):
        with pytest.raises(InvalidArgumentError, match="encoder=.* cannot be called with cells"):
            Features(wanted, cells.codes, encoder)
