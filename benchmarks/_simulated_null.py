"""Small comparisons in which nothing differs, for ``distill_simulated.py``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from _simulated_fits import SETUP
from _simulated_scenarios import COMMON, CONTRAST, split_donors
from anndata import AnnData

from cellstill.data.simulate import simulate_counts
from cellstill.de import BayesianConfig, DEResult, PseudobulkConfig, pseudobulk_de

SIZE = {**COMMON, "n_obs": 1200, "n_vars": 500, "n_batches": 2}
KINDS = {"signal": "no gene differs", "mock": "mock groups, 10 % of the genes differ with the condition"}
TESTS = ("ttest", "deseq2", "wilcoxon")
TRAINED = "distiller"
WAYS = {TRAINED: ("corrected", "bayesian")}
"""Comparisons that share a fit; each test of raw counts stands for itself."""


def draw(kind: str, seed: int) -> tuple[AnnData, dict[str, str], list[str]]:
    """Cells, the comparison to make and the covariates of its design.

    ``signal``: no gene differs between the conditions. ``mock``: genes differ between the conditions, and what is
    compared are random halves of the donors of each batch and condition, between which nothing differs.
    """
    adata = simulate_counts(seed=seed, **SIZE, **({"de_fraction": 0.0} if kind == "signal" else {}))
    if kind == "signal":
        return adata, dict(CONTRAST), []
    adata.obs["mock"] = split_donors(adata, ("a", "b"), np.random.default_rng([seed, 2]))
    return adata, {**CONTRAST, "groupby": "mock", "group1": "a", "group2": "b"}, ["condition"]


def compare_nothing(kind: str, seed: int, method: str) -> dict[str, dict[str, Any]]:
    """Of each comparison of a method the number of calls and the share of genes with a p-value below 0.05."""
    adata, contrast, covariates = draw(kind, seed)
    if method != TRAINED:
        config = PseudobulkConfig(method=method, covariate_keys=covariates)
        result = pseudobulk_de(adata.X, adata.obs, adata.var_names, **contrast, batch_key="batch", config=config)
        return {method: _calls(result)}

    from cellstill import Distiller

    protected = [*covariates, contrast["groupby"]]
    model = Distiller(adata, batch_key="batch", covariate_keys=protected, seed=seed, **SETUP)
    # As "auto" would for more cells: hundreds of runs share what is compiled once.
    model.train(accelerator="cpu", progress=False, compile=True)
    how: Mapping[str, Callable[[], Any]] = {
        "corrected": lambda: PseudobulkConfig(expression="corrected", covariate_keys=covariates),
        "bayesian": lambda: BayesianConfig(covariate_keys=covariates),
    }
    return {way: _calls(model.differential_expression(**contrast, how=how[way]())) for way in WAYS[TRAINED]}


def _calls(result: DEResult) -> dict[str, Any]:
    table = result.table
    p_values = table["p_value"].dropna().to_numpy() if "p_value" in table else np.array([])
    return {
        "n_called": int(table["is_de"].sum()),
        "small_p": float((p_values < 0.05).mean()) if len(p_values) else None,
    }
