"""Differential expression of real cells: published genes, permuted labels, and halves of the donors.

Kang et al. 2018, 2,000 cells of 8 donors with and without interferon beta, against what the authors found in all of
their cells. Prints tables, writes ``results/de_real.json`` and shows that record in ``README.md``, which says what the
numbers mean.
"""

from __future__ import annotations

import argparse
import itertools
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from _common import (
    DATA_DIR,
    HERE,
    Check,
    Section,
    console,
    environment,
    mean_rows,
    show_checks,
    show_rows,
    write_section,
)
from _readme import update_readme
from scipy.stats import binomtest, spearmanr
from sklearn.metrics import roc_auc_score
from threadpoolctl import threadpool_limits

from cellstill.de import PseudobulkConfig, StratifiedDEResult, pseudobulk_de
from cellstill.errors import CellstillError

LARGE, SMALL = ("CD14+ Monocytes", "CD4 T cells"), ("B cells", "CD8 T cells")
RAW, OURS, BORROWED = "deseq2", "ttest", "ttest, borrowed"
METHODS = {
    RAW: {"method": "deseq2"},
    "wilcoxon": {"method": "wilcoxon"},
    OURS: {"method": "ttest"},
    BORROWED: {"method": "ttest", "borrow": True},
}
MIN_CELLS = 5
"""So that four donors or more of each of the four types are in both conditions."""

PUBLISHED_COLUMNS = {
    "min_cells": "min cells",
    "cell_type": "cell type",
    "method": "method",
    "samples": "samples",
    "n_called": "called|.0f",
    "recall": "recall|.3f",
    "in_published": "of called|.2f",
    "auroc": "AUROC|.3f",
    "lfc_spearman": "LFC rank|.3f",
    "seconds": "seconds|.1f",
}
PERMUTED_COLUMNS = {
    "labels": "permuted",
    "cell_type": "cell type",
    "method": "method",
    "n_runs": "runs",
    "any_call": "any call|.3f",
    "low": "from|.3f",
    "high": "to|.3f",
    "n_called": "mean calls|.2f",
    "p_below_05": "p < .05|.3f",
}
SPLIT_COLUMNS = {
    "cell_type": "cell type",
    "method": "method",
    "n_runs": "splits",
    "n_called": "called in a half|.0f",
    "jaccard": "in both (Jaccard)|.3f",
    "replicated": "replicated|.3f",
    "lfc_correlation": "LFC correlation|.3f",
}


def read(data_dir: Path) -> tuple[ad.AnnData, pd.DataFrame]:
    """Cells with a donor, of the four types, and the published genes."""
    adata = ad.read_h5ad(data_dir / "kang_pbmc.h5ad")
    known = (adata.obs["donor"].astype(str) != "unassigned") & adata.obs["donor"].notna()
    adata = adata[known & adata.obs["cell_type"].isin([*LARGE, *SMALL])].copy()
    return adata, pd.read_csv(data_dir / "kang_published_de.csv.gz")


def compare(adata: ad.AnnData, condition: Any, method: str, min_cells: int) -> StratifiedDEResult:
    """Compare within cell types, donors with themselves, and nothing said of samples left out: they are counted."""
    config = PseudobulkConfig(min_cells_per_sample=min_cells, **METHODS[method])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = pseudobulk_de(
            adata.X,
            adata.obs.assign(condition=np.asarray(condition, dtype=str)),
            adata.var_names,
            groupby="condition",
            group1="stim",
            group2="ctrl",
            sample_key="donor",
            within="cell_type",
            config=config,
        )
    assert isinstance(found, StratifiedDEResult)
    return found


