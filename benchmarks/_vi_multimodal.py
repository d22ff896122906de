"""The sections of ``vi_peers.py`` on several modalities: RNA + ATAC, and RNA + protein."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import scipy.sparse as sp
from _common import Check, Section, mean_rows, show_rows
from _scores import prediction_scores
from _vi_run import Method, Options, run_all, run_method, value_of

from cellstill.metrics import knn_accuracy

MULTIVI_EPOCHS = 100
CHROMATIN = ("cellstill", "cellstill, RNA alone", "cellstill, ATAC alone", "MultiVI")
PROTEINS = ("cellstill", "TOTALVI", "neighbours in RNA components")

CHROMATIN_COLUMNS = {
    "method": "method",
    "n_runs": "seeds|.0f",
    "condition_knn": "condition|.3f",
    "condition_knn_rna": "its RNA part|.3f",
    "condition_knn_atac": "its ATAC part|.3f",
    "epochs": "epochs|.0f",
    "seconds": "seconds|.0f",
}
PROTEIN_COLUMNS = {
    "method": "method",
    "n_runs": "seeds|.0f",
    "pearson": "correlation|.3f",
    "spearman": "of ranks|.3f",
    "epochs": "epochs|.0f",
    "seconds": "seconds|.0f",
}


def chromatin(options: Options) -> Section | None:
    """RNA and chromatin accessibility: what the latents know of the treatment."""
    name = "scicar_a549"
    if not options.wants(name):
        return None
    kept = options.kept("multimodal_chromatin")
    path, mdata = _paired(name, {"rna": 300, "atac": 600}, options)
    shapes = {part: list(each.shape) for part, each in mdata.mod.items()}
    section = Section("sci-CAR A549: RNA and ATAC, 3 durations of treatment", CHROMATIN_COLUMNS, data=shapes)
    section.notes.append(
        f"MultiVI has at most {MULTIVI_EPOCHS} epochs; its default of 500 takes more than half an hour."
    )
    both, train = ("rna", "atac"), {"train": options.train}
    methods = [
        Method("cellstill", "joint", {"modalities": both, **train}),
        Method("cellstill, RNA alone", "joint", {"modalities": both[:1], **train}),
        Method("cellstill, ATAC alone", "joint", {"modalities": both[1:], **train}),
        Method("MultiVI", "multivi", {"max_epochs": MULTIVI_EPOCHS, **options.train}),
    ]
    runs = []
    for method, seed, result in run_all(methods, path, None, section, options):
        scores = {
            key.replace("embedding", "condition_knn"): knn_accuracy(array, mdata.obs["condition"])
            for key, array in result.arrays.items()
            if key == "embedding" or not method.label.endswith("alone")
        }
        runs.append({"method": method.label, "seed": seed, **result.numbers, **scores})
    runs = options.with_kept(kept, section, runs, CHROMATIN)
    section.rows = mean_rows(runs, ["method"])
    value = partial(value_of, section.rows)
    joint = value("condition_knn", method="cellstill")
    parts = [value(f"condition_knn_{part}", method="cellstill") for part in both]
    alone = [value("condition_knn", method=f"cellstill, {part.upper()} alone") for part in both]
    what = "condition from the joint latent, kNN"
    section.checks = [
        Check(what, joint, ">=", _most(parts), "the better of its own parts"),
        Check(what, joint, ">=", _most(alone), "the better model of one modality"),
    ]
    show_rows(section)
    return section


def proteins(options: Options) -> Section | None:
    """RNA and proteins: a fifth of the cells, others for each seed, have their RNA alone."""
    name, missing = "citeseq_pbmc_hashed", "held_out"
    if not options.wants(name):
        return None
    kept = options.kept("multimodal_proteins")
    _, whole = _paired(name, {"rna": 500, "prot": None}, options)
    shapes = {part: list(each.shape) for part, each in whole.mod.items()}
    section = Section("CITE-seq: proteins of cells that have RNA alone", PROTEIN_COLUMNS, data=shapes)
    path = options.scratch / f"{name}_held_out.h5mu"
    runs = []
    for seed in range(options.seeds):
        mdata = whole.copy()
        held_out = np.zeros(mdata.n_obs, dtype=bool)
        held_out[np.random.default_rng(seed).choice(mdata.n_obs, mdata.n_obs // 5, replace=False)] = True
        mdata.obs[missing] = held_out
        true = mdata["prot"].X[held_out].toarray()
        mdata["prot"].X = sp.csr_matrix(sp.diags_array((~held_out).astype(np.float32)) @ mdata["prot"].X)
        mdata.write(path)
        ours = {"modalities": ("rna", "prot"), "predicted": "prot", "missing": missing}
        for method in (
            Method("cellstill", "joint", {**ours, "train": options.train}),
            Method("TOTALVI", "totalvi", {"missing": missing, **options.train}),
            Method("neighbours in RNA components", "nearest", {"predicted": "prot", "missing": missing}),
        ):
            if not options.runs(method.label):
                continue
            result = run_method(method, path, seed, None, section, options, name)
            if result is not None:
                scores = prediction_scores(result.arrays["predicted"], true)
                runs.append({"method": method.label, "seed": seed, **result.numbers, **scores})
    runs = options.with_kept(kept, section, runs, PROTEINS)
    section.rows = mean_rows(runs, ["method"])
    ours, peer = (value_of(section.rows, "pearson", method=method) for method in ("cellstill", "TOTALVI"))
    section.checks = [Check("proteins of held-out cells, mean correlation", ours, ">=", peer, "TOTALVI's")]
    show_rows(section)
    return section


def _paired(name: str, quick: Mapping[str, int | None], options: Options) -> tuple[Path, Any]:
    """Store the named modalities; ``quick`` says how many features of each a quick run keeps."""
    import mudata

    whole = mudata.read_h5mu(options.data_dir / f"{name}.h5mu")
    parts = {}
    for part, n_vars in quick.items():
        adata = whole[part]
        if options.quick and n_vars is not None:
            largest = np.asarray(adata.X.sum(axis=0)).ravel().argsort()[::-1][:n_vars]
            adata = adata[:, largest]
        parts[part] = ad.AnnData(sp.csr_matrix(adata.X, dtype=np.float32), obs=adata.obs[[]], var=adata.var[[]])
    mdata = mudata.MuData(parts)
    columns = [column for column in whole.obs if ":" not in column]
    mdata.obs = mdata.obs.join(whole.obs[columns])
    path = options.scratch / f"{name}.h5mu"
    mdata.write(path)
    return path, mdata


def _most(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return max(known) if len(known) == len(values) else None
