"""Distiller beside scdistill 0.3.1, scVI, Harmony and uncorrected principal components.

Two real data sets and two simulated ones for quality, then seconds, memory and import time. Every fit has a process
of its own. Prints tables, writes ``results/distill_peers.json`` and shows that record in ``README.md``, which says what
the numbers mean.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from _common import (
    DATA_DIR,
    HERE,
    Check,
    Section,
    console,
    environment,
    load_average,
    median_rows,
    run_job,
    show_checks,
    show_rows,
    write_section,
)
from _data import DATA_SETS, TREATED, DataSet, store
from _readme import update_readme
from _scores import accuracy_within, condition_direction, oracle, score, standardised_cells, without_batches

from cellstill.errors import CellstillWarning

STANDARD, PEARSON = "standard", "pearson_residuals"
HELD_OUT = {"train_size": 0.8, "validation_size": 0.1}
PROTECTED = {"covariate_keys": ["condition"]}
CONVERGED = {"epsilon_harmony": 1e-4, "max_iter_harmony": 100}
PUBLISHED_PEER_ILISI = 0.17

QUALITY_COLUMNS = {
    "method": "method",
    "pca_method": "PCA",
    "ilisi": "iLISI|.3f",
    "ilisi_ceiling": "permuted|.3f",
    "clisi": "cLISI|.3f",
    "cross_batch_knn_accuracy": "kNN across|.3f",
    "nmi": "NMI|.3f",
    "condition_knn": "condition|.3f",
    "condition_knn_in_types": "in types|.3f",
    "direction_cosine": "cosine|.3f",
    "direction_slope": "slope|.3f",
    "direction_error": "error|.3f",
    "r2_training_cells": "R2 trained|.3f",
    "r2_held_out": "held out|.3f",
    "r2_of_pca": "PCA's|.3f",
    "seconds": "seconds|.1f",
    "added_mb": "MB|.0f",
}
PROTECTION_COLUMNS = {
    "treated": "treated",
    "method": "method",
    "pca_method": "PCA",
    "n_runs": "data sets",
    "ilisi": "iLISI|.3f",
    "condition_knn_in_types": "condition in types|.3f",
    "knn_from_truth": "off the truth's|.3f",
    "direction_cosine": "cosine|.4f",
    "direction_slope": "slope|.3f",
    "slope_off_one": "off 1|.3f",
    "direction_error": "error|.3f",
}
COST_COLUMNS = {
    "method": "method",
    "variant": "variant",
    "n_runs": "runs",
    "epochs": "epochs|.0f",
    "seconds": "seconds|.1f",
    "added_mb": "added MB|.0f",
    "loaded_mb": "before MB|.0f",
    "load_average": "load average|.2f",
}
IMPORT_COLUMNS = {"method": "statement", "seconds": "best|.3f", "median": "median|.3f"}


@dataclass(frozen=True)
class Method:
    """One line of a table."""

    label: str
    function: str
    pca_method: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    teacher: str | None = None
    random: bool = True

    def job(self, seed: int) -> dict[str, Any]:
        """What :func:`run_job` is asked for."""
        settings = dict(self.settings)
        if self.pca_method is not None:
            settings["pca_method"] = self.pca_method
        return {"method": self.function, "seed": seed, "settings": settings}


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    data_dir: Path
    scratch: Path
    quick: bool
    seeds: int
    threads: int


def methods(name: str, quick: bool) -> list[Method]:
    """Methods to compare on a data set."""
    epochs = {"n_epochs_encoder": 3, "n_epochs_decoder": 3} if quick else {}
    scvi_epochs = {"max_epochs": 3} if quick else {}
    ours = {"train": {**HELD_OUT, **epochs}}
    simulated = name.startswith("simulated")
    chosen = []
    for pca_method in (STANDARD, PEARSON):
        chosen.append(Method("PCA", "pca", pca_method, random=False))
        if simulated and pca_method == PEARSON:
            continue
        chosen += [
            Method("Harmony", "harmony", pca_method),
            Method("Harmony, converged", "harmony", pca_method, CONVERGED),
            Method("scdistill", "scdistill", pca_method, {"train": epochs}),
        ]
    chosen += [Method("scVI, 10 dimensions", "scvi", None, {"n_latent": 10, **scvi_epochs})]
    if name == "cellbench_3cl_3tech":
        chosen += [Method("scVI, 30 dimensions", "scvi", None, {"n_latent": 30, **scvi_epochs})]
    for pca_method in (STANDARD, PEARSON):
        chosen += [Method("cellstill", "cellstill", pca_method, ours, teacher="cellstill's teacher")]
        if DATA_SETS[name].condition_key is not None:
            protected = {**ours, **PROTECTED}
            chosen += [
                Method(
                    "cellstill, protected", "cellstill", pca_method, protected, teacher="cellstill's teacher, protected"
                )
            ]
    return chosen


def quality(name: str, options: Options) -> Section:
    """Score every method on one data set."""
    spec = DATA_SETS[name]
    adata = spec.read(options.data_dir, options.quick)
    path = options.scratch / f"{name}.h5ad"
    section = Section(spec.title, QUALITY_COLUMNS, data=store(adata, path))
    grade = partial(
        score,
        obs=adata.obs,
        batch_key=spec.batch_key,
        labels_key=spec.labels_key,
        condition_key=spec.condition_key,
    )
    truth = None
    if name.startswith("simulated"):
        same_cells = spec.read(options.data_dir, options.quick, batch_sd=0.0)
        truth = without_batches(adata.X, same_cells.X)

    runs: list[dict[str, Any]] = []

    def add(label: str, pca_method: str | None, embedding: Any, seed: int = 0, **numbers: Any) -> None:
        row = {"method": label, "pca_method": pca_method or "", "seed": seed, **numbers, **grade(embedding)}
        if truth is not None and pca_method == STANDARD and label != "scdistill":
            row |= condition_direction(embedding, truth, adata.obs)
        runs.append(row)

    for method in methods(name, options.quick):
        for seed in range(options.seeds if method.random else 1):
            console.print(f"  {name}: {method.label} {method.pca_method or ''} seed {seed}", style="dim")
            job = {**method.job(seed), "data": str(path), "batch_key": spec.batch_key}
            result = run_job(job, threads=options.threads)
            if result.error is not None:
                section.notes.append(f"{method.label} {method.pca_method or ''} failed: {result.error}")
                continue
            add(method.label, method.pca_method, result.arrays["embedding"], seed, **result.numbers)
            if method.teacher is not None:
                add(method.teacher, method.pca_method, result.arrays["teacher"], seed)
            if name == "cellbench_3cl_3tech":
                for label, embedding in limits(method, result.arrays["embedding"], adata.obs, spec).items():
                    add(label, method.pca_method, embedding, seed)
    if truth is not None:
        add("truth: no batch effect", STANDARD, truth)
    section.rows = median_rows(runs, ["method", "pca_method"])
    section.checks = CHECKS[name](section.rows)
    show_rows(section)
    return section


def protection(options: Options) -> Section:
    """Plain Harmony and Harmony with the condition protected, on data sets whose truth is known."""
    section = Section("Harmony with and without protection of the condition", PROTECTION_COLUMNS)
    runs = []
    for name, shares in TREATED.items():
        treated = " / ".join(f"{treat:.0%}" for _, treat in shares)
        read = partial(DATA_SETS[name].read, options.data_dir, options.quick)
        for seed in range(1, 2 if options.quick else 6):
            adata, same_cells = read(seed=seed), read(seed=seed, batch_sd=0.0)
            path = options.scratch / "protection.h5ad"
            section.data[name] = store(adata, path)
            console.print(f"  {treated} treated, data set {seed}", style="dim")
            for pca_method in (STANDARD, PEARSON):
                truth = without_batches(adata.X, same_cells.X, method=pca_method)
                embeddings = {"truth: no batch effect": truth}
                for method in (
                    Method("PCA", "pca", pca_method),
                    Method("Harmony", "teacher", pca_method),
                    Method("Harmony, protected", "teacher", pca_method, PROTECTED),
                ):
                    job = {**method.job(0), "data": str(path), "batch_key": "batch", "warm_up": False}
                    result = run_job(job, threads=options.threads)
                    if result.error is None:
                        embeddings[method.label] = result.arrays["embedding"]
                kept = accuracy_within(truth, adata.obs["condition"], adata.obs["cell_type"])
                for label, embedding in embeddings.items():
                    row = score(embedding, adata.obs, "batch", "cell_type", "condition")
                    row |= condition_direction(embedding, truth, adata.obs)
                    row["knn_from_truth"] = abs(row["condition_knn_in_types"] - kept)
                    row["slope_off_one"] = abs(row["direction_slope"] - 1)
                    runs.append({"treated": treated, "method": label, "pca_method": pca_method, "seed": seed, **row})
                for label in ("truth: no batch effect", "PCA"):
                    row = condition_direction(embeddings[label], truth, adata.obs, within_batches=True)
                    method = f"{label}, within batches"
                    runs.append({"treated": treated, "method": method, "pca_method": pca_method, "seed": seed, **row})
    section.rows = median_rows(runs, ["treated", "method", "pca_method"])
    for treated in dict.fromkeys(row["treated"] for row in section.rows):
        for pca_method in (STANDARD, PEARSON):
            value = partial(_value, section.rows, treated=treated, pca_method=pca_method)
            plain, protected = (partial(value, method=label) for label in ("Harmony", "Harmony, protected"))
            for key, relation, what in (
                ("knn_from_truth", "<", "kNN accuracy of condition in types, off the truth's"),
                ("direction_cosine", ">", "cosine with the condition's true direction"),
                ("slope_off_one", "<", "slope along the condition's true direction, off 1"),
            ):
                what = f"{what}, {treated}, {pca_method}"
                section.checks.append(Check(what, protected(key), relation, plain(key), "bound: plain Harmony"))
    show_rows(section)
    return section


def limits(method: Method, embedding: np.ndarray, obs: pd.DataFrame, spec: DataSet) -> dict[str, np.ndarray]:
    """What could be reached at all: evidence for what limits Harmony, and a student of Harmony."""
    if method.label == "PCA":
        batch, labels = obs[spec.batch_key], obs[spec.labels_key]
        return {
            "oracle: shift": oracle(embedding, batch, labels, rescale=False),
            "oracle: shift and scale": oracle(embedding, batch, labels, rescale=True),
        }
    return {"Harmony, cells standardised": standardised_cells(embedding)} if method.label == "Harmony" else {}


def speed(options: Options) -> Section:
    """Seconds of ours and of the peer, by turns, on the same cells."""
    section = Section("Seconds of a fit: 3,000 cells x 1,000 genes", COST_COLUMNS)
    epochs = 3 if options.quick else 100
    fixed = {"n_epochs_encoder": epochs, "n_epochs_decoder": epochs, "early_stopping": False}
    runs = []
    for name in ("sparse", "dense"):
        path, data = _simulated(name, options)
        section.data[name] = data
        cells = f"{data['density']:.0%} not zero"
        jobs = [
            ("cellstill", f"{cells}, {epochs} + {epochs} epochs", fixed),
            ("scdistill", f"{cells}, {epochs} + {epochs} epochs", fixed),
            ("cellstill", f"{cells}, {epochs} + {epochs} epochs, batches of 512", {**fixed, "batch_size": 512}),
        ]
        if not options.quick:
            jobs += [(function, f"{cells}, defaults", {}) for function in ("cellstill", "scdistill")]
        for repeat in range(1 if options.quick else 3):
            for function, variant, train in jobs:
                runs += _cost_run(section, function, variant, {"train": train}, path, repeat, options)
    section.rows = median_rows(runs, ["method", "variant"])
    for row in section.rows:
        if row["method"] == "cellstill":
            variant = row["variant"].removesuffix(", batches of 512")  # the peer's default
            peer = _value(section.rows, "seconds", "scdistill", variant=variant)
            ratio = None if peer is None else peer / row["seconds"]
            section.checks.append(Check(f"times faster than scdistill, {row['variant']}", ratio, ">=", 3.0))
    show_rows(section)
    return section


def memory(options: Options) -> Section:
    """What the first fit of a process adds to the resident memory, once libraries and data are loaded."""
    path, data = _simulated("large", options)
    size = f"{data['n_obs']:,} cells x {data['n_vars']:,} genes, {data['density']:.1%} not zero"
    section = Section(f"Memory that a fit adds: {size}", COST_COLUMNS, data=data)
    few, more = (1, 2) if options.quick else (2, 10)
    runs = []
    for function, pca_method, epochs in (
        ("cellstill", STANDARD, few),
        ("cellstill", STANDARD, more),
        ("cellstill", PEARSON, few),
        ("scdistill", STANDARD, few),
    ):
        train = {"n_epochs_encoder": epochs, "n_epochs_decoder": epochs, "early_stopping": False}
        settings = {"pca_method": pca_method, "train": train}
        variant = f"{pca_method}, {epochs} + {epochs} epochs"
        runs += _cost_run(section, function, variant, settings, path, 0, options, warm_up=False)
    section.rows = median_rows(runs, ["method", "variant"])
    for row in section.rows:
        if row["method"] == "cellstill":
            section.checks.append(Check(f"MB that a fit adds, {row['variant']}", row["added_mb"], "<", 300.0))
    show_rows(section)
    return section


def import_time(options: Options) -> Section:
    """Seconds of an import in a fresh process."""
    section = Section("Seconds of an import, best of 5 processes", IMPORT_COLUMNS)
    for statement in ("import cellstill", "import cellstill.cli", "from cellstill import Distiller"):
        code = f"import time; start = time.perf_counter(); {statement}; print(time.perf_counter() - start)"
        seconds = []
        for _ in range(5):
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
            if done.returncode == 0:
                seconds.append(float(done.stdout))
        if seconds:
            section.rows.append({"method": statement, "seconds": min(seconds), "median": statistics.median(seconds)})
    section.checks = [
        Check("seconds of `import cellstill`", _value(section.rows, "seconds", "import cellstill"), "<", 0.5)
    ]
    show_rows(section)
    return section


def check_cellbench(rows: list[dict[str, Any]]) -> list[Check]:
    value = partial(_value, rows)
    checks = []
    for pca_method in (STANDARD, PEARSON):
        ours = partial(value, method="cellstill", pca_method=pca_method)
        peer = value("ilisi", "scdistill", pca_method=pca_method)
        checks += [
            Check(f"kNN accuracy across batches, {pca_method}", ours("cross_batch_knn_accuracy"), ">=", 0.98),
            Check(f"iLISI above the peer's, {pca_method}", ours("ilisi"), ">", peer, "peer's in this run"),
            Check(f"iLISI, {pca_method}", ours("ilisi"), ">", PUBLISHED_PEER_ILISI, "peer's as first measured"),
            Check(f"R2 with the teacher on held-out cells, {pca_method}", ours("r2_held_out"), ">=", 0.97, _AVERAGE),
        ]
    return checks


def check_kang(rows: list[dict[str, Any]]) -> list[Check]:
    value = partial(_value, rows)
    checks = []
    for pca_method in (STANDARD, PEARSON):
        ours = partial(value, method="cellstill, protected", pca_method=pca_method)
        pca = partial(value, method="PCA", pca_method=pca_method)
        off = _off(ours("condition_knn"), pca("condition_knn"))
        checks += [
            Check(f"iLISI of donors above PCA's, {pca_method}", ours("ilisi"), ">", pca("ilisi")),
            Check(f"kNN accuracy of condition, off PCA's, {pca_method}", off, "<=", 0.03),
            Check(f"R2 with the teacher on held-out cells, {pca_method}", ours("r2_held_out"), ">=", 0.90, _AVERAGE),
        ]
    return checks


def check_simulated(rows: list[dict[str, Any]]) -> list[Check]:
    value = partial(_value, rows, pca_method=STANDARD)
    true = value("condition_knn_in_types", "truth: no batch effect")
    plain, protected = (
        (
            _off(value("condition_knn_in_types", label), true),
            value("direction_cosine", label),
            _off(value("direction_slope", label), 1.0),
        )
        for label in ("cellstill", "cellstill, protected")
    )
    note = "bound: without protection"
    return [
        Check("kNN accuracy of condition in types, off the truth's", protected[0], "<", plain[0], note),
        Check("cosine with the condition's true direction", protected[1], ">", plain[1], note),
        Check("slope along the condition's true direction, off 1", protected[2], "<", plain[2], note),
    ]


_AVERAGE = "uniform over dimensions"
CHECKS: dict[str, Callable[[list[dict[str, Any]]], list[Check]]] = {
    "cellbench_3cl_3tech": check_cellbench,
    "kang_pbmc": check_kang,
    "simulated_70_50_30": check_simulated,
    "simulated_100_50_0": check_simulated,
}
SECTIONS: dict[str, Callable[[Options], Section]] = {
    **{name: partial(quality, name) for name in CHECKS},
    "protection": protection,
    "speed": speed,
    "memory": memory,
    "import": import_time,
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", choices=SECTIONS, metavar="SECTION", help=f"some of: {', '.join(SECTIONS)}"
    )
    parser.add_argument("--quick", action="store_true", help="few cells and epochs, to see that all runs; no record")
    parser.add_argument("--seeds", type=int, default=1, help="repeats of quality; medians are shown (default: 1)")
    parser.add_argument("--threads", type=int, default=2, help="CPUs of every fit (default: 2)")
    parser.add_argument("--data-dir", type=Path, default=DATA_DIR, help="folder of the real data sets")
    parser.add_argument("--out", type=Path, help="JSON to write sections into (default: results/distill_peers.json)")
    chosen = parser.parse_args(arguments)
    out = chosen.out or (None if chosen.quick else HERE / "results" / "distill_peers.json")
    warnings.simplefilter("ignore", CellstillWarning)

    checks: list[Check] = []
    with tempfile.TemporaryDirectory() as scratch:
        options = Options(chosen.data_dir, Path(scratch), chosen.quick, chosen.seeds, chosen.threads)
        for name in chosen.only or SECTIONS:
            described = environment(chosen.threads)
            try:
                section = SECTIONS[name](options)
            except FileNotFoundError as error:
                console.print(f"[yellow]{name} is skipped:[/] {error}. Set --data-dir or CELLSTILL_DATA_DIR.")
                continue
            for note in section.notes:
                console.print(f"[yellow]{note}[/]")
            show_checks(section.checks)
            checks += section.checks
            if out is not None:
                write_section(out, name, section, described | {"seeds": chosen.seeds})
                if chosen.out is None:
                    update_readme(HERE / "README.md", out)
    missed = [check.what for check in checks if check.passed is False]
    unknown = sum(check.passed is None for check in checks)
    console.print(f"{len(checks)} bounds: {len(missed)} missed, {unknown} not measured. {'; '.join(missed)}")


def _simulated(name: str, options: Options) -> tuple[Path, dict[str, Any]]:
    path = options.scratch / f"{name}.h5ad"
    return path, store(DATA_SETS[name].read(options.data_dir, options.quick), path)


def _cost_run(
    section: Section,
    function: str,
    variant: str,
    settings: dict[str, Any],
    path: Path,
    repeat: int,
    options: Options,
    *,
    warm_up: bool = True,
) -> list[dict[str, Any]]:
    console.print(f"  {function}, {variant}, repeat {repeat}, load average {load_average()}", style="dim")
    job = {"method": function, "seed": repeat, "settings": settings, "data": str(path), "batch_key": "batch"}
    result = run_job({**job, "warm_up": warm_up}, threads=options.threads)
    if result.error is not None:
        section.notes.append(f"{function}, {variant} failed: {result.error}")
        return []
    return [{"method": function, "variant": variant, "seed": repeat, **result.numbers}]


def _value(rows: list[dict[str, Any]], key: str, method: str, **where: str) -> float | None:
    for row in rows:
        if row["method"] == method and all(row.get(name) == wanted for name, wanted in where.items()):
            return row.get(key)
    return None


def _off(value: float | None, reference: float | None) -> float | None:
    return None if value is None or reference is None else abs(value - reference)


if __name__ == "__main__":
    main()
