"""Where codes start: at noise, or where they generate the centres of clusters of each class."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch

from cellstill.condense.baselines.base import kmeans
from cellstill.condense.baselines.profiles import unit_length
from cellstill.condense.matching import invert
from cellstill.condense.problem import CondensationProblem
from cellstill.condense.space import Space

Start = Literal["centroids", "random"]
STARTS: tuple[Start, ...] = ("centroids", "random")


def labels_of_budget(budget: np.ndarray) -> np.ndarray:
    """Class of each synthetic cell, int64: the classes one after the other."""
    return np.repeat(np.arange(len(budget)), budget)


def start_codes(start: Start, problem: CondensationProblem, space: Space, codes: np.ndarray, seed: int) -> torch.Tensor:
    """Codes to start from, one per synthetic cell.

    Parameters
    ----------
    start
        ``"random"`` draws noise. ``"centroids"`` inverts the generator at the mean z of k-means clusters of each class,
        which are found among cells of unit length in gene space.
    problem, space
        Training cells, and what maps codes to cells.
    codes
        Class of each synthetic cell.
    seed
        Of noise and clusters.
    """
    if start == "random":
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(len(codes), space.autoencoder.config.n_latent, generator=generator).to(space.device)
    label = torch.from_numpy(codes).to(space.device)
    return invert(cluster_means(problem, space, codes, seed), label, space.generator)[0]


def cluster_means(problem: CondensationProblem, space: Space, codes: np.ndarray, seed: int) -> torch.Tensor:
    """Mean z of as many clusters of each class as it has synthetic cells, in their order, ``(n, n_latent)``."""
    z = space.encode(problem.train)
    expression = problem.train.expression()
    means = []
    for code in np.unique(codes):
        cells, n = problem.train.of_class(int(code)), int((codes == code).sum())
        clusters = np.arange(n) if n == len(cells) else kmeans(unit_length(expression[cells]), n, seed)[0]
        of_class = z[torch.from_numpy(cells)]
        for cluster in range(n):
            # Where cells are identical, a cluster may be empty.
            own = np.flatnonzero(clusters == cluster)
            means.append(of_class[own].mean(dim=0) if len(own) else of_class.mean(dim=0))
    return torch.stack(means)
