"""Differential expression on simulated counts whose fold changes are known.

Six scenarios and a null: ours on raw counts and through the Distiller, beside scdistill, scVI, DESeq2 with and without
the batch, and oracles that are given the same cells without batch effect. Then many small comparisons in which nothing
differs, and the memory of the Bayesian comparison. Results are kept one by one in a folder, so that an interrupted run
goes on. Prints tables, writes ``results/distill_simulated.json`` and shows that record in ``README.md``, which says
what the numbers mean.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from _common import (
    HERE,
    Check,
    Section,
    console,
    environment,
    mean_rows,
    run_job,
    show_checks,
    show_rows,
    write_section,
)
from _readme import update_readme
from _simulated_fits import FEWEST_EPOCHS, FITS, SETUP
from _simulated_null import KINDS, SIZE, TESTS, TRAINED, WAYS, compare_nothing
from _simulated_run import Options, runs_of
from _simulated_scenarios import COMMON, SCENARIOS
from _simulated_scores import latent_scores
from scipy.stats import binomtest
from threadpoolctl import threadpool_limits

from cellstill.data.pca import fit_pca
from cellstill.data.simulate import simulate_counts
from cellstill.errors import CellstillError, CellstillWarning

OURS, ORACLE = "ttest", "oracle_ttest"
BALANCED, CONFOUNDED = ("1", "2", "3", "6"), ("4", "5")
BOUNDS = {
    **{name: {"f1": 0.92, "observed_fdr": 0.06, "correlation_de": 0.98, "slope": 0.1} for name in BALANCED},
    "4": {"f1": 0.85},
    "5": {"f1": 0.70, "observed_fdr": 0.10},
}

COLUMNS = {
    "scenario": "scenario",
    "method": "method",
    "n_runs": "runs|d",
    "n_called": "called|.0f",
    "f1": "F1|.3f",
    "observed_fdr": "FDR|.3f",
    "recall": "recall|.3f",
    "top_f1": "top-k F1|.3f",
    "correlation": "LFC r|.3f",
    "correlation_de": "DE r|.3f",
    "slope": "slope|.3f",
    "coverage": "coverage|.3f",
    "coverage_de": "DE|.3f",
    "fit_seconds": "fit s|.1f",
    "fit_cpu_seconds": "CPU s|.1f",
    "fit_mb": "MB|.0f",
    "test_seconds": "test s|.2f",
    "test_cpu_seconds": "test CPU s|.2f",
    "test_mb": "test MB|.0f",
}
BY_SCENARIO = {"method": "method", **{name: f"{name}|.3f" for name in SCENARIOS if name != "null"}}
CALL_COLUMNS = {**BY_SCENARIO, "null": "null, calls|.1f"}
INTEGRATION_COLUMNS = {
    "scenario": "scenario",
    "method": "method",
    "n_runs": "runs|d",
    "ilisi": "iLISI|.3f",
    "ilisi_ceiling": "permuted|.3f",
    "ilisi_of_ceiling": "share|.3f",
    "teacher_ilisi_of_ceiling": "teacher's share|.3f",
    "nmi": "NMI|.3f",
    "teacher_nmi": "teacher's NMI|.3f",
}
NULL_COLUMNS = {
    "kind": "data",
    "method": "method",
    "n_runs": "runs|d",
    "share": "runs with a call|.3f",
    "low": "low|.3f",
    "high": "high|.3f",
    "n_called": "calls, mean|.2f",
    "small_p": "p < 0.05|.4f",
}
MEMORY_COLUMNS = {
    "method": "method", "test_mb": "added MB|.0f", "test_seconds": "seconds|.1f", "test_cpu_seconds": "CPU seconds|.1f",
}  # fmt: skip


def scenarios(options: Options) -> Section:
    """F1 of the calls, method by method, and every bound of the scenarios."""
    section = Section("F1 of the calls at FDR 0.05, by scenario", BY_SCENARIO)
    runs, _ = runs_of(options, section)
    section.rows = by_scenario(runs, "f1")
    section.checks = check_scenarios(runs)
    if not runs.empty:
        section.data = {"seeds": sorted(int(seed) for seed in runs["seed"].unique())}
    show_rows(section)
    return section


def false_calls(options: Options) -> Section:
    """Observed FDR, and calls where nothing differs."""
    section = Section("Share of false calls at FDR 0.05, by scenario, and calls in the null", CALL_COLUMNS)
    runs, _ = runs_of(options, section)
    section.rows = by_scenario(runs, "observed_fdr")
    if not runs.empty:
        calls = runs[runs["scenario"] == "null"].groupby("method")["n_called"].mean()
        for row in section.rows:
            row["null"] = float(calls[row["method"]]) if row["method"] in calls else None
        ours = runs[(runs["side"] == "ours") & runs["scenario"].isin(BALANCED)]
        means = ours.groupby(["method", "scenario"], sort=False)["observed_fdr"].mean().unstack()
        for method, row in means.iterrows():
            note = f"scenario {row.idxmax()}"
            section.checks.append(
                Check(f"highest share of false calls, 1 to 3 and 6: {method}", row.max(), "<=", 0.06, note)
            )
    show_rows(section)
    return section


def details(options: Options) -> Section:
    """Everything, scenario by scenario; the record has every run."""
    section = Section("Calls, ranking and fold changes, means over seeds", COLUMNS)
    runs, _ = runs_of(options, section)
    section.rows = mean_rows(runs.to_dict("records"), ["scenario", "method"]) if len(runs) else []
    shown = [*COLUMNS, "seed"]
    kept = runs[[name for name in runs if name in shown]].to_dict("records") if len(runs) else []
    section.data = {"runs": [{key: _short(value) for key, value in run.items()} for run in kept]}
    show_rows(section)
    return section


def integration(options: Options) -> Section:
    """Mixing of batches and purity of types in the latents of the same fits."""
    section = Section("Integration in the same runs", INTEGRATION_COLUMNS)
    _, latents = runs_of(options, section)
    known = latents[["scenario", "seed"]].drop_duplicates().to_dict("records") if len(latents) else []
    best = pd.DataFrame([row for one in known for row in integration_oracle(options, **one)])
    latents = pd.concat([latents, best], ignore_index=True)
    section.rows = mean_rows(latents.to_dict("records"), ["scenario", "method"]) if len(latents) else []
    for method in ("Distiller", "Distiller, protected"):
        own = [row for row in section.rows if row["method"] == method]
        for key, bound, what in (("ilisi_of_ceiling", 0.97, "iLISI over permuted"), ("nmi", 0.995, "NMI")):
            lowest = min(own, key=lambda row: row[key], default=None)
            value, note = (None, "") if lowest is None else (lowest[key], f"scenario {lowest['scenario']}")
            section.checks.append(Check(f"lowest {what}, {method}", value, ">=", bound, note))
    show_rows(section)
    return section


def integration_oracle(options: Options, scenario: str, seed: int) -> Iterator[dict[str, Any]]:
    """Scores of principal components of the same cells drawn without batch effect."""
    for method in ("standard", "pearson_residuals"):
        key, settings = f"integration/{scenario}-{seed}-{method}", (SCENARIOS[scenario], COMMON, options.quick)
        found = options.store.read(key, settings)
        if found is None and options.resume:
            adata = SCENARIOS[scenario].simulate(seed, quick=options.quick, batch_effect=False)
            n_components = min(50, adata.n_vars - 1)
            embedding = fit_pca(adata.X, n_components, method=method, seed=seed).transform(adata.X)
            found = latent_scores(embedding, adata.obs)
            options.store.write(key, settings, found)
        if found is not None:
            title = f"oracle: PCA ({method.replace('_', ' ')}) without batch effect"
            yield {"scenario": scenario, "seed": seed, "method": title, **found}


def by_scenario(runs: pd.DataFrame, score: str) -> list[dict[str, Any]]:
    """One row per method, one column per scenario."""
    if runs.empty:
        return []
    own = runs[runs["scenario"] != "null"] if (runs["scenario"] != "null").any() else runs
    table = own.groupby(["method", "scenario"], sort=False)[score].mean().unstack()
    order = dict.fromkeys(title for fit in FITS.values() for title in fit.results.values())
    table = table.reindex([title for title in order if title in table.index])
    return [
        {"method": str(method), **{str(name): None if np.isnan(value) else float(value) for name, value in row.items()}}
        for method, row in table.iterrows()
    ]


def check_scenarios(runs: pd.DataFrame) -> list[Check]:
    """Bounds of ours at its default, beside the oracle, and beside every peer on the seeds that both have."""
    checks: list[Check] = []
    if runs.empty:
        return checks

    def mean(name: str, key: str, score: str) -> float | None:
        values = runs[(runs["scenario"] == name) & (runs["key"] == key)][score].dropna()
        return float(values.mean()) if len(values) else None

    def beside(name: str, score: str) -> str:
        oracle = mean(name, ORACLE, score)
        return "" if oracle is None else f"oracle {oracle:.3f}"

    for name, bounds in BOUNDS.items():
        if name not in set(runs["scenario"]):
            continue
        f1, oracle = mean(name, OURS, "f1"), mean(name, ORACLE, "f1")
        checks.append(Check(f"F1, scenario {name}", f1, ">=", bounds["f1"], beside(name, "f1")))
        share = f1 / oracle if f1 is not None and oracle else None
        checks.append(Check(f"F1 over the oracle's, scenario {name}", share, ">=", 0.98))
        ahead = ahead_of_peers(runs, name)
        value, note = (None, "no peer") if ahead is None else ahead
        checks.append(Check(f"F1 ahead of the best peer, scenario {name}", value, ">", 0.0, note))
        if "observed_fdr" in bounds:
            value = mean(name, OURS, "observed_fdr")
            checks.append(
                Check(
                    f"false calls, scenario {name}", value, "<=", bounds["observed_fdr"], beside(name, "observed_fdr")
                )
            )
        if "slope" in bounds:
            value, note = mean(name, OURS, "slope"), beside(name, "slope")
            checks.append(Check(f"slope of fold changes, scenario {name}", value, ">=", 1 - bounds["slope"], note))
            checks.append(Check(f"slope of fold changes, scenario {name}", value, "<=", 1 + bounds["slope"], note))
            value, note = mean(name, OURS, "correlation_de"), beside(name, "correlation_de")
            checks.append(
                Check(f"correlation on DE genes, scenario {name}", value, ">=", bounds["correlation_de"], note)
            )
    calls = runs[(runs["scenario"] == "null") & (runs["key"] == OURS)]
    if len(calls):
        checks.append(Check("runs of the null with a call", calls["any_call"].mean(), "<=", 0.05, f"{len(calls)} runs"))
    return checks


def ahead_of_peers(runs: pd.DataFrame, name: str) -> tuple[float, str] | None:
    """F1 of ours less that of the peer which has most, over the seeds that both have."""
    own = runs[runs["scenario"] == name]
    ours = own[own["key"] == OURS].set_index("seed")["f1"]
    found = []
    for method, peer in own[own["side"] == "peer"].groupby("method"):
        both = pd.concat([ours, peer.set_index("seed")["f1"]], axis=1, join="inner").dropna()
        if len(both):
            found.append(
                (
                    float((both.iloc[:, 0] - both.iloc[:, 1]).mean()),
                    f"{method}: {both.iloc[:, 1].mean():.3f}, {len(both)} seeds",
                )
            )
    return min(found, default=None)


def null(options: Options) -> Section:
    """Share of comparisons of nothing that call anything."""
    section = Section("Small comparisons in which nothing differs", NULL_COLUMNS)
    section.data = {"size": SIZE}
    for kind, what in KINDS.items():
        for method in (*TESTS, TRAINED):
            found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS.get(method, (method,))}
            for seed in range(options.null_runs[method]):
                key, settings = f"null/{kind}-{seed}-{method}", (kind, SIZE, *([SETUP] if method == TRAINED else []))
                numbers = options.store.read(key, settings)
                if numbers is None and options.resume:
                    try:
                        numbers = compare_nothing(kind, seed, method)
                    except CellstillError as error:
                        section.notes.append(f"{what}: {method} failed: {error}")
                        break
                    options.store.write(key, settings, numbers)
                    if seed % 50 == 49:
                        console.print(f"  {what}: {method}, {seed + 1} runs", style="dim")
                for way in found if numbers else ():
                    found[way].append(numbers[way])
            for way, calls in found.items():
                if calls:
                    section.rows.append(null_row(what, way, calls))
    section.checks = [
        Check(
            f"runs with a call: {row['kind']}, {row['method']}",
            row["share"],
            "<=",
            0.05,
            f"{row['n_runs']} runs, [{row['low']:.3f}, {row['high']:.3f}]",
        )
        for row in section.rows
    ]
    show_rows(section)
    return section


def null_row(kind: str, method: str, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Share of runs with a call, and its Clopper-Pearson interval."""
    with_call = sum(run["n_called"] > 0 for run in runs)
    interval = binomtest(with_call, len(runs)).proportion_ci(0.95, method="exact")
    small = [run["small_p"] for run in runs if run["small_p"] is not None]
    return {
        "kind": kind,
        "method": method,
        "n_runs": len(runs),
        "share": with_call / len(runs),
        "low": float(interval.low),
        "high": float(interval.high),
        "n_called": float(np.mean([run["n_called"] for run in runs])),
        "small_p": float(np.mean(small)) if small else None,
    }


