"""Differential expression: pure functions over counts or posterior draws; none of them knows a model."""

from cellstill.de.bayesian import BayesianConfig, bayesian_de
from cellstill.de.pseudobulk import PseudobulkConfig, pseudobulk_de, pseudobulk_sums
from cellstill.de.result import Contrast, DEResult
from cellstill.de.units import comparison_cells

__all__ = [
    "BayesianConfig",
    "Contrast",
    "DEResult",
    "PseudobulkConfig",
    "bayesian_de",
    "comparison_cells",
    "pseudobulk_de",
    "pseudobulk_sums",
]