def published(adata: ad.AnnData, genes: pd.DataFrame, methods: Sequence[str]) -> Section:
    """Recall and ranking of the published genes, by cell type."""
    section = Section("Published genes of Kang et al., by cell type, FDR 0.05", PUBLISHED_COLUMNS)
    recall = {}
    for min_cells, method in itertools.product((10, MIN_CELLS), methods):
        console.print(f"  published: {method}, at least {min_cells} cells", style="dim")
        started = time.perf_counter()
        found = compare(adata, adata.obs["condition"], method, min_cells)
        seconds = time.perf_counter() - started
        for cell_type, result in found.results.items():
            theirs = genes[genes["cell_type"] == cell_type].drop_duplicates("symbol").set_index("symbol")
            wanted = set(theirs.index) & set(adata.var_names)
            table = result.table[result.table["p_value"].notna()]
            called = set(result.de_genes)
            sure = table["prob_de"] - 1e-6 * table["p_value"] if "prob_de" in table else -table["p_value"]
            both = table[table["gene"].isin(wanted)]
            recall[min_cells, method, cell_type] = len(called & wanted) / len(wanted)
            section.rows.append(
                {
                    "min_cells": min_cells,
                    "cell_type": cell_type,
                    "method": method,
                    "samples": " + ".join(str(number) for number in result.n_samples.values()),
                    "n_called": len(called),
                    "recall": recall[min_cells, method, cell_type],
                    "in_published": len(called & wanted) / max(len(called), 1),
                    "auroc": float(roc_auc_score(table["gene"].isin(wanted), sure)),
                    "lfc_spearman": float(spearmanr(both["lfc"], theirs["log2FoldChange"].loc[both["gene"]]).statistic),
                    "seconds": seconds,
                }
            )
    for min_cells, method, cell_type in itertools.product((10, MIN_CELLS), (OURS, BORROWED), SMALL):
        raw, ours = (recall.get((min_cells, name, cell_type)) for name in (RAW, method))
        ratio = None if raw is None or ours is None else ours / raw
        note = "" if ratio is None else f"{ours:.3f} / {raw:.3f}"
        section.checks.append(
            Check(f"recall over raw DESeq2's, {cell_type}, {method}, {min_cells} cells", ratio, ">=", 1.5, note)
        )
    section.notes.append("The published list has only genes with |log2 fold change| > 1: others called are not false.")
    return section


