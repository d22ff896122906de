r"""Six classifiers that judge condensed cells by what can be learned from them.

All see the same dense matrix, :math:`\log(1 + 10^4 x / l)` of
:meth:`~cellstill.condense.cells.LabelledCells.expression`, without scaling of genes; only a method that makes features
in place of cells has them see those. Each has one setting for four synthetic cells and for thousands of real ones; hard
labels. They run on the CPU, and repeat themselves for the same cells, seed and number of threads.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch
from torch import nn

from cellstill.condense.cells import Features, LabelledCells
from cellstill.errors import InvalidArgumentError, check_option
from cellstill.train.fit import seeded

N_STEPS = 300
"""Optimisation steps of each network, whatever it is trained on."""

BATCH_SIZE = 128
"""Cells in each step; all of them, where there are fewer."""

LEARNING_RATE = 1e-3
"""Of Adam, constant."""

N_NEIGHBORS = 5
"""Voters of the kNN classifier, where every class has so many cells on average."""

N_TREES = 200
"""Trees of the random forest."""

Classify = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True, eq=False)
class FittedEvaluator:
    """A trained classifier.

    Attributes
    ----------
    name
        Its name in :data:`EVALUATORS`.
    n_vars, n_classes
        Genes, or features, that it expects, and classes that it tells apart.
    classify
        From dense expression to probabilities; called by :meth:`predict_proba`.
    """

    name: str
    n_vars: int
    n_classes: int
    classify: Classify

    def predict_proba(self, expression: sp.csr_matrix | np.ndarray) -> np.ndarray:
        """Probabilities of the classes, float64, shape ``(n, n_classes)``; 0 for a class that had no training cells.

        Parameters
        ----------
        expression
            Of :meth:`~cellstill.condense.cells.LabelledCells.expression`, sparse or dense, ``(n, n_vars)``.
        """
        dense = _dense(expression)
        if dense.ndim != 2 or dense.shape[1] != self.n_vars:
            raise InvalidArgumentError(
                f"expression has shape {dense.shape}; {self.name!r} was trained on {self.n_vars} genes."
            )
        return self.classify(dense)

    def predict(self, expression: sp.csr_matrix | np.ndarray) -> np.ndarray:
        """Most probable class of each cell, int64, shape ``(n,)``; the first of several that are equally probable."""
        return self.predict_proba(expression).argmax(axis=1).astype(np.int64)


@dataclass(frozen=True)
class Evaluator:
    """A kind of classifier.

    Attributes
    ----------
    name
        In the registry and in tables.
    label
        In figures.
    train
        From dense expression ``(n, n_vars)``, codes ``(n,)``, number of classes and seed to :data:`Classify`.
    """

    name: str
    label: str
    train: Callable[[np.ndarray, np.ndarray, int, int], Classify]

    def fit(self, cells: LabelledCells | Features, n_classes: int, seed: int = 0) -> FittedEvaluator:
        """Train on cells, real or synthetic, or on features in their place.

        Parameters
        ----------
        cells
            At least two classes of them. What the classifier expects of other cells is their ``encode``.
        n_classes
            Classes there are, of which some may have no cell here.
        seed
            Of first weights, minibatches and trees; logistic regression and kNN draw no random numbers.

        Raises
        ------
        InvalidArgumentError
            Fewer than two classes, codes outside ``0 .. n_classes - 1``, or counts that are negative or not finite.
        """
        _check(cells.codes, n_classes)
        if isinstance(cells, LabelledCells):
            values = cells.counts.data
            if not np.isfinite(values).all() or (values < 0).any():
                raise InvalidArgumentError(
                    "counts has negative values, NaN or infinity. Give counts, or expectations of them."
                )
        matrix = _dense(cells.expression() if isinstance(cells, LabelledCells) else cells.values)
        with warnings.catch_warnings():
            # scikit-learn takes few cells of many classes for a regression.
            warnings.filterwarnings("ignore", "The number of unique classes is greater than 50%")
            classify = self.train(matrix, cells.codes, n_classes, seed)
        return FittedEvaluator(self.name, matrix.shape[1], n_classes, classify)


def get_evaluators(names: str | Iterable[str] | None = None, argument: str = "evaluators") -> list[Evaluator]:
    """Evaluators by their names, or one by its name, in that order; all of :data:`EVALUATORS` by default."""
    names = list(EVALUATORS) if names is None else [names] if isinstance(names, str) else list(names)
    for name in names:
        check_option(argument, name, EVALUATORS)
    if not names or len(set(names)) < len(names):
        raise InvalidArgumentError(f"{argument}={names} has to name at least one, each once: {', '.join(EVALUATORS)}.")
    return [EVALUATORS[name] for name in names]


def small_mlp(n_vars: int, n_classes: int) -> nn.Module:
    """One hidden layer of 64, ReLU."""
    return nn.Sequential(nn.Linear(n_vars, 64), nn.ReLU(), nn.Linear(64, n_classes))


def large_mlp(n_vars: int, n_classes: int) -> nn.Module:
    """Hidden layers of 512 and 256, ReLU."""
    return nn.Sequential(nn.Linear(n_vars, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, n_classes))


def cnn(n_vars: int, n_classes: int) -> nn.Module:
    """Two convolutions along the genes in their given order, and a linear head.

    16 channels each, widths 16 and 8, strides 8 and 4, ReLU. Fewer than 64 genes are padded with zeros.
    """
    width = max(n_vars, 64)
    first = (width - 16) // 8 + 1
    second = (first - min(8, first)) // 4 + 1
    return nn.Sequential(
        nn.ConstantPad1d((0, width - n_vars), 0.0),
        nn.Unflatten(1, (1, width)),
        nn.Conv1d(1, 16, 16, stride=8),
        nn.ReLU(),
        nn.Conv1d(16, 16, min(8, first), stride=4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * second, n_classes),
    )


def train_network(build: Callable[[int, int], nn.Module]) -> Callable[[np.ndarray, np.ndarray, int, int], Classify]:
    """What an evaluator trains of a network: :data:`N_STEPS` steps of Adam on cross-entropy.

    Minibatches are drawn without replacement.

    Parameters
    ----------
    build
        From the numbers of genes and of classes to a network with fresh weights.
    """

    def train(expression: np.ndarray, codes: np.ndarray, n_classes: int, seed: int) -> Classify:
        x, y = torch.from_numpy(expression), torch.from_numpy(codes.astype(np.int64))
        batch_size = min(BATCH_SIZE, len(x))
        with seeded(seed, "cpu"):
            network = build(x.shape[1], n_classes)
            passes = math.ceil(N_STEPS * batch_size / len(x))
            order = torch.cat([torch.randperm(len(x)) for _ in range(passes)])
        optimiser = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE, fused=True)
        for rows in order[: N_STEPS * batch_size].split(batch_size):
            optimiser.zero_grad(set_to_none=True)
            nn.functional.cross_entropy(network(x[rows]), y[rows]).backward()
            optimiser.step()
        network.eval()
        absent = torch.from_numpy(np.bincount(codes, minlength=n_classes) == 0)

        @torch.no_grad()
        def classify(new: np.ndarray) -> np.ndarray:
            logits = torch.cat(
                [network(part) for part in torch.from_numpy(new).split(1024)] or [x.new_empty(0, n_classes)]
            )
            return logits.double().masked_fill(absent, -torch.inf).softmax(dim=1).numpy()

        return classify

    return train


def _logistic(expression: np.ndarray, codes: np.ndarray, n_classes: int, seed: int) -> Classify:
    """Multinomial, scikit-learn's defaults (L2 penalty, C = 1, L-BFGS), up to 1,000 iterations."""
    from sklearn.linear_model import LogisticRegression

    return _probabilities(LogisticRegression(max_iter=1000).fit(expression, codes), n_classes)


