"""Known ways to make few cells of many, as a registry.

Distillation of features (synthetic points of a latent space, on which classifiers are trained as they are) is not among
them: its classifiers would see features where all others see genes, so that the evaluators would not be the same.
Feature-level matching takes part as ``text_distill``, whose features are decoded to counts.
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
