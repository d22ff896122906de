"""Sketches of a class: cells that cover its space, or that classifiers get right."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator

import numpy as np

from cellstill.condense.baselines.base import BASELINES, baseline, chosen_cells, principal_components
from cellstill.condense.cells import LabelledCells
from cellstill.condense.problem import CondensationProblem

_EXTRA = "condense"
_POWER = 4


@baseline(
    "geosketch",
    reference="Hie et al. (2019), 10.1016/j.cels.2019.05.003",
    limits="Covers the space evenly, so that outliers are overrepresented.",
    package="geosketch",
    extra=_EXTRA,
)
def geosketch(problem: CondensationProblem, samples_per_class: int, seed: int = 0) -> LabelledCells:
    """Geometric sketch of each class in PCA space."""
    BASELINES["geosketch"].check_installed()
    from geosketch import gs

    scores = principal_components(problem)[0]

    def choose(cells: np.ndarray, n: int, code: int) -> np.ndarray:
        with _aside(seed):
            return cells[np.asarray(gs(scores[cells], n, replace=False, seed=seed))]

    return chosen_cells(problem, samples_per_class, choose)


@baseline(
    "scsampler",
    reference="Song et al. (2022), 10.1101/2022.01.15.476407",
    limits="Spreads cells as far apart as it can, so that outliers are overrepresented.",
)
def scsampler(problem: CondensationProblem, samples_per_class: int, seed: int = 0) -> LabelledCells:
    r"""Greedy sample of least energy, :math:`\sum_{i<j} d_{ij}^{-\alpha}`, of each class in PCA space.

    Starts at a random cell; :math:`\alpha` is four times the number of dimensions, which makes it nearly the sample of
    largest minimal distance. Written anew, in logarithms: the package stops with an error from NumPy 2.4 on.
    """
    scores = principal_components(problem)[0]
    rng = np.random.default_rng(seed)

    def choose(cells: np.ndarray, n: int, code: int) -> np.ndarray:
        points = scores[cells].astype(np.float64)
        chosen = [int(rng.integers(len(cells)))]
        energy, free = np.full(len(cells), -np.inf), np.arange(len(cells))
        while len(chosen) < n:
            squared = ((points - points[chosen[-1]]) ** 2).sum(axis=1)
            with np.errstate(divide="ignore"):
                energy = np.logaddexp(energy, -0.5 * _POWER * points.shape[1] * np.log(squared))
            free = free[free != chosen[-1]]
            chosen.append(int(free[energy[free].argmin()]))
        return cells[chosen]

    return chosen_cells(problem, samples_per_class, choose)


@baseline(
    "scvalue",
    reference="Huang et al. (2025), 10.1093/bib/bbaf279",
    limits="Its own allocation over classes is replaced by the budget per class.",
    package="scvalue",
    extra=_EXTRA,
)
def scvalue(problem: CondensationProblem, samples_per_class: int, seed: int = 0) -> LabelledCells:
    """Cells by their data value, the share of trees that classify them out of bag, in PCA space.

    As the package's full binning does, cells of a class are drawn from bins of values in proportion to the size of the
    bin, the most valuable of each bin.
    """
    BASELINES["scvalue"].check_installed()
    import pandas as pd
    from anndata import AnnData
    from scvalue import SCValue

    names = np.arange(len(problem.train)).astype(str)
    obs = pd.DataFrame({"cell_type": problem.train.codes.astype(str)}, index=names)
    cells_seen = AnnData(obs=obs, obsm={"X_pca": principal_components(problem)[0]})
    with _aside(seed):
        model = SCValue(cells_seen, sketch_size=len(names), seed=seed)
        model.rf_model.n_jobs = 1
        values = model.train_rf()["dv"].fillna(0).to_numpy()
        edges = model.get_dv_bins(0)

    def choose(cells: np.ndarray, n: int, code: int) -> np.ndarray:
        own = pd.DataFrame({"value": values[cells], "cell": cells}).sort_values("value", ascending=False, kind="stable")
        own["bin"] = pd.cut(own["value"], bins=edges, include_lowest=True).astype(str)
        share = model.get_prop(own, "bin", n)
        return np.concatenate([own["cell"][own["bin"] == name].to_numpy()[:size] for name, size in share.items()])

    return chosen_cells(problem, samples_per_class, choose)


@contextlib.contextmanager
def _aside(seed: int) -> Iterator[None]:
    """Run what draws from NumPy's global random state, prints and warns, leaving the caller's state as it was."""
    state = np.random.get_state()  # noqa: NPY002
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            np.random.seed(seed)  # noqa: NPY002
            yield
    finally:
        np.random.set_state(state)  # noqa: NPY002