def _knn(expression: np.ndarray, codes: np.ndarray, n_classes: int, seed: int) -> Classify:
    """Euclidean, votes of equal weight, of as many as a class has cells on average, but of five at most."""
    from sklearn.neighbors import KNeighborsClassifier

    k = min(N_NEIGHBORS, len(codes) // len(np.unique(codes)))
    return _probabilities(KNeighborsClassifier(k, algorithm="brute").fit(expression, codes), n_classes)


def _forest(expression: np.ndarray, codes: np.ndarray, n_classes: int, seed: int) -> Classify:
    """Of :data:`N_TREES` trees, scikit-learn's defaults else."""
    from sklearn.ensemble import RandomForestClassifier

    return _probabilities(RandomForestClassifier(N_TREES, random_state=seed).fit(expression, codes), n_classes)


EVALUATORS: dict[str, Evaluator] = {
    evaluator.name: evaluator
    for evaluator in (
        Evaluator("logistic", "Logistic regression", _logistic),
        Evaluator("mlp_small", "MLP, 64", train_network(small_mlp)),
        Evaluator("mlp_large", "MLP, 512-256", train_network(large_mlp)),
        Evaluator("cnn", "1-D CNN", train_network(cnn)),
        Evaluator("knn", "kNN", _knn),
        Evaluator("forest", "Random forest", _forest),
    )
}
"""Evaluators by name, in the order of tables."""


def _probabilities(model: object, n_classes: int) -> Classify:
    """Probabilities of a scikit-learn classifier, with zeros for the classes that it never saw."""

    def classify(new: np.ndarray) -> np.ndarray:
        found = np.zeros((len(new), n_classes))
        if len(new):
            found[:, model.classes_] = model.predict_proba(new)  # type: ignore[attr-defined]
        return found

    return classify


def _dense(expression: sp.csr_matrix | np.ndarray) -> np.ndarray:
    dense = expression.toarray() if isinstance(expression, sp.csr_matrix) else expression
    return np.ascontiguousarray(dense, dtype=np.float32)


def _check(codes: np.ndarray, n_classes: int) -> None:
    if len(codes) and not 0 <= codes.min() <= codes.max() < n_classes:
        raise InvalidArgumentError(
            f"codes reach from {codes.min()} to {codes.max()}; with n_classes={n_classes} they have to lie "
            f"between 0 and {n_classes - 1}."
        )
    if len(np.unique(codes)) < 2:
        raise InvalidArgumentError(
            f"{len(codes)} cells of {len(np.unique(codes))} classes: a classifier needs cells of at least two."
        )
