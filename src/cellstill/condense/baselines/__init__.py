from cellstill.condense.baselines import centroids, matching, metacells, selection, sketching
from cellstill.condense.baselines.base import BASELINES, Baseline, baseline

__all__ = ["BASELINES", "Baseline", "baseline", "centroids", "matching", "metacells", "selection", "sketching"]
