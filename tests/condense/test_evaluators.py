from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from cellstill.condense.cells import Features, LabelledCells
from cellstill.condense.evaluators import EVALUATORS, get_evaluators
from cellstill.errors import InvalidArgumentError

NAMES = ("logistic", "mlp_small", "mlp_large", "cnn", "knn", "forest")


def cells_of(n_per_class: int, n_classes: int = 3, n_vars: int = 90, seed: int = 0) -> LabelledCells:
    """Poisson counts of classes that differ in ten genes each."""
    rng = np.random.default_rng(seed)
    codes = np.repeat(np.arange(n_classes), n_per_class)
    rate = np.full((n_classes, n_vars), 0.5)
    for code in range(n_classes):
        rate[code, 10 * code : 10 * code + 10] = 6.0
    return LabelledCells(sp.csr_matrix(rng.poisson(rate[codes]).astype(np.float32)), codes.astype(np.int64))


@pytest.fixture(scope="module")
def test_cells() -> LabelledCells:
    return cells_of(40, seed=9)


def test_the_six_are_there_in_order():
    assert tuple(EVALUATORS) == NAMES
    assert [evaluator.name for evaluator in get_evaluators()] == list(NAMES)
    assert [evaluator.name for evaluator in get_evaluators(["knn", "cnn"])] == ["knn", "cnn"]


@pytest.mark.parametrize("n_per_class", [1, 30], ids=["one_cell_per_class", "many_cells"])
@pytest.mark.parametrize("name", NAMES)
def test_learns_its_training_cells_and_beats_chance(name, n_per_class, test_cells):
    train = cells_of(n_per_class)
    fitted = EVALUATORS[name].fit(train, 3, seed=1)
    assert (fitted.predict(train.expression()) == train.codes).mean() >= 0.95
    accuracy = (fitted.predict(test_cells.expression()) == test_cells.codes).mean()
    assert accuracy >= (0.6 if n_per_class == 1 else 0.95)


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_probabilities_and_the_callers_random_state_is_untouched(name, test_cells):
    train, new = cells_of(5), test_cells.expression()
    before = torch.get_rng_state()
    first = EVALUATORS[name].fit(train, 3, seed=4).predict_proba(new)
    assert torch.equal(torch.get_rng_state(), before)
    np.random.seed(0)  # noqa: NPY002 -- the global state must not matter
    assert np.array_equal(first, EVALUATORS[name].fit(train, 3, seed=4).predict_proba(new))
    other = EVALUATORS[name].fit(train, 3, seed=5).predict_proba(new)
    assert np.array_equal(first, other) == (name in ("logistic", "knn"))


@pytest.mark.parametrize("name", NAMES)
def test_a_class_without_cells_gets_no_probability_and_keeps_its_code(name, test_cells):
    train = cells_of(10)
    train = train[train.codes != 1]
    proba = EVALUATORS[name].fit(train, 4).predict_proba(test_cells.expression())
    assert proba.shape == (120, 4)
    assert (proba[:, [1, 3]] == 0).all()
    np.testing.assert_allclose(proba.sum(axis=1), 1, rtol=1e-6)
    assert set(proba.argmax(axis=1)) == {0, 2}


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("logistic", LogisticRegression(max_iter=1000)),
        ("knn", KNeighborsClassifier(5, algorithm="brute")),
        ("forest", RandomForestClassifier(200, random_state=3)),
    ],
)
def test_agrees_with_scikit_learn_on_log_normalised_counts(name, model, test_cells):
    train = cells_of(20)
    counts, new = (cells.counts.toarray().astype(np.float64) for cells in (train, test_cells))
    x, y = (np.log1p(1e4 * c / c.sum(axis=1, keepdims=True)).astype(np.float32) for c in (counts, new))
    expected = model.fit(x, train.codes).predict_proba(y)
    found = EVALUATORS[name].fit(train, 3, seed=3).predict_proba(test_cells.expression())
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_knn_votes_with_as_many_as_a_class_has(test_cells):
    new = test_cells.expression()
    one = EVALUATORS["knn"].fit(cells_of(1), 3).predict_proba(new)
    assert set(np.unique(one)) == {0.0, 1.0}
    assert set(np.unique(EVALUATORS["knn"].fit(cells_of(2), 3).predict_proba(new))) == {0.0, 0.5, 1.0}
    many = EVALUATORS["knn"].fit(cells_of(50), 3).predict_proba(new)
    np.testing.assert_allclose(many * 5, np.round(many * 5), atol=1e-9)


