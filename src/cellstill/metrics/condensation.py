"""How much of what real cells teach a classifier is left in a few synthetic ones."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from cellstill.errors import InvalidArgumentError


@dataclass(frozen=True)
class ClassificationScores:
    """Scores of predicted classes, each between 0 and 1, means over the classes that have test cells.

    Attributes
    ----------
    accuracy
        Share of cells whose class is found.
    balanced_accuracy
        Mean of the recalls of the classes.
    macro_f1
        Mean of their F1 scores, :math:`2 TP / (2 TP + FP + FN)`.
    rare_recall
        Mean recall of the rarest quarter of them (:func:`rarest_classes`).
    """

    accuracy: float
    balanced_accuracy: float
    macro_f1: float
    rare_recall: float


def classification_scores(
    truth: ArrayLike, predicted: ArrayLike, class_sizes: ArrayLike | None = None
) -> ClassificationScores:
    """Score predicted classes.

    Parameters
    ----------
    truth, predicted
        Codes of test cells, shape ``(n,)``. A predicted class without test cells counts as an error of the class
        that it should have been, and has no score of its own.
    class_sizes
        Cells of each class by which rarity is judged, usually those of training, ``(n_classes,)``; by default of test.

    Raises
    ------
    InvalidArgumentError
        No cells, codes that are not whole numbers from 0, or shapes that differ.
    """
    y, found = _codes(truth, predicted)
    n_classes = _n_classes(y, found)
    sizes = np.bincount(y, minlength=n_classes) if class_sizes is None else np.asarray(class_sizes)
    if sizes.ndim != 1 or len(sizes) <= y.max():
        raise InvalidArgumentError(f"class_sizes has shape {sizes.shape}; {y.max() + 1} classes have test cells.")
    present = np.unique(y)
    support = np.bincount(y, minlength=n_classes)[present]
    recall = np.bincount(y[y == found], minlength=n_classes)[present] / support
    rare = np.isin(present, rarest_classes(np.where(np.isin(np.arange(len(sizes)), present), sizes, -1)))
    return ClassificationScores(
        accuracy=float((y == found).mean()),
        balanced_accuracy=float(recall.mean()),
        macro_f1=float(_macro_f1(np.ones((1, len(y))), y, found)[0]),
        rare_recall=float(recall[rare].mean()),
    )


def rarest_classes(class_sizes: ArrayLike, share: float = 0.25) -> np.ndarray:
    """Codes of the rarest classes: a quarter of them, rounded up, and all that are as rare as the last of these.

    Parameters
    ----------
    class_sizes
        Cells of each class, shape ``(n_classes,)``; classes of negative size do not take part.
    share
        Of the classes, above 0 and up to 1.
    """
    sizes = np.asarray(class_sizes)
    counted = np.sort(sizes[sizes >= 0])
    if not 0 < share <= 1 or not len(counted):
        raise InvalidArgumentError(f"share={share} has to be above 0 and up to 1, of at least one class.")
    largest = counted[int(np.ceil(share * len(counted))) - 1]
    return np.flatnonzero((sizes >= 0) & (sizes <= largest))


def retention(score: float, full: float) -> float:
    """Score of a classifier trained on condensed cells as a share of what it reaches with all cells; NaN of 0.

    1 says that nothing is lost; above 1, that the condensed cells teach it better. A classifier that is poor on all
    cells is easily retained: compare with the best classifier on all cells as well.
    """
    return score / full if full > 0 else float("nan")


def label_robust_score(
    accuracy: float, full: float, random: float, *, accuracy_any: float | None = None, weight: float = 0.5
) -> float:
    r"""DD-Ranking's label-robust score, between 0 and 1 (Li et al. 2025, arXiv:2505.13300).

    .. math:: \frac{e^\alpha - e^{-1}}{e - e^{-1}}, \qquad \alpha = w \, \text{IOR} - (1 - w) \, \text{HLR}

    with the gap to all real data under hard labels :math:`\text{HLR} = a_\text{full} - a`, and the improvement over as
    many random real cells under the labels that the method uses :math:`\text{IOR} = a_\text{any} - a_\text{random}`.
    A method that loses nothing where random cells lose nothing either scores 0.269.

    Parameters
    ----------
    accuracy, full
        Accuracies after training on the condensed cells and on all cells, with hard labels.
    random
        Accuracy after training on as many random cells per class, labelled as for ``accuracy_any``.
    accuracy_any
        Accuracy with the labels of the method's choice, such as soft ones; ``accuracy`` if these are hard.
    weight
        :math:`w`, between 0 and 1: larger asks more for being better than random, smaller for being as good as all.
    """
    accuracy_any = accuracy if accuracy_any is None else accuracy_any
    given = {"accuracy": accuracy, "full": full, "random": random, "accuracy_any": accuracy_any, "weight": weight}
    for name, value in given.items():
        if not 0 <= value <= 1:
            raise InvalidArgumentError(f"{name}={value} has to be between 0 and 1.")
    alpha = weight * (accuracy_any - random) - (1 - weight) * (full - accuracy)
    return float((np.exp(alpha) - np.exp(-1)) / (np.e - np.exp(-1)))


def cross_architecture_gap(scores: Mapping[str, float], seen: Collection[str]) -> float:
    """Mean score of the classifiers of the kind that a method trained with, minus the mean of all others.

    Positive where the condensed cells suit those they were made with better than others; 0 is best, and a negative gap
    says that others gain as much.

    Parameters
    ----------
    scores
        Retention, or another score, of each classifier.
    seen
        Those the method trained with: some of ``scores``, not all.
    """
    inside = [score for name, score in scores.items() if name in seen]
    outside = [score for name, score in scores.items() if name not in seen]
    if not inside or not outside:
        raise InvalidArgumentError(
            f"seen={sorted(seen)} has to be some, not all, of the classifiers with scores: {', '.join(scores)}."
        )
    return float(np.mean(inside) - np.mean(outside))


@dataclass(frozen=True)
class BootstrapInterval:
    """A difference and how far other test cells might have moved it.

    Attributes
    ----------
    difference
        On the test cells as they are.
    low, high
        Percentile interval.
    level
        Its nominal coverage.
    """

    difference: float
    low: float
    high: float
    level: float


def paired_bootstrap(
    truth: ArrayLike,
    predicted: ArrayLike,
    baseline: ArrayLike,
    *,
    full: ArrayLike | None = None,
    baseline_full: ArrayLike | None = None,
    n_resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> BootstrapInterval:
    """Bootstrap the difference in macro-F1 or retention of two methods over the test cells.

    Each resample draws test cells with replacement, the same for both methods, all classifiers and all seeds, whose
    scores are then averaged. A class that no cell was drawn of is left out of that resample's mean. What other training
    cells or seeds would have changed is not in the interval.

    Parameters
    ----------
    truth
        Codes of test cells, shape ``(n,)``.
    predicted, baseline
        Predicted codes of the two methods, ``(n,)``, or one row per classifier and seed, ``(k, n)`` and ``(m, n)``.
    full, baseline_full
        Predictions of the same classifiers and seeds trained on all cells, of the same shapes: the difference is then
        in retention. ``baseline_full`` is ``full`` by default.
    n_resamples
        More of them steady the ends of the interval and take longer.
    level
        Share of the resamples inside the interval.
    seed
        Of the draws.

    Returns
    -------
    BootstrapInterval
        ``predicted`` minus ``baseline``: above 0 as a whole where the method is better.
    """
    if n_resamples < 1 or not 0 < level < 1:
        raise InvalidArgumentError(f"n_resamples={n_resamples} has to be 1 or more, and level={level} within 0 and 1.")
    y, a, b = (np.asarray(codes) for codes in (truth, predicted, baseline))
    if full is None and baseline_full is not None:
        raise InvalidArgumentError("baseline_full needs full, the same for the method.")
    full_b = full if baseline_full is None else baseline_full
    _codes(y, y)
    draws = np.random.default_rng(seed).multinomial(len(y), np.full(len(y), 1 / len(y)), size=n_resamples)
    weights = np.concatenate([np.ones((1, len(y))), draws])
    scores = mean_macro_f1(weights, y, a, full) - mean_macro_f1(weights, y, b, full_b)
    low, high = np.quantile(scores[1:], [(1 - level) / 2, (1 + level) / 2])
    return BootstrapInterval(float(scores[0]), float(low), float(high), level)


def mean_macro_f1(weights: np.ndarray, y: np.ndarray, found: np.ndarray, full: ArrayLike | None) -> np.ndarray:
    """Macro-F1 under several weightings of the cells, mean over predictions; of ``full``'s, where it is given.

    Parameters
    ----------
    weights
        How often each cell counts, ``(n_resamples, n)``.
    y, found, full
        True codes ``(n,)``; predictions ``(n,)`` or ``(n_predictions, n)``; those of which the result is a share.

    Returns
    -------
    Shape ``(n_resamples,)``.
    """
    rows = np.atleast_2d(found)
    scores = np.stack([_macro_f1(weights, *_codes(y, row)) for row in rows])
    if full is None:
        return scores.mean(axis=0)
    references = np.atleast_2d(np.asarray(full))
    if references.shape != rows.shape:
        raise InvalidArgumentError(f"full has shape {references.shape}; it needs the predictions' {rows.shape}.")
    reached = np.stack([_macro_f1(weights, *_codes(y, row)) for row in references])
    return np.divide(scores, reached, out=np.full_like(scores, np.nan), where=reached > 0).mean(axis=0)


def _macro_f1(weights: np.ndarray, y: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Macro-F1 with each cell counted ``weights`` times, over the classes that have cells: ``(n_resamples,)``."""
    classes = np.arange(_n_classes(y, found))
    true, guess = (y[:, None] == classes).astype(np.float64), (found[:, None] == classes).astype(np.float64)
    actual, claimed, hit = weights @ true, weights @ guess, weights @ (true * guess)
    present = actual > 0
    f1 = np.divide(2 * hit, actual + claimed, out=np.zeros_like(hit), where=present)
    return f1.sum(axis=1) / present.sum(axis=1)


def _n_classes(y: np.ndarray, found: np.ndarray) -> int:
    return int(max(y.max(), found.max())) + 1


def _codes(truth: ArrayLike, predicted: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    y, found = np.asarray(truth), np.asarray(predicted)
    if y.ndim != 1 or not len(y) or y.shape != found.shape:
        raise InvalidArgumentError(
            f"truth has shape {y.shape} and predicted {found.shape}; both need one code for each of at least one cell."
        )
    for name, codes in (("truth", y), ("predicted", found)):
        if codes.dtype.kind not in "iu" or codes.min() < 0:
            raise InvalidArgumentError(f"{name} has to hold codes, whole numbers from 0; found {codes.dtype}.")
    return y, found
