"""From a file of counts to a table of differential genes: what ``cellstill de`` runs."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

import cellstill
from cellstill.cli._memory import peak_mb, used_mb
from cellstill.cli._outputs import write_figure, write_json
from cellstill.cli._terminal import Terminal
from cellstill.de import DEResult, PseudobulkConfig, StratifiedDEResult
from cellstill.de.choice import check_within, choose_groups
from cellstill.errors import check_key
from cellstill.io.anndata import StoredAnnData, open_anndata

if TYPE_CHECKING:
    from anndata import AnnData

RESULTS = ("de.csv", "figures", "left_out.csv", "samples.csv", "summary.json")
"""Names in a folder of results; one that holds anything else is never replaced."""

_N_TOP = 20


@dataclass(frozen=True, kw_only=True)
class DifferentialSettings:
    """What ``cellstill de`` was asked for; its ``--help`` explains every one."""

    path: Path
    groupby: str
    group1: str
    group2: str | None
    sample_key: str
    within: str | None = None
    batch_key: str | None = None
    layer: str | None = None
    config: PseudobulkConfig = field(default_factory=PseudobulkConfig)

    def to_dict(self) -> dict[str, Any]:
        """Return a form that JSON can hold, with the name of the input but not its folder."""
        settings = {**asdict(self), "path": self.path.name}
        return settings | settings.pop("config")


@dataclass(frozen=True)
class Differential:
    """What a run found.

    Attributes
    ----------
    result
        Of the comparison, or of one in each level.
    summary
        Content of ``summary.json``.
    """

    result: DEResult | StratifiedDEResult
    summary: dict[str, Any]


def compare_file(settings: DifferentialSettings, folder: Path, term: Terminal) -> Differential:
    """Compare two groups of the cells of a file, and write the results into an existing folder.

    Parameters
    ----------
    settings
        What to do.
    folder
        Where ``de.csv``, ``samples.csv``, ``left_out.csv``, ``figures/`` and ``summary.json`` go.
    term
        Where to report.

    Raises
    ------
    CellstillError
        The file, a key, the design or the counts cannot be used.
    """
    started = time.perf_counter()
    with open_anndata(settings.path) as stored:
        _check_keys(stored, settings)
        with term.stage("load", "Loading libraries"):
            import cellstill.pl  # noqa: F401 - what is loaded now is not counted as memory of the comparison
            from cellstill.de import differential_expression
        loaded = used_mb()
        size = f"{stored.shape[0]:,} cells x {stored.shape[1]:,} genes"
        with term.stage("test", f"Summing the counts of {settings.path.name} per sample ({size}), and testing"):
            adata = stored.to_adata()
            layer = _find_counts(adata, settings.layer)
            result = differential_expression(
                adata,
                groupby=settings.groupby,
                group1=settings.group1,
                group2=settings.group2,
                sample_key=settings.sample_key,
                batch_key=settings.batch_key,
                within=settings.within,
                layer=layer,
                how=settings.config,
            )
    with term.stage("write", "Writing tables and figures"):
        results = _by_level(result)
        result.table.to_csv(folder / "de.csv", index=False)
        _stacked(settings.within, {level: each.units for level, each in results.items()}, folder / "samples.csv")
        _stacked(settings.within, {level: each.left_out for level, each in results.items()}, folder / "left_out.csv")
        _draw(result, folder / "figures")
    peak = peak_mb()
    skipped: dict[str, str] = {} if isinstance(result, DEResult) else dict(result.skipped.itertuples(index=False))
    summary = {
        "input": {
            "name": settings.path.name,
            "n_obs": adata.n_obs,
            "n_vars": adata.n_vars,
            "counts": "X" if layer is None else f"layers/{layer}",
        },
        "settings": settings.to_dict(),
        "comparisons": [_describe(level, each) for level, each in results.items()],
        "skipped": skipped,
        "notes": [] if isinstance(result, DEResult) else list(result.notes),
        "seconds": term.seconds | {"total": time.perf_counter() - started},
        "memory_mb": {"loaded": loaded, "peak": peak, "increase": max(peak - loaded, 0.0)},
        "versions": _versions(settings.config.method),
        "warnings": list(term.warnings),
    }
    write_json(folder / "summary.json", summary)
    return Differential(result, summary)


def _find_counts(adata: AnnData, layer: str | None) -> str | None:
    if layer is not None or "counts" not in adata.layers:
        return layer
    # Its package takes several times as long to import as a comparison takes.
    from cellstill.distill.setup import find_counts

    return find_counts(adata, layer)


def _draw(result: DEResult | StratifiedDEResult, folder: Path) -> None:
    write_figure(result.volcano(), folder / "volcano")
    write_figure(result.ma(), folder / "ma")


def _by_level(result: DEResult | StratifiedDEResult) -> Mapping[str | None, DEResult]:
    """Results by level; a comparison of all cells has the level ``None``."""
    return {None: result} if isinstance(result, DEResult) else {level: result[level] for level in result}


def _check_keys(stored: StoredAnnData, settings: DifferentialSettings) -> None:
    """Check what can be checked before anything slow is imported or read."""
    keys = {"groupby": settings.groupby, "sample_key": settings.sample_key, "batch_key": settings.batch_key}
    for argument, key in (*keys.items(), ("within", settings.within)):
        if key is not None:
            check_key(argument, key, "adata.obs", stored.obs.columns)
    for key in settings.config.covariate_keys:
        check_key("covariate_keys", key, "adata.obs", stored.obs.columns)
    if settings.layer is not None:
        check_key("layer", settings.layer, "adata.layers", stored.layers)
    choose_groups(stored.obs, settings.groupby, settings.group1, settings.group2)
    check_within(stored.obs, settings.within, groupby=settings.groupby, sample_key=settings.sample_key)


def _stacked(within: str | None, tables: Mapping[str | None, pd.DataFrame], path: Path) -> None:
    """Write the tables of all levels as one, the level first."""
    each = list(tables.values())
    if within is not None:
        each = [table.drop(columns=within, errors="ignore") for table in each]
        for level, table in zip(tables, each, strict=True):
            table.insert(0, within, level)
    pd.concat([table for table in each if len(table)] or each[:1], ignore_index=True).to_csv(path, index=False)


def _describe(level: str | None, result: DEResult) -> dict[str, Any]:
    """Sizes, design and calls of a comparison."""
    calls = result.table["direction"].value_counts()
    return {
        "level": level,
        "contrast": result.contrast._asdict(),
        "design": result.design,
        "method": result.method,
        "n_samples": result.n_samples,
        "n_cells": result.n_cells,
        "n_left_out": len(result.left_out),
        "n_genes": len(result.table),
        "n_tested": int(result.table["p_value"].notna().sum()),
        "n_up": int(calls.get("up", 0)),
        "n_down": int(calls.get("down", 0)),
        "top_genes": result.de_genes[:_N_TOP],
        "notes": list(result.notes),
    }


def _versions(method: str) -> dict[str, str]:
    packages = ["anndata", "numpy", "pandas", "scipy", *(["pydeseq2"] if method == "deseq2" else [])]
    return {"cellstill": cellstill.__version__} | {package: version(package) for package in packages}
