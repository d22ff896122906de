"""Whether condensed cells tell their donors: the data are condensed twice, from halves of the donors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd

from cellstill import SCDD
from cellstill.metrics import paired_membership_inference

N_REFERENCE = 6
PER_CLASS = 10
GENERATED = (50, 500)

COLUMNS = {
    "released": "released",
    "n_cells": "cells|.0f",
    "release": "attacked",
    "attack": "attack",
    "n_runs": "draws|d",
    "auroc": "AUROC|.3f",
    "auroc_low": "low|.3f",
    "auroc_high": "high|.3f",
    "tpr": "TPR at 1 % FPR|.3f",
    "detected": "detected in|.2f",
}


def attacked(adata: ad.AnnData, folder: Path, draw: int, resume: bool) -> pd.DataFrame | None:
    """Attack the releases of one draw of halves, made now unless that was done before; ``None`` if they are missing."""
    names = np.unique(adata.obs["donor"].astype(str))
    order = np.random.default_rng(draw).permutation(names)
    reference, rest = order[:N_REFERENCE], order[N_REFERENCE:]
    halves = (rest[: len(rest) // 2], rest[len(rest) // 2 :])
    made = []
    for number, half in enumerate(halves):
        place = folder / f"{draw}-{number}"
        if not place.exists():
            if not resume:
                return None
            _release(adata[adata.obs["donor"].isin(half)].copy(), place, draw)
        made.append({path.stem: ad.read_h5ad(path) for path in sorted(place.glob("*.h5ad"))})
    found = []
    for released in made[0]:
        both = [half[released] for half in made]
        # Genes without a count in the cells that were learned from are in no release.
        genes = [gene for gene in adata.var_names if all(gene in cells.var_names for cells in both)]
        table = paired_membership_inference(
            (both[0][:, genes].X, both[1][:, genes].X),
            adata[:, genes].X,
            adata.obs["donor"],
            members=(both[0].uns["members"], both[1].uns["members"]),
            reference=reference,
            seed=draw,
        )
        n_cells = sum(cells.n_obs for cells in both) / 2
        found.append(table.assign(released=released.replace("_", " "), n_cells=n_cells))
    return pd.concat(found, ignore_index=True)


def rows(found: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Means over draws, and in what share of them membership was detected."""
    by = found.groupby(["released", "release", "attack"], sort=False)
    for (released, release, attack), runs in by:
        means = runs[["n_cells", "auroc", "auroc_low", "auroc_high", "tpr"]].mean().to_dict()
        told = {"released": released, "release": release, "attack": attack, "n_runs": len(runs)}
        yield {**told, **means, "detected": float(runs["detected"].mean())}


def _release(half: ad.AnnData, place: Path, seed: int) -> None:
    """Condense and generate from some donors, and keep the cells with the names of those that were learned from."""
    SCDD.setup_anndata(half, labels_key="cell_type", donor_key="donor")
    model = SCDD(half, n_top_genes=None, seed=seed)
    model.train(accelerator="cpu", progress=False)
    members = np.unique(half.obs["donor"].astype(str).to_numpy()[model.problem.rows["train"]])
    ways: dict[str, Callable[[], ad.AnnData]] = {
        f"condensed_{PER_CLASS}_per_class": lambda: model.condense(PER_CLASS, progress=False),
        **{
            f"generated_{n}_per_class": lambda n=n: ad.concat([model.generate(name, n) for name in model.classes])
            for n in GENERATED
        },
    }
    unfinished = place.with_suffix(".part")
    unfinished.mkdir(parents=True, exist_ok=True)
    for name, make in ways.items():
        cells = make()
        ad.AnnData(cells.X, cells.obs[[]], cells.var[[]], uns={"members": members}).write_h5ad(
            unfinished / f"{name}.h5ad"
        )
    unfinished.replace(place)
