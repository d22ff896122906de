from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, recall_score

from cellstill.errors import InvalidArgumentError
from cellstill.metrics.condensation import (
    classification_scores,
    cross_architecture_gap,
    label_robust_score,
    paired_bootstrap,
    rarest_classes,
    retention,
)


def codes_of(n: int, share_wrong: float, seed: int, weights=(0.6, 0.25, 0.1, 0.05)) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    truth = rng.choice(len(weights), n, p=weights)
    wrong = rng.random(n) < share_wrong
    return truth, np.where(wrong, rng.integers(len(weights), size=n), truth)


@pytest.mark.parametrize("seed", range(3))
def test_scores_are_those_of_scikit_learn(seed):
    truth, found = codes_of(300, 0.3, seed)
    scores = classification_scores(truth, found)
    assert scores.accuracy == pytest.approx(accuracy_score(truth, found))
    assert scores.balanced_accuracy == pytest.approx(balanced_accuracy_score(truth, found))
    assert scores.macro_f1 == pytest.approx(f1_score(truth, found, average="macro"))
    assert scores.rare_recall == pytest.approx(recall_score(truth, found, labels=[3], average="macro"))


def test_a_class_without_test_cells_has_no_score_but_costs_those_it_was_taken_for():
    truth, found = np.array([0, 0, 2, 2]), np.array([0, 1, 2, 2])
    scores = classification_scores(truth, found, class_sizes=[10, 1, 5])
    assert scores.macro_f1 == pytest.approx(f1_score(truth, found, labels=[0, 2], average="macro"))
    assert scores.macro_f1 == pytest.approx((2 / 3 + 1) / 2)
    assert scores.rare_recall == 1.0, "class 1 is rarer, but has no test cells; of the others, class 2 is"


def test_rarity_is_judged_by_the_sizes_given():
    truth, found = np.array([0, 0, 0, 1]), np.array([0, 0, 1, 1])
    assert classification_scores(truth, found).rare_recall == 1.0
    assert classification_scores(truth, found, [3, 30]).rare_recall == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([9, 1, 5, 7], [1]),
        ([9, 1, 5, 7, 2], [1, 4]),
        ([4, 1, 1, 7], [1, 2]),
        ([3], [0]),
        ([5, -1, 9], [0]),
    ],
    ids=["quarter", "rounded_up", "ties_all_in", "one_class", "class_left_out"],
)
def test_rarest_quarter(sizes, expected):
    assert rarest_classes(sizes).tolist() == expected


def test_retention():
    assert retention(0.6, 0.8) == pytest.approx(0.75)
    assert math.isnan(retention(0.0, 0.0))


def test_label_robust_score_at_its_ends_and_by_hand():
    assert label_robust_score(1, 1, 0) == pytest.approx((math.exp(0.5) - math.exp(-1)) / (math.e - math.exp(-1)))
    assert label_robust_score(1, 0, 0, weight=1) == pytest.approx(1)
    assert label_robust_score(0, 1, 1, weight=1, accuracy_any=0) == pytest.approx(0)
    assert label_robust_score(0.9, 0.9, 0.9) == pytest.approx(0.26894142)
    alpha = 0.25 * (0.8 - 0.5) - 0.75 * (0.9 - 0.7)
    expected = (math.exp(alpha) - math.exp(-1)) / (math.e - math.exp(-1))
    assert label_robust_score(0.7, 0.9, 0.5, accuracy_any=0.8, weight=0.25) == pytest.approx(expected)


def test_cross_architecture_gap():
    scores = {"mlp": 0.9, "cnn": 0.8, "knn": 0.7}
    assert cross_architecture_gap(scores, ["mlp"]) == pytest.approx(0.15)
    assert cross_architecture_gap(scores, ["mlp", "cnn"]) == pytest.approx(0.15)
    assert cross_architecture_gap(scores, ["knn"]) == pytest.approx(-0.15)
    for seen in ([], list(scores), ["svm"]):
        with pytest.raises(InvalidArgumentError, match="mlp, cnn, knn"):
            cross_architecture_gap(scores, seen)


