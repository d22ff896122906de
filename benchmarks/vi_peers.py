"""Regularised VI beside scVI, Harmony, MultiVI and TOTALVI, and beside known soup.

Sections: integration (one for each data set that has batches), soup (known contamination of real cells, and none; the
soup of real droplets), step (milliseconds of a training step) and multimodal (RNA + ATAC, RNA + protein). Every fit has
a process of its own, but for those of a step. Prints tables, writes ``results/vi_peers.json`` and shows that record in
``README.md``, which says what the numbers mean.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from _common import (
    DATA_DIR,
    HERE,
    Check,
    JobResult,
    Section,
    console,
    environment,
    mean_rows,
    show_checks,
    show_rows,
    write_section,
)
from _data import BATCHED, DATA_SETS, real, sized, store
from _readme import update_readme
from _scores import neighbourhood_scores, score
from _soup import Contaminated, contaminate, score_soup
from _vi_multimodal import CHROMATIN, PROTEINS, chromatin, proteins
from _vi_run import Method, Options, run_all, run_method, value_of
from engine import COUNTS_PER_GENE

from cellstill.metrics.ambient import profile_agreement

LARGE, SMALL = {"n_hidden": 512, "n_latent": 128}, {"n_hidden": 128, "n_latent": 10}
OURS, OURS_SMALL, SCVI, SCVI_LARGE = "cellstill 512/128", "cellstill 128/10", "scVI 128/10", "scVI 512/128"

N_VARIABLE = 2000
SOUP_SETS = ("cellbench_3cl_3tech", "kang_pbmc", "mouse_bladder", "onek1k_subset")
RATES = (0.05, 0.1, 0.2)
STEP_CELLS, STEP_TURNS = {"2,000": 4096, "20,000": 2048}, 15
"""Cells of a turn by number of genes, and turns."""
ORACLE, SUBTRACTION, PERFECT, FREE = "oracle", "known subtraction", "the clean counts", "cellstill, background='free'"
MEAN, EQUAL_TYPES = "mean expression", "types in equal shares"

INTEGRATION = ("PCA", "Harmony", SCVI, SCVI_LARGE, OURS_SMALL, OURS)
SOUP = (ORACLE, SUBTRACTION, PERFECT, OURS, FREE)
DROPLETS = (MEAN, EQUAL_TYPES, OURS, FREE)

INTEGRATION_COLUMNS = {
    "method": "method",
    "n_runs": "seeds|.0f",
    "cross_batch_knn_accuracy": "transfer|.3f",
    "graph_connectivity": "graph connectivity|.3f",
    "nmi": "NMI|.3f",
    "ilisi": "iLISI|.3f",
    "ilisi_ceiling": "permuted|.3f",
    "kbet": "kBET|.3f",
    "kbet_15": "of 15|.3f",
    "kbet_50": "of 50|.3f",
    "clisi": "cLISI|.3f",
    "condition_knn": "condition|.3f",
    "condition_knn_in_types": "in types|.3f",
    "epochs": "epochs|.0f",
    "seconds": "seconds|.0f",
}
SOUP_COLUMNS = {
    "method": "method",
    "n_runs": "seeds|.0f",
    **{f"error_{100 * rate:g}": f"error {100 * rate:g} %|.3f" for rate in RATES},
    **{f"leak_{100 * rate:g}": f"leak {100 * rate:g} %|.3f" for rate in RATES},
    **{f"rate_{100 * rate:g}": f"rate {100 * rate:g} %|.3f" for rate in RATES},
    "removed": "removed at 0 %|.4f",
    "epochs": "epochs|.0f",
    "seconds": "seconds|.0f",
}
PROFILE_COLUMNS = {
    "method": "estimate",
    "n_runs": "seeds|.0f",
    "correlation": "correlation|.4f",
    "log_ratio_correlation": "beyond the mean|.3f",
    "fraction": "ambient share|.3f",
    "epochs": "epochs|.0f",
    "seconds": "seconds|.0f",
}
STEP_COLUMNS = {
    "n_vars": "genes",
    "batch_size": "batch|,.0f",
    "size": "n_hidden/n_latent",
    "method": "what",
    "step_ms": "ms per step|,.2f",
    "of_plain": "of the plain one|.2f",
    "load_average": "load average|.2f",
}


def integration_keys(batch_key: str) -> dict[str, list[str]]:
    """Keys of plain integration beside ``batch_key``: the same on all data sets."""
    return {"nn_conditioning_covariate_keys": [batch_key], "feature_scaling_covariate_keys": [batch_key]}


def integration(name: str, options: Options) -> Section | None:
    """Score every method on one data set that has batches."""
    if not options.wants(name):
        return None
    kept = options.kept(f"integration_{name}")
    spec = DATA_SETS[name]
    adata = _most_variable(spec.read(options.data_dir, options.quick))
    path = options.scratch / f"{name}.h5ad"
    section = Section(spec.title, INTEGRATION_COLUMNS, data=store(adata, path))
    section.notes.append(
        "Set-up of ours, the same on all data sets: `setup_anndata(batch_key=b, nn_conditioning_covariate_keys=[b], "
        f"feature_scaling_covariate_keys=[b])`, here b = {spec.batch_key!r}."
    )
    ours = {"keys": integration_keys(spec.batch_key), "train": options.train}
    methods = [
        Method("PCA", "pca", {"pca_method": "standard"}, random=False),
        Method("Harmony", "harmony", {"pca_method": "standard"}),
        Method(SCVI, "scvi", {**SMALL, **options.train}),
        Method(SCVI_LARGE, "scvi", {**LARGE, **options.train}),
        Method(OURS_SMALL, "regularised", {**ours, **SMALL}),
        Method(OURS, "regularised", {**ours, **LARGE}),
    ]
    runs = []
    for method, seed, result in run_all(methods, path, spec.batch_key, section, options):
        embedding = result.arrays["embedding"]
        scores = score(embedding, adata.obs, spec.batch_key, spec.labels_key, spec.condition_key)
        scores |= neighbourhood_scores(embedding, adata.obs[spec.batch_key], adata.obs[spec.labels_key])
        runs.append({"method": method.label, "seed": seed, **result.numbers, **scores})
    runs = options.with_kept(kept, section, runs, INTEGRATION)
    section.rows = mean_rows(runs, ["method"])
    section.checks = [*check_capacity(section.rows), *CHECKS.get(name, lambda rows: [])(section.rows)]
    show_rows(section)
    return section


def _most_variable(adata: ad.AnnData) -> ad.AnnData:
    """Keep the genes that integration is usually run on, the same for all methods, and the cells that have any."""
    if adata.n_vars <= N_VARIABLE:
        return adata
    import scanpy as sc

    found = sc.pp.highly_variable_genes(adata, n_top_genes=N_VARIABLE, flavor="seurat_v3", inplace=False)
    chosen = adata[:, found["highly_variable"].to_numpy()]
    return chosen[np.asarray(chosen.X.sum(axis=1)).ravel() > 0].copy()


def check_capacity(rows: list[dict[str, Any]]) -> list[Check]:
    """A large model is as good as the better of the small ones."""
    checks = []
    for key in ("cross_batch_knn_accuracy", "graph_connectivity", "nmi", "ilisi"):
        small = [value_of(rows, key, method=method) for method in (OURS_SMALL, SCVI)]
        bound = None if None in small else max(small) - 0.02
        what = f"{INTEGRATION_COLUMNS[key].split('|')[0]}, {OURS}"
        checks.append(Check(what, value_of(rows, key, method=OURS), ">=", bound, f"{OURS_SMALL} or {SCVI}, less 0.02"))
    return checks


def check_cellbench(rows: list[dict[str, Any]]) -> list[Check]:
    ours, peer = partial(value_of, rows, method=OURS), partial(value_of, rows, method=SCVI)
    return [
        Check("transfer", ours("cross_batch_knn_accuracy"), ">=", 0.99, _beside(peer("cross_batch_knn_accuracy"))),
        Check("iLISI", ours("ilisi"), ">=", 0.37, _beside(peer("ilisi"))),
        Check("kBET", ours("kbet"), ">=", 0.70, _beside(peer("kbet"))),
    ]


def check_kang(rows: list[dict[str, Any]]) -> list[Check]:
    ours, peer = partial(value_of, rows, method=OURS), partial(value_of, rows, method=SCVI)
    return [
        Check("transfer", ours("cross_batch_knn_accuracy"), ">=", 0.80, _beside(peer("cross_batch_knn_accuracy"))),
        Check("kBET", ours("kbet"), ">=", 0.93, _beside(peer("kbet"))),
        Check("condition, kNN", ours("condition_knn"), ">=", 0.98, _beside(peer("condition_knn"))),
    ]


def soup(name: str, options: Options) -> Section | None:
    """Known soup on real cells of known types, and the same cells without any."""
    if not options.wants(name):
        return None
    kept = options.kept(f"soup_{name}")
    section = Section(f"Known soup on real cells: {name}", SOUP_COLUMNS)
    section.notes.append("Set-up: `setup_anndata(batch_key=b)`, b being the batch of the soup.")
    adata = real(options.data_dir / f"{name}.h5ad", options.quick)
    path = options.scratch / "soup.h5ad"
    runs: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        dirty, clean = (contaminate(adata, rates, seed) for rates in (RATES, (0.0,) * len(RATES)))
        for label, counts in ((ORACLE, dirty.oracle()), (SUBTRACTION, dirty.subtraction()), (PERFECT, adata.X)):
            if options.runs(label):
                runs.append({"method": label, "seed": seed, **score_soup(dirty, sp.csr_matrix(counts))})
        fits = [(OURS, dirty, {}), (OURS, clean, {})]
        if seed == 0:
            fits.append((FREE, dirty, {"background": "free"}))
        fitted: dict[str, dict[str, Any]] = {}
        for label, cells, settings in (fit for fit in fits if options.runs(fit[0])):
            section.data |= store(cells.adata, path)
            method = Method(label, "soup", {"keys": {}, "train": options.train, **settings})
            result = run_method(method, path, seed, Contaminated.BATCH_KEY, section, options, name)
            if result is None:
                continue
            row = fitted.setdefault(label, {"method": label, "seed": seed, "above_raw": 0.0})
            row["above_raw"] = max(row["above_raw"], result.numbers["above_raw"])
            if cells is dirty:
                row |= {key: result.numbers[key] for key in ("epochs", "seconds")}
            row |= score_soup(cells, _counts_of(result, cells.adata.shape), result.arrays["fraction"])
        runs += fitted.values()
    runs = options.with_kept(kept, section, runs, SOUP)
    section.rows = mean_rows(runs, ["method"])
    ours, oracle = (partial(value_of, section.rows, method=method) for method in (OURS, ORACLE))
    for rate in RATES:
        percent = f"{100 * rate:g}"
        for key, what in (("error", "error over the oracle's"), ("leak", "marker leak over the oracle's")):
            ratio = _ratio(ours(f"{key}_{percent}"), oracle(f"{key}_{percent}"))
            section.checks.append(Check(f"{what}, {percent} %", ratio, "<=", 1.05))
        off = ours(f"rate_off_{percent}")
        section.checks.append(Check(f"rate off the true one, {percent} %", off, "<=", 0.2, "relative, mean over seeds"))
    section.checks += [
        Check("removed of cells without soup", ours("removed"), "<=", 0.01),
        Check("most that a corrected count is above the raw one", ours("above_raw"), "<=", 0.0),
    ]
    show_rows(section)
    return section


def profile(options: Options) -> Section | None:
    """The soup of real droplets, whose profile the empty ones tell."""
    name = "pbmc4k_soup"
    if not options.wants(name):
        return None
    adata = real(options.data_dir / f"{name}.h5ad", options.quick)
    kept = options.kept("soup_droplets")
    section = Section("PBMC 4k: profile of the empty droplets", PROFILE_COLUMNS)
    section.notes.append("Set-up: `setup_anndata()` without any key.")
    path = options.scratch / f"{name}.h5ad"
    true = adata.var["soup_fraction"].to_numpy(dtype=np.float64)
    mean = np.asarray(adata.X.sum(axis=0, dtype=np.float64)).ravel()
    section.data[name] = store(adata, path)
    by_type = [np.asarray(adata.X[cells].mean(axis=0)).ravel() for cells in _cells_of(adata.obs["cell_type"])]
    runs: list[dict[str, Any]] = []
    for label, estimate in ((MEAN, mean), (EQUAL_TYPES, np.mean(by_type, axis=0))):
        if options.runs(label):
            runs.append({"method": label, "seed": 0, **profile_agreement(estimate, true, mean)._asdict()})
    settings = {"keys": {}, "train": options.train}
    methods = [Method(OURS, "soup", settings), Method(FREE, "soup", {**settings, "background": "free"}, random=False)]
    for method, seed, result in run_all(methods, path, None, section, options):
        found = result.arrays["profile"][0]
        # The profile of the default form is the mean expression, rounded: its logarithmic ratio to it is no estimate.
        same = np.allclose(found / found.sum(), mean / mean.sum(), rtol=1e-3)
        agreement = profile_agreement(mean if same else found, true, mean)._asdict()
        numbers = {**result.numbers, **agreement, "fraction": float(result.arrays["fraction"].mean())}
        runs.append({"method": method.label, "seed": seed, **numbers})
    runs = options.with_kept(kept, section, runs, DROPLETS)
    section.rows = mean_rows(runs, ["method"])
    value = partial(value_of, section.rows)
    plain = value("correlation", method=MEAN)
    section.checks = [
        # Equal to rounding, where the profile is the mean.
        Check(
            "correlation with the true profile, less the mean expression's",
            round(value("correlation", method=OURS) - plain, 6) if value("correlation", method=OURS) else None,
            ">=",
            0.0,
            f"the mean expression's is {plain:.3f}",
        ),
        Check(
            "correlation of log(profile / mean) with the true one's",
            value("log_ratio_correlation", method=OURS),
            ">=",
            0.15,
            "what knowing the types gives; 0 where the profile is the mean; the published model's is -0.02",
        ),
    ]
    show_rows(section)
    return section


def step(options: Options) -> Section:
    """Milliseconds of a step beside the plain negative binomial VAE of engine.py."""
    section = Section("A training step beside the engine's plain one", STEP_COLUMNS)
    set_ups = {"batch_key": {}, "batch_key, conditioning, scaling": integration_keys("batch")}
    for genes, n_obs in STEP_CELLS.items():
        path = options.scratch / f"{genes}.h5ad"
        n_vars = int(genes.replace(",", ""))
        section.data[genes] = store(sized(n_obs, n_vars, COUNTS_PER_GENE)(options.scratch, False), path)
        for batch_size in (128, 1024):
            for size in (SMALL, LARGE):
                shown = {"n_vars": genes, "batch_size": batch_size, "size": f"{size['n_hidden']}/{size['n_latent']}"}
                turns = 2 if options.quick else STEP_TURNS
                settings = {"set_ups": set_ups, "batch_size": batch_size, "n_turns": turns, **size}
                result = run_method(Method("steps", "steps", settings), path, 0, "batch", section, options, genes)
                for label in ("plain", *set_ups) if result is not None else ():
                    found = {key: result.numbers[f"{key} {label}"] for key in ("step_ms", "of_plain")}
                    section.rows.append(
                        {**shown, "method": label if label == "plain" else f"cellstill, {label}", **found}
                        | {"load_average": result.numbers["load_average"]}
                    )
    for row in section.rows:
        if row["method"] != "plain":
            where = f"{row['n_vars']} genes, batch {row['batch_size']}, {row['size']}, {row['method']}"
            section.checks.append(Check(f"step over the plain one's, {where}", row["of_plain"], "<=", 1.3))
    show_rows(section)
    return section


CHECKS: dict[str, Callable[[list[dict[str, Any]]], list[Check]]] = {
    "cellbench_3cl_3tech": check_cellbench,
    "kang_pbmc": check_kang,
}
SECTIONS: dict[str, Callable[[Options], Section | None]] = {
    **{f"integration_{name}": partial(integration, name) for name in BATCHED},
    **{f"soup_{name}": partial(soup, name) for name in SOUP_SETS},
    "soup_droplets": profile,
    "step": step,
    "multimodal_chromatin": chromatin,
    "multimodal_proteins": proteins,
}
LABELS: dict[str, tuple[str, ...]] = {
    **{f"integration_{name}": INTEGRATION for name in BATCHED},
    **{f"soup_{name}": SOUP for name in SOUP_SETS},
    "soup_droplets": DROPLETS,
    "multimodal_chromatin": CHROMATIN,
    "multimodal_proteins": PROTEINS,
}
"""Lines of the tables that can be run alone."""

GROUPS = ("integration", "soup", "multimodal")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only",
        nargs="+",
        choices=[*SECTIONS, *GROUPS],
        metavar="SECTION",
        help=f"some of: {', '.join(SECTIONS)}; or all of: {', '.join(GROUPS)}",
    )
    parser.add_argument("--sets", nargs="+", metavar="NAME", help="only these data sets")
    parser.add_argument(
        "--methods",
        nargs="+",
        metavar="LABEL",
        help="only these lines of the tables, such as 'cellstill 512/128'; others keep those of results/vi_peers.json",
    )
    parser.add_argument("--quick", action="store_true", help="few cells and epochs, to see that all runs; no record")
    parser.add_argument("--seeds", type=int, help="repeats; means are shown (default: 3, quick 1)")
    parser.add_argument("--threads", type=int, default=1, help="CPUs of every fit (default: 1)")
    parser.add_argument("--max-epochs", type=int, help="most epochs of every fit (default: each method's own)")
    parser.add_argument(
        "--accelerator", default="cpu", choices=("cpu", "gpu"), help="where models train (default: cpu)"
    )
    parser.add_argument("--data-dir", type=Path, default=DATA_DIR, help="folder of the real data sets")
    parser.add_argument("--out", type=Path, help="JSON to write sections into (default: results/vi_peers.json)")
    chosen = parser.parse_args(arguments)
    record = HERE / "results" / "vi_peers.json"
    out = chosen.out or (None if chosen.quick else record)
    epochs = 3 if chosen.quick and chosen.max_epochs is None else chosen.max_epochs
    seeds = chosen.seeds or (1 if chosen.quick else 3)
    warnings.simplefilter("ignore")
    wanted = [
        name for name in SECTIONS if chosen.only is None or name in chosen.only or name.split("_")[0] in chosen.only
    ]
    if chosen.methods is not None:
        unknown = set(chosen.methods) - {label for name in wanted for label in LABELS.get(name, ())}
        if unknown:
            parser.error(f"--methods: no section that was asked for has {sorted(unknown)}.")
        wanted = [name for name in wanted if not set(chosen.methods).isdisjoint(LABELS.get(name, ()))]

    checks: list[Check] = []
    with tempfile.TemporaryDirectory() as scratch:
        options = Options(
            data_dir=chosen.data_dir,
            scratch=Path(scratch),
            quick=chosen.quick,
            seeds=seeds,
            threads=chosen.threads,
            max_epochs=epochs,
            accelerator=chosen.accelerator,
            sets=None if chosen.sets is None else tuple(chosen.sets),
            methods=None if chosen.methods is None else tuple(chosen.methods),
            record=record,
        )
        for name in wanted:
            described = environment(chosen.threads)
            try:
                section = SECTIONS[name](options)
            except FileNotFoundError as error:
                console.print(f"[yellow]{name} is skipped:[/] {error}. Set --data-dir or CELLSTILL_DATA_DIR.")
                continue
            if section is None:
                continue
            if epochs is not None:
                section.notes.append(f"Every fit has at most {epochs} epochs.")
            for note in section.notes:
                console.print(note, style="yellow", markup=False)
            show_checks(section.checks)
            checks += section.checks
            if out is not None:
                how = {"seeds": seeds, "max_epochs": epochs, "accelerator": chosen.accelerator}
                write_section(out, name, section, described | how)
                if chosen.out is None:
                    update_readme(HERE / "README.md", out)
    missed = [check.what for check in checks if check.passed is False]
    unknown = sum(check.passed is None for check in checks)
    console.print(f"{len(checks)} bounds: {len(missed)} missed, {unknown} not measured. {'; '.join(missed)}")


def _counts_of(result: JobResult, shape: tuple[int, int]) -> sp.csr_matrix:
    return sp.csr_matrix(tuple(result.arrays[part] for part in ("data", "indices", "indptr")), shape=shape)


def _cells_of(labels: pd.Series) -> list[np.ndarray]:
    return list(labels.groupby(labels, observed=True).indices.values())


def _ratio(value: float | None, reference: float | None) -> float | None:
    return None if value is None or reference is None else value / reference


def _beside(value: float | None) -> str:
    return "" if value is None else f"{SCVI}: {value:.3f}"


if __name__ == "__main__":
    main()