def memory(options: Options) -> Section:
    """Memory of the Bayesian comparison of 3,000 x 1,000 with 100 draws."""
    section = Section("Memory of a Bayesian comparison, 3,000 x 1,000, 100 draws", MEMORY_COLUMNS)
    size = {**COMMON, "n_obs": 600 if options.quick else 3000, "n_vars": 200 if options.quick else 1000, "n_batches": 2}
    jobs = {
        "Distiller": (
            "distiller",
            "bayesian",
            {"protected": None, "covariates": [], "setup": SETUP, "train": FEWEST_EPOCHS},
        ),
        "scdistill": ("scdistill", "bayesian", {"n_samples": 100, "train": FEWEST_EPOCHS}),
        "scVI": ("scvi", "change", {"covariates": [], "max_epochs": 3}),
    }
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "cells.h5ad"
        for title, (method, result, settings) in jobs.items():
            key = f"memory/{method}"
            numbers = options.store.read(key, (size, settings))
            if numbers is None and options.resume:
                if not path.exists():
                    simulate_counts(seed=0, **size).write_h5ad(path)
                job = {
                    "module": "_simulated_methods",
                    "method": method,
                    "data": str(path),
                    "batch_key": "batch",
                    "seed": 0,
                }
                asked = {**settings, "results": [result]}
                done = run_job({**job, "settings": asked, "warm_up": False}, threads=options.threads)
                error = done.error or done.numbers["errors"].get(result)
                if error is not None:
                    section.notes.append(f"{title} failed: {error}")
                    continue
                numbers = done.numbers["costs"][result]
                options.store.write(key, (size, settings), numbers)
            if numbers is not None:
                section.rows.append({"method": title, **numbers})
    ours = next((row["test_mb"] for row in section.rows if row["method"] == "Distiller"), None)
    peer = next((row["test_mb"] for row in section.rows if row["method"] == "scdistill"), None)
    note = "" if peer is None else f"scdistill: {peer:.0f}"
    section.checks = [Check("MB added by the Bayesian comparison", ours, "<=", 200, note)]
    show_rows(section)
    return section


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return None if np.isnan(value) else float(f"{value:.5g}")
    return value


