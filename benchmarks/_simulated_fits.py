"""What ``distill_simulated.py`` runs: tests of counts, and jobs that train a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from _simulated_methods import pseudobulk, pydeseq2
from _simulated_scenarios import Scenario
from _simulated_scores import Genes

FEWEST_EPOCHS = {"n_epochs_encoder": 3, "n_epochs_decoder": 3}
SCVI_EPOCHS = 50
PEER_SAMPLES = 25
"""Posterior draws of scdistill, which keeps draws x cells x genes: its default of 100 would be 12 GB in scenario 3."""
SETUP = {"pca_method": "scaled_residuals", "n_latent": 10}
"""Our Distiller's arguments that are not defaults: batches of the simulation differ gene by gene, and only so."""
RESULT = "result"
"""Name of the result of a test, which has one only."""


@dataclass(frozen=True)
class Fit:
    """What is run at once: a test of counts, or a job that trains and compares in several ways.

    ``results`` maps what comes out to the line of a table; ``settings`` makes the settings of a job for a scenario, of
    few epochs if its second argument says so; ``seeds`` are the only ones that are run. Without ``batch_effect`` the
    cells are those of a simulation that has none.
    """

    side: Literal["ours", "peer", "oracle"]
    results: dict[str, str]
    test: Callable[..., Genes] | None = None
    batch_effect: bool = True
    job: str = ""
    settings: Callable[[Scenario, bool], dict[str, Any]] | None = None
    seeds: tuple[int, ...] | None = None


def _distilled(protected: bool, scenario: Scenario, quick: bool) -> dict[str, Any]:
    return {
        "protected": ["condition", *scenario.covariates] if protected else None,
        "covariates": scenario.covariates,
        "results": ["corrected", "bayesian"],
        "setup": SETUP,
        "train": FEWEST_EPOCHS if quick else {},
    }


def _peer(scenario: Scenario, quick: bool) -> dict[str, Any]:
    return {
        "results": ["deseq2", "ttest", "wilcox", "bayesian"],
        "n_samples": PEER_SAMPLES,
        "train": FEWEST_EPOCHS if quick else {},
    }


def _scvi(scenario: Scenario, quick: bool) -> dict[str, Any]:
    epochs = 3 if quick else SCVI_EPOCHS
    return {"covariates": scenario.covariates, "max_epochs": epochs, "results": ["change"]}


FITS = {
    "ttest": Fit("ours", {"": "cellstill, t-test"}, partial(pseudobulk, method="ttest")),
    "deseq2": Fit("ours", {"": "cellstill, DESeq2"}, partial(pseudobulk, method="deseq2")),
    "wilcoxon": Fit("ours", {"": "cellstill, Wilcoxon"}, partial(pseudobulk, method="wilcoxon")),
    "distiller_protected": Fit(
        "ours",
        {"corrected": "Distiller, protected: corrected", "bayesian": "Distiller, protected: Bayesian"},
        job="distiller",
        settings=partial(_distilled, True),
    ),
    "distiller": Fit(
        "ours",
        {"corrected": "Distiller: corrected", "bayesian": "Distiller: Bayesian"},
        job="distiller",
        settings=partial(_distilled, False),
    ),
    "pydeseq2_batch": Fit("peer", {"": "DESeq2, with batch"}, partial(pydeseq2, batch=True)),
    "pydeseq2": Fit("peer", {"": "DESeq2, without batch"}, partial(pydeseq2, batch=False)),
    "scdistill": Fit(
        "peer",
        {
            "deseq2": "scdistill, DESeq2",
            "ttest": "scdistill, t-test",
            "wilcox": "scdistill, Wilcoxon",
            "bayesian": "scdistill, Bayesian",
        },
        job="scdistill",
        settings=_peer,
    ),
    "scvi": Fit("peer", {"change": "scVI"}, job="scvi", settings=_scvi, seeds=(0,)),
    "oracle_ttest": Fit(
        "oracle", {"": "oracle: t-test"}, partial(pseudobulk, method="ttest", batch=False), batch_effect=False
    ),
    "oracle_deseq2": Fit(
        "oracle", {"": "oracle: DESeq2"}, partial(pseudobulk, method="deseq2", batch=False), batch_effect=False
    ),
}
LATENTS = {
    "distiller": "Distiller", "distiller_protected": "Distiller, protected", "scdistill": "scdistill", "scvi": "scVI",
}  # fmt: skip
"""Names of the embeddings of the jobs."""