@pytest.mark.parametrize("n_vars", [3, 64, 2000], ids=["few_genes", "as_wide_as_padding", "many_genes"])
def test_networks_take_any_number_of_genes(n_vars):
    rng = np.random.default_rng(0)
    cells = LabelledCells(sp.csr_matrix(rng.poisson(2.0, (6, n_vars)).astype(np.float32)), np.arange(6) % 2)
    for name in ("mlp_small", "mlp_large", "cnn"):
        assert EVALUATORS[name].fit(cells, 2).predict_proba(cells.expression().toarray()).shape == (6, 2)


def test_depth_and_expected_counts_do_not_matter(test_cells):
    """What is seen is the composition of a cell: counts may be scaled, and need not be whole."""
    train, new = cells_of(10), test_cells.expression()
    scaled = LabelledCells(sp.csr_matrix(train.counts * np.float32(0.25)), train.codes)
    for name in ("logistic", "mlp_small"):
        found = [EVALUATORS[name].fit(cells, 3).predict_proba(new) for cells in (train, scaled)]
        np.testing.assert_allclose(*found, atol=1e-3)


def test_no_new_cells_give_no_predictions():
    for name in ("logistic", "mlp_small", "forest"):
        fitted = EVALUATORS[name].fit(cells_of(3), 3)
        assert fitted.predict(sp.csr_matrix((0, 90), dtype=np.float32)).shape == (0,)


def bad(**changes) -> LabelledCells:
    cells = cells_of(2)
    return LabelledCells(changes.get("counts", cells.counts), changes.get("codes", cells.codes))


@pytest.mark.parametrize(
    ("cells", "match"),
    [
        (bad(codes=np.zeros(6, np.int64)), "at least two"),
        (bad(codes=np.array([0, 0, 1, 1, 2, 3])), "between 0 and 2"),
        (bad(codes=np.array([0, 0, 1, 1, 2, -1])), "between 0 and 2"),
        (bad(counts=-cells_of(2).counts), "negative"),
        (bad(counts=cells_of(2).counts * np.float32(np.nan)), "NaN"),
        (cells_of(2)[np.arange(0)], "0 cells of 0 classes"),
    ],
    ids=["one_class", "code_too_large", "negative_code", "negative_counts", "nan", "no_cells"],
)
def test_bad_cells_are_refused(cells, match):
    with pytest.raises(InvalidArgumentError, match=match):
        EVALUATORS["logistic"].fit(cells, 3)


def features_of(values: np.ndarray, codes: np.ndarray) -> Features:
    return Features(values, codes, lambda cells: np.zeros((len(cells), values.shape[1])))


def test_features_are_learned_as_they_are():
    """They may be negative, and are not log-normalised: of the cells' expression they are the cells."""
    train, new = cells_of(5), cells_of(4, seed=1).expression()
    for name in ("logistic", "mlp_small", "forest"):
        of_cells = EVALUATORS[name].fit(train, 3, seed=2).predict_proba(new)
        of_features = EVALUATORS[name].fit(features_of(train.expression().toarray(), train.codes), 3, seed=2)
        assert np.array_equal(of_features.predict_proba(new), of_cells)
    points = np.repeat([[-3.0, 0.0], [3.0, 0.0], [0.0, -3.0]], 4, axis=0)
    fitted = EVALUATORS["knn"].fit(features_of(points, np.repeat(np.arange(3), 4)), 3)
    assert fitted.predict(np.array([[-2.0, 0.0], [2.0, 0.0], [0.0, -2.0]])).tolist() == [0, 1, 2]
    with pytest.raises(InvalidArgumentError, match="at least two"):
        EVALUATORS["knn"].fit(features_of(points, np.zeros(12, np.int64)), 3)


def test_bad_calls_are_refused():
    with pytest.raises(InvalidArgumentError, match="evaluators='svm' is not known"):
        get_evaluators(["knn", "svm"])
    for names in ([], ["knn", "knn"]):
        with pytest.raises(InvalidArgumentError, match="each once"):
            get_evaluators(names)
    with pytest.raises(InvalidArgumentError, match="trained on 90 genes"):
        EVALUATORS["knn"].fit(cells_of(2), 3).predict(np.zeros((4, 80)))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", EVALUATORS)
def test_one_cell_of_each_of_many_classes_is_no_reason_to_warn(name):
    counts = sp.csr_matrix(np.eye(30, 70, dtype=np.float32) + 1)
    EVALUATORS[name].fit(LabelledCells(counts, np.arange(30)), 30).predict(counts)