SECTIONS: dict[str, Callable[[Options], Section]] = {
    "scenarios": scenarios,
    "false_calls": false_calls,
    "details": details,
    "integration": integration,
    "null": null,
    "memory": memory,
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", choices=SECTIONS, metavar="SECTION", help=f"some of: {', '.join(SECTIONS)}"
    )
    parser.add_argument(
        "--scenarios", nargs="+", choices=SCENARIOS, metavar="NAME", help=f"some of: {', '.join(SCENARIOS)}"
    )
    parser.add_argument("--methods", nargs="+", choices=FITS, metavar="METHOD", help=f"some of: {', '.join(FITS)}")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help="seeds (default: 0 to 4)")
    parser.add_argument("--null-runs", type=int, metavar="N", help="runs of each null and test (default: 200)")
    parser.add_argument("--null-deseq2", type=int, metavar="N", help="the same of DESeq2 (default: as many)")
    parser.add_argument("--null-distillers", type=int, metavar="N", help="the same of Distillers (default: 40)")
    parser.add_argument("--quick", action="store_true", help="few cells, epochs, runs, and one seed; no record")
    parser.add_argument("--threads", type=int, default=2, help="CPUs (default: 2)")
    parser.add_argument("--cache", type=Path, help="folder of single results (default: one for each user)")
    parser.add_argument("--tables-only", action="store_true", help="run no method: tables of the results there are")
    parser.add_argument(
        "--out", type=Path, help="JSON to write sections into (default: results/distill_simulated.json)"
    )
    chosen = parser.parse_args(arguments)
    out = chosen.out or (None if chosen.quick else HERE / "results" / "distill_simulated.json")
    warnings.simplefilter("ignore", CellstillWarning)
    torch.set_num_threads(chosen.threads)
    n_tests = chosen.null_runs or (5 if chosen.quick else 200)
    n_trained = chosen.null_distillers or (1 if chosen.quick else 40)
    n_deseq2 = chosen.null_deseq2 or n_tests
    options = Options(
        cache=chosen.cache or Path(tempfile.gettempdir()) / "cellstill_distill_simulated",
        quick=chosen.quick,
        scenarios=tuple(chosen.scenarios or (("1", "2", "null") if chosen.quick else SCENARIOS)),
        methods=tuple(name for name in FITS if name in (chosen.methods or FITS)),
        seeds=tuple(chosen.seeds or ((0,) if chosen.quick else (0, 1, 2, 3, 4))),
        threads=chosen.threads,
        resume=not chosen.tables_only,
        null_runs={**dict.fromkeys(TESTS, n_tests), "deseq2": n_deseq2, TRAINED: n_trained},
    )
    checks: list[Check] = []
    with threadpool_limits(chosen.threads):
        for name in chosen.only or SECTIONS:
            described = environment(chosen.threads)
            section = SECTIONS[name](options)
            section.notes = list(dict.fromkeys(section.notes))
            for note in section.notes:
                console.print(note, style="yellow", markup=False)
            if section.checks:
                show_checks(section.checks)
            checks += section.checks
            if out is not None:
                write_section(out, name, section, described | {"seeds": list(options.seeds)})
                if chosen.out is None:
                    update_readme(HERE / "README.md", out)
    missed = [check.what for check in checks if check.passed is False]
    unknown = sum(check.passed is None for check in checks)
    console.print(f"{len(checks)} bounds: {len(missed)} missed, {unknown} not measured. {'; '.join(missed)}")


if __name__ == "__main__":
    main()
