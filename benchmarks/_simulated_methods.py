"""The methods of ``distill_simulated.py``: tests of counts, and jobs that fit a model and compare several ways.

A test is a function of the cells and the covariates of the design; a job is a function that fits and returns another
that tells the results. Seconds of a job are those of the fit; each result has seconds and memory of its own.
"""

from __future__ import annotations

import importlib
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any

import numpy as np
import pandas as pd
from _methods import Finish, fit_scdistill
from _simulated_scenarios import CONTRAST
from _simulated_scores import Genes, columns_of, pack
from _worker import peak_megabytes, reset_peak, resident_megabytes
from anndata import AnnData

LIBRARIES = {
    "distiller": ["cellstill.distill", "harmonypy"],
    "scdistill": ["scdistill", "scdistill.de", "harmonypy", "pydeseq2.ds"],
    "scvi": ["scvi"],
}
"""What each job imports before anything is measured."""


def pseudobulk(adata: AnnData, covariates: Sequence[str], *, method: str, batch: bool = True) -> Genes:
    """Ours, on raw counts."""
    from cellstill.de import PseudobulkConfig, pseudobulk_de

    result = pseudobulk_de(
        adata.X,
        adata.obs,
        adata.var_names,
        **CONTRAST,
        batch_key="batch" if batch else None,
        config=PseudobulkConfig(method=method, covariate_keys=covariates),
    )
    return columns_of(result.table)


def pydeseq2(adata: AnnData, covariates: Sequence[str], *, batch: bool) -> Genes:
    """DESeq2 through pydeseq2, at its defaults, on the sums of raw counts of each donor."""
    from pydeseq2.dds import DeseqDataSet
    from pydeseq2.ds import DeseqStats

    donor = adata.obs["donor"].astype(str)
    names = sorted(donor.unique())
    cells = pd.get_dummies(donor)[names].to_numpy(dtype=np.float64)
    sums = pd.DataFrame(np.asarray((adata.X.T @ cells).T).round().astype(int), names, adata.var_names)
    terms = [*(["batch"] if batch else []), *covariates, "condition"]
    metadata = adata.obs.assign(donor=donor).drop_duplicates("donor").set_index("donor").loc[names, terms].astype(str)
    expressed = (sums.sum() > 0).to_numpy()
    fit = DeseqDataSet(
        counts=sums.loc[:, expressed], metadata=metadata, design="~ " + " + ".join(terms), n_cpus=1, quiet=True
    )
    fit.deseq2()
    test = DeseqStats(fit, contrast=["condition", CONTRAST["group1"], CONTRAST["group2"]], n_cpus=1, quiet=True)
    test.summary()
    found = test.results_df.reindex(adata.var_names)
    return {
        "lfc": found["log2FoldChange"].to_numpy(float),
        "called": found["padj"].to_numpy(float) < 0.05,
        "certainty": -found["pvalue"].to_numpy(float),
    }


def with_cpu_seconds(fit: Callable[..., Finish]) -> Callable[..., Finish]:
    """Add the CPU seconds of the fit to what it tells: those of the clock are of a machine that may do other things."""

    @wraps(fit)
    def run(*args: Any, **settings: Any) -> Finish:
        start = time.process_time()
        finish = fit(*args, **settings)
        used = time.process_time() - start

        def told() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
            arrays, numbers = finish()
            return arrays, {**numbers, "cpu_seconds": used}

        return told

    return run


@with_cpu_seconds
def distiller(
    adata: AnnData,
    batch_key: str,
    seed: int,
    *,
    protected: Sequence[str] | None,
    covariates: Sequence[str],
    results: Sequence[str],
    setup: Mapping[str, Any],
    train: Mapping[str, Any],
) -> Finish:
    """Our Distiller: counts as all batches would have them, and posterior draws."""
    from cellstill import Distiller

    model = Distiller(adata, batch_key=batch_key, covariate_keys=protected, seed=seed, **setup)
    model.train(accelerator="cpu", progress=False, **train)

    def corrected() -> Genes:
        from cellstill.de import PseudobulkConfig

        how = PseudobulkConfig(expression="corrected", covariate_keys=covariates)
        return columns_of(model.differential_expression(**CONTRAST, how=how).table)

    def bayesian() -> Genes:
        from cellstill.de import BayesianConfig

        return columns_of(
            model.differential_expression(**CONTRAST, how=BayesianConfig(covariate_keys=covariates)).table
        )

    def finish() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        ways = {"corrected": corrected, "bayesian": bayesian}
        arrays, numbers = tell({name: ways[name] for name in results})
        numbers["epochs"] = sum(len(phase) for phase in model.history.values())
        return arrays | {"embedding": model.latent.student, "teacher": model.latent.teacher}, numbers

    return finish