def swapped(obs: pd.DataFrame, rng: np.random.Generator, cells: np.ndarray) -> np.ndarray:
    """Exchange the two conditions of half of the donors, so that no effect is left on average.

    Drawn anew for each cell type, among the donors that have enough of its cells in both conditions; the other cells of
    the type get no condition.
    """
    condition = np.full(len(obs), "unused", dtype=object)
    for cell_type in obs["cell_type"].unique():
        here = cells & (obs["cell_type"] == cell_type).to_numpy()
        counts = pd.crosstab(obs["donor"].astype(str)[here], obs["condition"].astype(str)[here])
        donors = rng.permutation(counts.index[(counts >= MIN_CELLS).all(axis=1)])
        donors = donors[: len(donors) // 2 * 2]
        turned = obs["donor"].isin(donors[::2]).to_numpy()
        used = here & obs["donor"].isin(donors).to_numpy()
        real = obs["condition"].astype(str).to_numpy()
        condition[used] = np.where(turned, np.where(real == "stim", "ctrl", "stim"), real)[used]
    return condition


def permutations(adata: ad.AnnData, n_runs: int, only: str | None) -> Iterator[tuple[ad.AnnData, np.ndarray]]:
    """Permuted conditions of random nine tenths of the cells; with ``only``, of one cell type alone."""
    for seed in range(n_runs):
        rng = np.random.default_rng(seed)
        cells = rng.random(adata.n_obs) < 0.9
        condition = swapped(adata.obs, rng, cells)
        if only is not None:
            others = (adata.obs["cell_type"] != only).to_numpy()
            condition[others] = adata.obs["condition"].astype(str).to_numpy()[others]
        kept = condition != "unused"
        yield adata[kept], condition[kept]


def permuted(adata: ad.AnnData, n_runs: int, n_slow: int, methods: Sequence[str]) -> Section:
    """How often anything is called where labels mean nothing."""
    section = Section("Conditions exchanged in half of the donors: is anything called at FDR 0.05?", PERMUTED_COLUMNS)
    jobs = [("all types", None, method) for method in methods]
    jobs += [(f"{name} only", name, BORROWED) for name in SMALL if BORROWED in methods]
    for labels, only, method in jobs:
        n_here = n_slow if method == RAW else n_runs if only is None else n_runs // 4
        console.print(f"  permuted: {labels}, {method}, {n_here} runs", style="dim")
        seen: dict[str, list[tuple[int, float]]] = {}
        for cells, condition in permutations(adata, n_here, only):
            try:
                found = compare(cells, condition, method, MIN_CELLS)
            except CellstillError as error:
                console.print(f"  {error}", style="dim", markup=False)
                continue
            for cell_type, result in found.results.items():
                if only in (None, cell_type):
                    p_value = result.table["p_value"].dropna()
                    seen.setdefault(cell_type, []).append((len(result.de_genes), float((p_value < 0.05).mean())))
        for cell_type, runs in seen.items():
            calls = np.array([n for n, _ in runs])
            n_any, n = int((calls > 0).sum()), len(calls)
            interval = binomtest(n_any, n).proportion_ci(0.95, method="exact")
            low, high = float(interval.low), float(interval.high)
            share = n_any / n
            section.rows.append(
                {
                    "labels": labels,
                    "cell_type": cell_type,
                    "method": method,
                    "n_runs": n,
                    "any_call": share,
                    "low": low,
                    "high": high,
                    "n_called": float(calls.mean()),
                    "p_below_05": float(np.mean([share for _, share in runs])),
                }
            )
            if method in (OURS, BORROWED):
                what = f"runs with any call, {cell_type}, {method}" + (f" ({labels})" if only else "")
                section.checks.append(Check(what, share, "<=", 0.05, f"{n} runs, {low:.3f} to {high:.3f}"))
    return section


def halves(adata: ad.AnnData, n_splits: int, methods: Sequence[str]) -> Section:
    """Whether two halves of the donors agree."""
    section = Section("Two halves of the donors, the same comparison in each", SPLIT_COLUMNS)
    donors = np.array(sorted(adata.obs["donor"].astype(str).unique()))
    splits = [np.append(rest, 0) for rest in itertools.combinations(range(1, len(donors)), len(donors) // 2 - 1)]
    rng = np.random.default_rng(0)
    splits = [splits[i] for i in rng.permutation(len(splits))[:n_splits]]
    runs = []
    for method in methods:
        console.print(f"  halves: {method}", style="dim")
        for number, split in enumerate(splits if method != RAW else splits[:3]):
            first = adata.obs["donor"].astype(str).isin(donors[split]).to_numpy()
            try:
                a, b = (compare(adata[h], adata.obs["condition"][h], method, MIN_CELLS) for h in (first, ~first))
            except CellstillError as error:
                console.print(f"  {error}", style="dim", markup=False)
                continue
            for cell_type in sorted(set(a.results) & set(b.results)):
                tables = [half[cell_type].table.set_index("gene") for half in (a, b)]
                called = [set(half[cell_type].de_genes) for half in (a, b)]
                either = called[0] | called[1]
                if not either:
                    continue
                lfc = pd.concat([table.loc[sorted(either), "lfc"] for table in tables], axis=1).dropna()
                again = [
                    np.mean(
                        (tables[1 - i]["p_value"][list(genes)] < 0.05)
                        & (tables[0]["lfc"] * tables[1]["lfc"] > 0)[list(genes)]
                    )
                    for i, genes in enumerate(called)
                    if genes
                ]
                runs.append(
                    {
                        "cell_type": cell_type,
                        "method": method,
                        "seed": number,
                        "n_called": np.mean([len(genes) for genes in called]),
                        "jaccard": len(called[0] & called[1]) / len(either),
                        "replicated": float(np.mean(again)),
                        "lfc_correlation": float(np.corrcoef(lfc.T.to_numpy())[0, 1]) if len(lfc) > 2 else None,
                    }
                )
    section.rows = mean_rows(runs, ["cell_type", "method"])
    section.notes.append(
        "Replicated: of the genes called in one half, those with p < .05 and the same sign in the other."
    )
    return section


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=["published", "permuted", "halves"], metavar="SECTION")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD")
    parser.add_argument("--runs", type=int, default=200, help="permutations")
    parser.add_argument("--slow-runs", type=int, default=10, help="permutations of deseq2, which takes a minute each")
    parser.add_argument("--splits", type=int, default=10, help="splits of the donors (deseq2: 3)")
    parser.add_argument("--quick", action="store_true", help="few runs, to see that all of it works; no record")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data-dir", type=Path, default=DATA_DIR, help="folder of the real data sets")
    parser.add_argument(
        "--out", type=Path, default=HERE / "results" / "de_real.json", help="JSON to write sections into"
    )
    options = parser.parse_args()
    if not (options.data_dir / "kang_pbmc.h5ad").exists():
        console.print(f"SKIPPED: {options.data_dir} has no kang_pbmc.h5ad.", style="bold yellow", markup=False)
        return
    if options.quick:
        options.runs, options.slow_runs, options.splits = 2, 1, 1
        options.methods = [name for name in options.methods if name != RAW]
    adata, genes = read(options.data_dir)
    sections = {
        "published": lambda: published(adata, genes, options.methods),
        "permuted": lambda: permuted(adata, options.runs, options.slow_runs, options.methods),
        "halves": lambda: halves(adata, options.splits, options.methods),
    }
    checks: list[Check] = []
    for name in options.only or sections:
        described = environment(options.threads)
        with threadpool_limits(options.threads):
            section = sections[name]()
        show_rows(section)
        checks += section.checks
        if not options.quick:
            write_section(options.out, name, section, described)
            if options.out == HERE / "results" / "de_real.json":
                update_readme(HERE / "README.md", options.out)
    show_checks(checks)


if __name__ == "__main__":
    main()
