"""Known ways to make few cells of many, as a registry.

One of them makes no cells: classifiers of ``feat_distill`` see features where those of all others see genes. The same
features, decoded to counts, are ``text_distill``.
"""

from cellstill.condense.baselines import centroids, latent, matching, metacells, selection, sketching
from cellstill.condense.baselines.base import BASELINES, Baseline, baseline

__all__ = [
    "BASELINES",
    "Baseline",
    "baseline",
    "centroids",
    "latent",
    "matching",
    "metacells",
    "selection",
    "sketching",
]
