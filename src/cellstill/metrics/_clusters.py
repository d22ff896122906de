"""Agreement of labels with clusters of the embedding.

Names of this module are public through :mod:`cellstill.metrics.integration`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cellstill.metrics._inputs import category_codes, check_embedding


def nmi(embedding: ArrayLike, labels: Any, *, seed: int = 0) -> float:
    """Normalised mutual information of labels and k-means clusters, of which there are as many as labels.

    Mutual information is divided by the arithmetic mean of the two entropies, as scib does. Clusters are the best
    of ten starts of k-means, which favours round groups of like size: a low score may tell of a long thin cell type
    as well as of lost biology.

    Parameters
    ----------
    embedding
        Coordinates of shape ``(n_obs, n_dims)``.
    labels
        Label of each cell, without NaN, of two labels at least.
    seed
        Seed of k-means.

    Returns
    -------
    float
        0 (clusters know nothing of labels) to 1 (clusters are the labels).

    Raises
    ------
    InvalidArgumentError
        If there is one label only, or labels are missing for a cell.
    """
    from sklearn.metrics import normalized_mutual_info_score

    codes, clusters = _codes_and_clusters(embedding, labels, seed)
    return float(normalized_mutual_info_score(codes, clusters, average_method="arithmetic"))


def ari(embedding: ArrayLike, labels: Any, *, seed: int = 0) -> float:
    """Compare labels and k-means clusters by the adjusted Rand index; as many clusters as labels.

    It counts pairs of cells, so that common labels weigh more than in :func:`nmi`.

    Parameters
    ----------
    embedding, labels, seed
        As for :func:`nmi`.

    Returns
    -------
    float
        1 where clusters are the labels, 0 on average for clusters at random; negative where they are worse.

    Raises
    ------
    InvalidArgumentError
        If there is one label only, or labels are missing for a cell.

    References
    ----------
    Hubert and Arabie (1985), Comparing partitions, Journal of Classification 2.
    """
    from sklearn.metrics import adjusted_rand_score

    codes, clusters = _codes_and_clusters(embedding, labels, seed)
    return float(adjusted_rand_score(codes, clusters))


def _codes_and_clusters(
    embedding: ArrayLike, labels: Any, seed: int
) -> tuple[NDArray[np.integer], NDArray[np.integer]]:
    from sklearn.cluster import KMeans

    points = check_embedding("embedding", embedding)
    codes, names = category_codes("labels", labels, len(points), min_categories=2)
    return codes, KMeans(n_clusters=len(names), n_init=10, random_state=seed).fit(points).labels_