@with_cpu_seconds
def scdistill(
    adata: AnnData,
    batch_key: str,
    seed: int,
    *,
    results: Sequence[str],
    n_samples: int,
    train: Mapping[str, Any],
) -> Finish:
    """The peer with its Harmony teacher: its tests of decoded expression, and its posterior draws."""
    from scdistill.de import BayesianConfig, PseudobulkConfig

    model = fit_scdistill(adata, batch_key, seed, train=train)

    def tested(method: str) -> Genes:
        table = model.differential_expression(**CONTRAST, how=PseudobulkConfig(method=method))
        table = table.set_index("gene").loc[adata.var_names]
        return {
            "lfc": table["lfc"].to_numpy(float),
            "called": table["is_de"].to_numpy(bool),
            "certainty": -table["pval"].to_numpy(float),
        }

    def bayesian() -> Genes:
        table = model.differential_expression(**CONTRAST, how=BayesianConfig(n_samples=n_samples))
        table = table.set_index("gene").loc[adata.var_names]
        names = {"lfc": "lfc_mean", "called": "is_de", "certainty": "proba_de", "low": "lfc_ci_low"}
        return {key: table[name].to_numpy() for key, name in {**names, "high": "lfc_ci_high"}.items()}

    def finish() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        ways: dict[str, Callable[[], Genes]] = {
            "deseq2": lambda: tested("deseq2"),
            "ttest": lambda: tested("ttest"),
            "wilcox": lambda: tested("wilcox"),
            "bayesian": bayesian,
        }
        arrays, numbers = tell({name: ways[name] for name in results})
        numbers["epochs"] = sum(len(phase["loss"]) for phase in model.history.values())
        return arrays | {"embedding": model.latent.student, "teacher": model.latent.teacher}, numbers

    return finish


@with_cpu_seconds
def scvi(
    adata: AnnData, batch_key: str, seed: int, *, covariates: Sequence[str], max_epochs: int, results: Sequence[str]
) -> Finish:
    """Train scVI, and compare in its change mode over all batches."""
    import scvi as scvi_tools

    scvi_tools.settings.seed = seed
    scvi_tools.settings.verbosity = 40
    scvi_tools.model.SCVI.setup_anndata(
        adata, batch_key=batch_key, categorical_covariate_keys=list(covariates) if covariates else None
    )
    model = scvi_tools.model.SCVI(adata)
    model.train(max_epochs=max_epochs, accelerator="cpu", enable_progress_bar=False)

    def change() -> Genes:
        wanted = {key: CONTRAST[key] for key in ("groupby", "group1", "group2")}
        table = model.differential_expression(**wanted, mode="change", batch_correction=True, silent=True)
        table = table.loc[adata.var_names]
        names = {"lfc": "lfc_mean", "called": "is_de_fdr_0.05", "certainty": "proba_de"}
        return {key: table[name].to_numpy() for key, name in names.items()}

    def finish() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        arrays, numbers = tell({name: {"change": change}[name] for name in results})
        numbers["epochs"] = len(model.history["elbo_train"])
        return arrays | {"embedding": model.get_latent_representation()}, numbers

    return finish


def tell(ways: Mapping[str, Callable[[], Genes]]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Compare each way: columns by gene, and of each its seconds and memory, or the error that stopped it."""
    found: dict[str, Genes] = {}
    numbers: dict[str, Any] = {"costs": {}, "errors": {}}
    for name, compare in ways.items():
        try:
            found[name], numbers["costs"][name] = measured(compare)
        except Exception as error:  # noqa: BLE001 - a way that fails is a row less, not the end of a day's run
            numbers["errors"][name] = f"{type(error).__name__}: {error}"
    return pack(found), numbers


def measured(compare: Callable[[], Genes]) -> tuple[Genes, dict[str, float | None]]:
    """Run a comparison; seconds, those of this process's CPUs, and the highest resident memory less that before."""
    before = resident_megabytes()
    reset_peak()
    start, cpu_start = time.perf_counter(), time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = compare()
    seconds, cpu_seconds, peak = time.perf_counter() - start, time.process_time() - cpu_start, peak_megabytes()
    return found, {
        "test_seconds": seconds,
        "test_cpu_seconds": cpu_seconds,
        "test_mb": None if peak is None or before is None else peak - before,
    }


def import_libraries(method: str) -> None:
    """Import what a job needs."""
    for name in LIBRARIES[method]:
        importlib.import_module(name)
