"""scDD beside the baselines of dataset condensation, judged by what six classifiers learn of a few cells.

Four real data sets. What is left of all cells' score, how real generated cells look, seconds and memory, and whether
donors are told. Results are kept one by one in a folder, so that an interrupted run goes on. Prints tables, writes
``results/condense_baselines.json`` and shows that record in ``README.md``, which says what the numbers mean.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import _condense_ablations as ablated
import _condense_heads as headed
import _condense_privacy as private
import _condense_tasks as tasked
import anndata as ad
import numpy as np
import pandas as pd
import torch
from _common import (
    DATA_DIR,
    HERE,
    Check,
    Section,
    console,
    environment,
    run_job,
    show_checks,
    show_rows,
    write_section,
)
from _condense_scores import Difference, Scores, closest
from _condense_store import OUR_POINTS, OURS, START, Store
from _data import kang, store, stored
from _readme import update_readme
from threadpoolctl import threadpool_limits

from cellstill.condense import BASELINES, EVALUATORS, CondensationProblem
from cellstill.errors import CellstillError, CellstillWarning
from cellstill.metrics.realism import realism_table

STRONG = (
    "kmeans_centroids", "half_centroids", "herding", "random", "dc", "dm", "kmeans_latent", "generator",
)  # fmt: skip
SLOW = ("dc", "dm")
"""Methods that are left out above 10 cells per class."""
POINTS = ("feat_distill",)
"""Methods that make points of a latent space instead of cells: judged through its encoder, and apart."""
RETAINED = {1: 0.88, 10: 0.96, 50: 0.99}
PER_CLASS = 50
"""Generated cells of each class whose realism is measured."""


@dataclass(frozen=True)
class LabelledSet:
    """A data set with classes to tell apart, and donors to hold out."""

    title: str
    read: Callable[[Path, bool], ad.AnnData]
    donor_key: str | None = None


SETS = {
    "mouse_bladder": LabelledSet("Mouse bladder", stored("mouse_bladder")),
    "onek1k_subset": LabelledSet("OneK1K, donors held out", stored("onek1k_subset"), "donor"),
    "kang_pbmc": LabelledSet("Kang PBMC, donors held out", kang, "donor"),
    "pbmc4k_soup": LabelledSet("PBMC 4k", stored("pbmc4k_soup")),
}

RETENTION_COLUMNS = {
    "samples_per_class": "per class|d",
    "method": "method",
    "n_sets": "sets|d",
    "n_runs": "runs|d",
    "retention": "retention|.3f",
    "retention_of_best": "of best|.3f",
    "macro_f1": "macro-F1|.3f",
    "rare_recall": "rare recall|.3f",
    "worst": "worst evaluator|.3f",
    "gap": "gap|.3f",
    "gap_of_best": "gap of best|.3f",
    "ahead": "ours ahead by|.3f",
    "low": "low|.3f",
    "high": "high|.3f",
    "compression": "compression|.1f",
    "seconds": "seconds|.1f",
}
MEANS = ("retention", "retention_of_best", "macro_f1", "rare_recall", "compression", "seconds")
EVALUATOR_COLUMNS = {
    "samples_per_class": "per class|d", "method": "method", **{name: f"{name}|.3f" for name in EVALUATORS},
}  # fmt: skip
SET_COLUMNS = {"samples_per_class": "per class|d", "method": "method", **{name: f"{name}|.3f" for name in SETS}}
MATCHED_COLUMNS = {
    "set": "data set",
    "samples_per_class": "per class|d",
    "seed": "seed|d",
    "start": "best as it starts|.3f",
    "matched": "best matched|.3f",
    "chosen": "chosen",
    "test_start": "test, as it starts|.3f",
    "test": "test, chosen|.3f",
}
REALISM_COLUMNS = {
    "set": "data set", "metric": "metric", "synthetic": "generated|.3f", "control": "held-out real|.3f",
}  # fmt: skip
COST_COLUMNS = {"what": "what", "value": "measured|.4g", "unit": "unit"}


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    data_dir: Path
    cache: Path
    quick: bool
    sets: tuple[str, ...]
    methods: tuple[str, ...]
    sizes: tuple[int, ...]
    seeds: tuple[int, ...]
    threads: int
    resume: bool

    @property
    def baselines(self) -> list[str]:
        """Methods that are not ours."""
        return [name for name in self.methods if name not in (OURS, START, OUR_POINTS)]

    @property
    def of_cells(self) -> list[str]:
        """Those that make cells."""
        return [name for name in self.baselines if name not in POINTS]


@cache
def store_of(name: str, options: Options) -> Store:
    """Problem of a data set, and its results."""
    chosen = SETS[name]
    adata = chosen.read(options.data_dir, options.quick)
    problem = CondensationProblem.from_anndata(adata, "cell_type", donor_key=chosen.donor_key)
    return Store(name, problem, options.cache / ("quick" if options.quick else "full") / name)


def stores(options: Options, section: Section) -> dict[str, Store]:
    """Stores of the data sets that are there."""
    found = {}
    for name in options.sets:
        try:
            found[name] = store_of(name, options)
        except FileNotFoundError as error:
            section.notes.append(f"{name} is skipped: {error}. Set --data-dir or CELLSTILL_DATA_DIR.")
    if not found:
        raise FileNotFoundError(f"none of {', '.join(options.sets)} is in {options.data_dir}")
    return found


def wanted(options: Options, size: int) -> list[str]:
    """Methods to run with a budget."""
    return [name for name in options.methods if size <= 10 or name not in SLOW]


def fill(options: Options, section: Section) -> Scores:
    """Run what has not been run, seed by seed and budget by budget, and read all results."""
    known = stores(options, section)
    for seed in options.seeds if options.resume else ():
        for size in options.sizes:
            for name, kept in known.items():
                for method in wanted(options, size):
                    try:
                        if kept.run(method, size, seed):
                            console.print(f"  {name}: {method}, {size} per class, seed {seed}", style="dim")
                    except CellstillError as error:
                        section.notes.append(f"{name}: {method}, {size} per class, seed {seed} failed: {error}")
    return Scores(
        {name: kept.evaluation(options.methods, options.sizes, options.seeds) for name, kept in known.items()}
    )


def retention(options: Options) -> Section:
    """What is left of the score of all cells, beside every baseline."""
    section = Section("Retention of macro-F1, mean over data sets, evaluators and seeds", RETENTION_COLUMNS)
    scores = fill(options, section)
    for size in options.sizes:
        for method in options.methods:
            rows = scores.of(method, size)
            if rows.empty:
                continue
            runs = scores.runs(method, size)
            by_evaluator = rows.groupby(["set", "evaluator"])["retention"].mean().groupby("evaluator").mean()
            ahead = None if method == OURS else scores.difference(OURS, method, size)
            section.rows.append(
                {
                    "samples_per_class": size,
                    "method": method,
                    "n_sets": len({name for name, _ in runs}),
                    "n_runs": len(runs),
                    **{key: scores.mean(method, size, key) for key in MEANS},
                    "worst": float(by_evaluator.min()),
                    "gap": scores.gap(method, size),
                    "gap_of_best": scores.gap(method, size, "retention_of_best"),
                    **({} if ahead is None else {"ahead": ahead.value, "low": ahead.low, "high": ahead.high}),
                }
            )
    section.checks = check_retention(scores, options)
    section.notes += compressions(options, section)
    section.data = {"sets": list(options.sets), "seeds": list(options.seeds)}
    show_rows(section)
    return section


def check_retention(scores: Scores, options: Options) -> list[Check]:
    checks = []
    for size in options.sizes:
        runs = scores.runs(OURS, size)
        note = f"{len({name for name, _ in runs})} sets, {len(runs)} runs"
        if size in RETAINED:
            checks.append(
                Check(f"retention, {size} per class", scores.mean(OURS, size, "retention"), ">=", RETAINED[size], note)
            )
        best = closest(scores, OURS, options.of_cells, size)
        if best is not None:
            name, ahead = best
            checks.append(
                Check(f"ahead of the best baseline, {size} per class", ahead.value, ">", 0.0, _interval(name, ahead))
            )
            if size <= 10:
                what = f"lower end of that interval, {size} per class"
                checks.append(Check(what, ahead.low, ">", 0.0, "paired bootstrap over the test cells of all sets"))
        for name in POINTS:
            for ours, what in ((OUR_POINTS, "points ahead of"), (OURS, "cells ahead of the points of")):
                ahead = scores.difference(ours, name, size)
                if ahead is not None:
                    note = _interval(name, ahead)
                    checks.append(Check(f"{what} {name}, {size} per class", ahead.value, ">", 0.0, note))
        if size == 10:
            for name in SLOW:
                ahead = scores.difference(OURS, name, size, score="macro_f1")
                value = None if ahead is None else ahead.value
                note = "not run" if ahead is None else _interval(name, ahead)
                checks.append(Check(f"macro-F1 ahead of {name}, {size} per class", value, ">=", 0.08, note))
        gap, of_best = scores.gap(OURS, size), scores.gap(OURS, size, "retention_of_best")
        of_random = scores.gap("random", size, judges_of=OURS)
        besides = {"of best": of_best, "of random cells": of_random}
        known = [f"{what}: {value:.3f}" for what, value in besides.items() if value is not None]
        note = "; ".join(["evaluators that chose, less the others", *known])
        checks.append(Check(f"cross-architecture gap, {size} per class", gap, "<=", 0.03, note))
        checks.append(_rare(scores, options, size))
    return checks


def _rare(scores: Scores, options: Options, size: int) -> Check:
    """Recall of rare classes less that of the baseline which has most, over the runs that both have."""
    what = f"recall of the rarest quarter, ahead of the best baseline's, {size} per class"
    best = closest(scores, OURS, options.of_cells, size, score="rare_recall")
    if best is None:
        return Check(what, None, ">=", 0.0)
    name, ahead = best
    ours = scores.mean(OURS, size, "rare_recall", scores.runs(OURS, size) & scores.runs(name, size))
    return Check(what, ahead.value, ">=", 0.0, f"{_interval(name, ahead)}; ours {ours:.3f}")


def _interval(name: str, ahead: Difference) -> str:
    return f"{name}: [{ahead.low:.3f}, {ahead.high:.3f}], {ahead.n_runs} runs"


def compressions(options: Options, section: Section) -> list[str]:
    """Say where classes are within their budget, so that little or nothing is condensed."""
    notes = []
    for name, kept in stores(options, section).items():
        of_class = np.bincount(kept.problem.train.codes, minlength=kept.problem.n_classes)
        for size in options.sizes:
            n_kept = int((of_class <= size).sum())
            if n_kept:
                ratio = of_class.sum() / kept.problem.budget(size).sum()
                notes.append(
                    f"{name}, {size} per class: {n_kept} of {len(of_class)} classes have no more training cells than "
                    f"that, which is no compression of them; {ratio:.1f} real cells for each synthetic one in all."
                )
    return notes


def evaluators(options: Options) -> Section:
    """Retention by evaluator."""
    section = Section("Retention by evaluator", EVALUATOR_COLUMNS)
    section.rows = _pivot(fill(options, section), options, "evaluator")
    show_rows(section)
    return section


def data_sets(options: Options) -> Section:
    """Retention by data set."""
    section = Section("Retention by data set", SET_COLUMNS)
    section.rows = _pivot(fill(options, section), options, "set")
    show_rows(section)
    return section


def _pivot(scores: Scores, options: Options, by: str) -> list[dict[str, Any]]:
    rows = []
    for size in options.sizes:
        for method in options.methods:
            own = scores.of(method, size)
            if not own.empty:
                means = own.groupby(["set", by] if by != "set" else "set")["retention"].mean().groupby(by).mean()
                rows.append({"samples_per_class": size, "method": method, **means.to_dict()})
    return rows


def matched(options: Options) -> Section:
    """Matched codes beside the same codes as they start, on validation and on test cells."""
    section = Section("Codes as they start, and matched", MATCHED_COLUMNS)
    scores = fill(options, section)
    for name, kept in stores(options, section).items():
        for size in options.sizes:
            for seed in options.seeds:
                choice = kept.choice(size, seed)
                if choice is None:
                    continue
                table = pd.DataFrame(choice)
                best = table.loc[table["mean"].idxmax()]
                section.rows.append(
                    {
                        "set": name,
                        "samples_per_class": size,
                        "seed": seed,
                        "start": float(table["mean"][table["steps"] == 0].max()),
                        "matched": float(table["mean"][table["steps"] > 0].max()),
                        "chosen": f"{best['start']}, {best['steps']} steps, {best['counts']}",
                        "test": scores.mean(OURS, size, "retention", {(name, seed)}),
                        "test_start": scores.mean(START, size, "retention", {(name, seed)}),
                    }
                )
    for size in options.sizes:
        ahead = scores.difference(OURS, START, size) if START in options.methods else None
        value, note = (None, "") if ahead is None else (ahead.value, _interval(START, ahead))
        section.checks.append(Check(f"test retention, chosen over unmatched, {size} per class", value, ">=", 0.0, note))
    show_rows(section)
    return section


def ablations(options: Options) -> Section:
    """Ours with one part changed at a time."""
    section = Section(f"Ablations, {ablated.SIZE} per class", ablated.COLUMNS)
    known = stores(options, section)
    for seed in options.seeds if options.resume else ():
        for method in (OURS, *ablated.ABLATIONS):
            for name, kept in known.items():
                try:
                    prepare = None if method == OURS else ablated.ABLATIONS[method].prepare
                    if kept.run(method, ablated.SIZE, seed, prepare):
                        console.print(f"  {name}: {method}, seed {seed}", style="dim")
                except CellstillError as error:
                    section.notes.append(f"{name}: {method}, seed {seed} failed: {error}")
    scores = Scores(
        {
            name: kept.evaluation((OURS, *ablated.ABLATIONS), (ablated.SIZE,), options.seeds)
            for name, kept in known.items()
        }
    )
    section.rows = list(ablated.rows(scores, known))
    section.data = {"sets": list(known), "seeds": list(options.seeds)}
    section.notes.append(f"Data sets: {', '.join(known)}; seeds: {', '.join(map(str, options.seeds))}.")
    section.notes += ablated.missing(scores, known, options.seeds)
    show_rows(section)
    return section


def heads(options: Options) -> Section:
    """Macro-F1 by the size of the classifier."""
    section = Section(f"Macro-F1 by the classifier's hidden layers, {headed.SIZE} per class", headed.COLUMNS)
    known = stores(options, section)
    found = {
        name: [headed.run(kept, seed) for seed in options.seeds if options.resume or headed.was_run(kept, seed)]
        for name, kept in known.items()
    }
    section.rows = list(headed.rows({name: runs for name, runs in found.items() if runs}))
    section.data = {"sets": list(known), "seeds": list(options.seeds)}
    show_rows(section)
    return section


def tasks(options: Options) -> Section:
    """Cells that have two labels, each a task of its own, on donors held out."""
    section = Section(f"Two labels, Kang PBMC, {tasked.SIZE} of each combination", tasked.COLUMNS)
    chosen = SETS["kang_pbmc"]
    adata = chosen.read(options.data_dir, options.quick)
    problem = CondensationProblem.from_anndata(adata, tasked.LABELS, donor_key=chosen.donor_key)
    folder = options.cache / ("quick" if options.quick else "full") / "kang_pbmc_labels"
    kept = Store("kang_pbmc_labels", problem, folder)
    if options.resume or tasked.was_run(kept, options.seeds):
        section.rows = list(tasked.rows(tasked.run(kept, options.seeds)))
    section.data = {"classes": len(problem.classes), "seeds": list(options.seeds)}
    for task in dict.fromkeys(row["task"] for row in section.rows):
        baselines = [row for row in section.rows if row["task"] == task and row["method"] != OURS]
        best = min(baselines, key=lambda row: row["difference"])
        note = f"{best['method']}: [{best['low']:.3f}, {best['high']:.3f}], {len(options.seeds)} seeds"
        section.checks.append(
            Check(f"ahead of the best of these baselines, {task}", best["difference"], ">", 0.0, note)
        )
    show_rows(section)
    return section


def looks(options: Options) -> Section:
    """Generated cells beside held-out real ones."""
    section = Section(f"Generated cells, {PER_CLASS} per class", REALISM_COLUMNS)
    for name, kept in stores(options, section).items():
        kept.need_space(0)
        problem = kept.problem
        made = BASELINES["generator"].condense(problem, PER_CLASS, 0)
        labels = [np.array(problem.classes)[cells.codes] for cells in (problem.train, made, problem.test)]
        found = realism_table(
            problem.train.counts,
            made.counts,
            labels[0],
            labels[1],
            control=problem.test.counts,
            control_labels=labels[2],
        )
        section.rows += [{"set": name, "metric": str(key), **row.to_dict()} for key, row in found.iterrows()]

    def mean(metric: str, column: str = "synthetic") -> float | None:
        values = [row[column] for row in section.rows if row["metric"] == metric]
        return float(np.mean(values)) if values else None

    def check(metric: str, what: str, relation: str, bound: float) -> Check:
        control = mean(metric, "control")
        return Check(what, mean(metric), relation, bound, "" if control is None else f"held-out real: {control:.3f}")

    section.checks = [
        check("forest_auroc", "AUROC of a forest, real from generated", "<=", 0.80),
        check("zero_fraction_error", "error of zero fractions", "<=", 0.03),
        check("gene_correlation_agreement", "correlation of gene-gene correlations", ">=", 0.75),
        check("within_class_variance_ratio", "variance within classes over the real one", ">=", 0.7),
        check("within_class_variance_ratio", "variance within classes over the real one", "<=", 1.3),
    ]
    show_rows(section)
    return section


def cost(options: Options) -> Section:
    """Seconds and memory on all cells of OneK1K, in a process of its own."""
    section = Section("Cost: OneK1K, all cells", COST_COLUMNS)
    adata = SETS["onek1k_subset"].read(options.data_dir, options.quick)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "onek1k_subset.h5ad"
        section.data = store(adata, path)
        numbers: dict[str, Any] = {}
        settings: Mapping[str, Any]
        for method, settings in (
            ("whole", {"samples_per_class": 10}),
            ("steps", {"samples_per_class": 10, "repeats": 3 if options.quick else 10}),
        ):
            job = {"module": "_condense_methods", "method": method, "data": str(path), "batch_key": "batch", "seed": 0}
            result = run_job({**job, "settings": settings, "warm_up": False}, threads=options.threads)
            if result.error is not None:
                section.notes.append(f"{method} failed: {result.error}")
            numbers |= result.numbers

    def ratio(name: str) -> float | None:
        ten, one = numbers.get(f"{name}_10_ms"), numbers.get(f"{name}_1_ms")
        return ten / one if ten and one else None

    shown = {
        "train_seconds": ("latent space and generator", "s"),
        "train_cpu_seconds": ("latent space and generator, of CPUs", "s"),
        "condense_seconds": ("condensing, 10 per class", "s"),
        "condense_cpu_seconds": ("condensing, 10 per class, of CPUs", "s"),
        "peak_gb": ("highest memory, with children", "GB"),
        "backward_1_ms": ("through the one-step generator and back", "ms"),
        "backward_10_ms": ("through ten steps and back", "ms"),
        "matching_1_ms": ("a step of matching", "ms"),
        "matching_10_ms": ("a step of matching through ten steps", "ms"),
    }
    section.rows = [
        {"what": what, "value": numbers[key], "unit": unit} for key, (what, unit) in shown.items() if key in numbers
    ]
    section.checks = [
        Check("seconds of latent space and generator", numbers.get("train_seconds"), "<=", 360),
        Check("seconds of condensing", numbers.get("condense_seconds"), "<=", 360),
        Check("highest memory, GB", numbers.get("peak_gb"), "<=", 3, "resident, of the process and its children"),
        Check("ten steps over one, through the generator and back", ratio("backward"), ">=", 5),
        Check("ten steps over one, whole step of matching", ratio("matching"), ">=", 1.8),
    ]
    show_rows(section)
    return section


def privacy(options: Options) -> Section:
    """Whether the cells tell which donors they were made of."""
    section = Section("Membership inference of donors, OneK1K", private.COLUMNS)
    adata = SETS["onek1k_subset"].read(options.data_dir, options.quick)
    folder = options.cache / ("quick" if options.quick else "full") / "privacy"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", CellstillWarning)
        draws = [private.attacked(adata, folder, draw, options.resume) for draw in options.seeds]
    section.notes += sorted({str(warning.message) for warning in caught})
    found = [draw for draw in draws if draw is not None]
    if found:
        section.rows = list(private.rows(pd.concat(found, ignore_index=True)))
    for name in dict.fromkeys(row["released"] for row in section.rows):
        own = [row for row in section.rows if row["released"] == name]
        strong = [row["attack"] for row in own if row["release"] == "positive_control" and row["auroc_low"] > 0.5]
        told = [row for row in own if row["release"] == "synthetic" and row["attack"] in strong]
        most = max(told, key=lambda row: row["auroc"], default=None)
        value, note = (None, "no attack detects real cells") if most is None else (most["auroc_low"], most["attack"])
        section.checks.append(Check(f"lower end of AUROC, {name}", value, "<=", 0.5, note))
    show_rows(section)
    return section


SECTIONS: dict[str, Callable[[Options], Section]] = {
    "retention": retention,
    "evaluators": evaluators,
    "data_sets": data_sets,
    "matched": matched,
    "ablations": ablations,
    "heads": heads,
    "tasks": tasks,
    "realism": looks,
    "cost": cost,
    "privacy": privacy,
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", choices=SECTIONS, metavar="SECTION", help=f"some of: {', '.join(SECTIONS)}"
    )
    parser.add_argument("--sets", nargs="+", choices=SETS, metavar="SET", help=f"some of: {', '.join(SETS)}")
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=[OURS, START, OUR_POINTS, *BASELINES],
        metavar="METHOD",
        help=f"beside {OURS}, some of: {', '.join([START, OUR_POINTS, *BASELINES])} "
        f"(default: {START} and the strong baselines)",
    )
    parser.add_argument("--samples-per-class", nargs="+", type=int, metavar="N", help="budgets (default: 1 10 50)")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help="seeds (default: 0 1 2)")
    parser.add_argument("--quick", action="store_true", help="few cells, two sets, one seed; no record")
    parser.add_argument("--threads", type=int, default=2, help="CPUs (default: 2)")
    parser.add_argument("--data-dir", type=Path, default=DATA_DIR, help="folder of the real data sets")
    parser.add_argument("--cache", type=Path, help="folder of single results (default: one for each user)")
    parser.add_argument("--tables-only", action="store_true", help="run no method: tables of the results there are")
    parser.add_argument(
        "--out", type=Path, help="JSON to write sections into (default: results/condense_baselines.json)"
    )
    chosen = parser.parse_args(arguments)
    out = chosen.out or (None if chosen.quick else HERE / "results" / "condense_baselines.json")
    warnings.simplefilter("ignore", CellstillWarning)
    torch.set_num_threads(chosen.threads)
    quick_sets = ("mouse_bladder", "onek1k_subset")
    options = Options(
        data_dir=chosen.data_dir,
        cache=chosen.cache or Path(tempfile.gettempdir()) / "cellstill_condense_baselines",
        quick=chosen.quick,
        sets=tuple(chosen.sets or (quick_sets if chosen.quick else SETS)),
        methods=tuple(dict.fromkeys([OURS, *(chosen.methods or (START, *STRONG))])),
        sizes=tuple(chosen.samples_per_class or ((1, 10) if chosen.quick else (1, 10, 50))),
        seeds=tuple(chosen.seeds or ((0,) if chosen.quick else (0, 1, 2))),
        threads=chosen.threads,
        resume=not chosen.tables_only,
    )
    checks: list[Check] = []
    with threadpool_limits(chosen.threads):
        for name in chosen.only or SECTIONS:
            described = environment(chosen.threads)
            try:
                section = SECTIONS[name](options)
            except FileNotFoundError as error:
                console.print(f"[yellow]{name} is skipped:[/] {error}. Set --data-dir or CELLSTILL_DATA_DIR.")
                continue
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