def test_bootstrap_is_that_of_a_loop_over_resamples():
    truth, a = codes_of(60, 0.2, 0)
    _, b = codes_of(60, 0.4, 0)
    full = truth.copy()
    full[:4] = 0
    found = paired_bootstrap(truth, np.stack([a, b]), b, full=np.stack([full, full]), baseline_full=full)

    def score(rows, predicted):
        labels = np.unique(truth[rows])
        of = [
            f1_score(truth[rows], p[rows], labels=labels, average="macro", zero_division=0) for p in (predicted, full)
        ]
        return of[0] / of[1]

    def difference(rows):
        return (score(rows, a) + score(rows, b)) / 2 - score(rows, b)

    assert found.difference == pytest.approx(difference(np.arange(60)))
    draws = np.random.default_rng(0).multinomial(60, np.full(60, 1 / 60), size=2000)[:200]
    by_loop = np.array([difference(np.repeat(np.arange(60), draw)) for draw in draws])
    few = paired_bootstrap(truth, np.stack([a, b]), b, full=np.stack([full, full]), baseline_full=full, n_resamples=200)
    assert (few.low, few.high) == pytest.approx(tuple(np.quantile(by_loop, [0.025, 0.975])))


def test_bootstrap_interval_covers_the_true_difference_and_pairing_narrows_it():
    """Of two classifiers with known error rates, about 95 % of the intervals hold the difference of a huge test set."""
    weights = (0.5, 0.3, 0.2)

    def predictions(n, seed):
        rng = np.random.default_rng(seed)
        truth = rng.choice(3, n, p=weights)
        hard = rng.random(n)
        guess = rng.integers(3, size=n)
        return truth, np.where(hard < 0.15, guess, truth), np.where(hard < 0.30, guess, truth)

    truth, a, b = predictions(400_000, 99)
    expected = f1_score(truth, a, average="macro") - f1_score(truth, b, average="macro")
    inside = 0
    for seed in range(100):
        interval = paired_bootstrap(*predictions(200, seed), n_resamples=300, seed=seed)
        inside += interval.low <= expected <= interval.high
    assert 87 <= inside <= 100
    truth, a, b = predictions(200, 0)
    paired = paired_bootstrap(truth, a, b)
    alone = paired_bootstrap(truth, a, np.zeros_like(a))
    assert paired.low > 0
    assert paired.high - paired.low < alone.high - alone.low


def test_bootstrap_of_a_method_against_itself_is_zero_and_seeded():
    truth, a = codes_of(80, 0.3, 1)
    same = paired_bootstrap(truth, a, a)
    assert (same.difference, same.low, same.high) == (0, 0, 0)
    _, b = codes_of(80, 0.5, 1)
    assert paired_bootstrap(truth, a, b, seed=3) == paired_bootstrap(truth, a, b, seed=3)
    assert paired_bootstrap(truth, a, b, seed=3) != paired_bootstrap(truth, a, b, seed=4)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: classification_scores([], []), "at least one cell"),
        (lambda: classification_scores([0, 1], [0]), r"shape \(2,\)"),
        (lambda: classification_scores([0, 1], [0.0, 1.0]), "whole numbers"),
        (lambda: classification_scores([0, -1], [0, 1]), "truth has to hold codes"),
        (lambda: classification_scores([0, 2], [0, 1], [3, 3]), "class_sizes"),
        (lambda: label_robust_score(90, 0.9, 0.5), "accuracy=90"),
        (lambda: rarest_classes([1, 2], share=0), "share=0"),
        (lambda: paired_bootstrap([0, 1], [0, 1], [0, 1], level=95), "level=95"),
        (lambda: paired_bootstrap([], [], []), "at least one cell"),
        (lambda: paired_bootstrap([0, 1], [0, 1], [[0, 1]], full=[[0, 1], [0, 1]]), "full has shape"),
        (lambda: paired_bootstrap([0, 1], [0, 1], [0, 1], baseline_full=[0, 1]), "needs full"),
    ],
    ids=[
        "no_cells",
        "lengths",
        "not_codes",
        "negative_code",
        "too_few_sizes",
        "percent",
        "no_share",
        "level_in_percent",
        "bootstrap_of_nothing",
        "full_of_another_shape",
        "one_full_only",
    ],
)
def test_bad_input_is_refused(call, match):
    with pytest.raises(InvalidArgumentError, match=match):
        call()
