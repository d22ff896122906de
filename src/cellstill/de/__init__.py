"""Differential expression: pure functions over counts or posterior draws; none of them knows a model."""

from cellstill.de.bayesian import BayesianConfig, bayesian_de
from cellstill.de.compare import differential_expression
from cellstill.de.pseudobulk import pseudobulk_de
from cellstill.de.pseudobulk_config import PseudobulkConfig
from cellstill.de.result import Contrast, DEResult
from cellstill.de.stratified import StratifiedDEResult, stratify
from cellstill.de.sums import pseudobulk_sums
from cellstill.de.units import comparison_cells

__all__ = [
    "BayesianConfig",
    "Contrast",
    "DEResult",
    "PseudobulkConfig",
    "StratifiedDEResult",
    "bayesian_de",
    "comparison_cells",
    "differential_expression",
    "pseudobulk_de",
    "pseudobulk_sums",
    "stratify",
]
