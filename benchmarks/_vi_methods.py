"""The jobs of ``vi_peers.py``, each a function that fits and returns another that tells the result."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from _methods import Finish, harmony, pca, scvi
from anndata import AnnData

__all__ = [
    "harmony",
    "import_libraries",
    "joint",
    "multivi",
    "nearest",
    "pca",
    "regularised",
    "scvi",
    "soup",
    "steps",
    "totalvi",
]

LIBRARIES = {
    "pca": ["cellstill.data"],
    "nearest": ["cellstill.data"],
    "harmony": ["cellstill.data", "harmonypy"],
    "scvi": ["scvi"],
    "multivi": ["scvi"],
    "totalvi": ["scvi"],
    "regularised": ["cellstill.vi"],
    "soup": ["cellstill.vi"],
    "steps": ["cellstill.vi"],
    "joint": ["cellstill.vi"],
}
"""What each job imports before anything is measured."""


def regularised(
    adata: AnnData,
    batch_key: str | None,
    seed: int,
    *,
    keys: Mapping[str, Any],
    train: Mapping[str, Any],
    **init: Any,
) -> Finish:
    """AmbientRegularizedSCVI: latent means."""
    model = _fitted(adata, batch_key, seed, keys, train, init)
    return lambda: ({"embedding": model.get_latent_representation()}, {"epochs": _epochs(model)})


def soup(
    adata: AnnData,
    batch_key: str | None,
    seed: int,
    *,
    keys: Mapping[str, Any],
    train: Mapping[str, Any],
    **init: Any,
) -> Finish:
    """AmbientRegularizedSCVI: denoised counts, ambient profile and fraction of each cell."""
    model = _fitted(adata, batch_key, seed, keys, train, init)

    def finish() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        observed = sp.csr_matrix(adata.X)
        denoised, drawn = model.get_denoised_counts(), model.get_denoised_counts(integer=True)
        arrays = {
            "data": denoised.data,
            "indices": denoised.indices,
            "indptr": denoised.indptr,
            "fraction": model.get_ambient_fraction().to_numpy(),
            "profile": model.get_ambient_profile().to_numpy(),
        }
        above = max(float((each - observed).max()) for each in (denoised, drawn))
        return arrays, {"epochs": _epochs(model), "above_raw": above}

    return finish


def steps(
    adata: AnnData,
    batch_key: str | None,
    seed: int,
    *,
    set_ups: Mapping[str, Mapping[str, Any]],
    batch_size: int,
    n_turns: int,
    n_hidden: int,
    n_latent: int,
) -> Finish:
    """Milliseconds of a training step of set-ups, and of the engine's plain model, turn by turn in one process.

    What slows a machine down for a while falls on all of them alike; their ratio is that of each turn.
    """
    from _engine_model import VAE

    from cellstill import AmbientRegularizedSCVI
    from cellstill.data import CountsLoader
    from cellstill.nn.compiled import compiled
    from cellstill.train.fit import fit, seeded

    rows, size = np.arange(adata.n_obs), {"n_hidden": n_hidden, "n_latent": n_latent}
    with seeded(seed):
        plain = VAE(adata.n_vars, **size)
    settings = {"batch_size": batch_size, "shuffle": True, "seed": seed}
    trained: dict[str, Any] = {"plain": (plain, CountsLoader(adata.X, indices=rows, **settings))}
    for label, keys in set_ups.items():
        AmbientRegularizedSCVI.setup_anndata(adata, batch_key=batch_key, **keys)
        model = AmbientRegularizedSCVI(adata, seed=seed, **size)
        trained[label] = model.module, model._cells().loader(rows, **settings)
    turns: dict[str, list[float]] = {label: [] for label in trained}
    with compiled(True), seeded(seed):
        # The first turn compiles, or loads what was compiled, and is not counted.
        for _ in range(n_turns + 1):
            for label, (module, loader) in trained.items():
                history = fit(module, loader, max_epochs=1, patience=None, accelerator="cpu")
                turns[label].append(1e3 * history.attrs["seconds"][0] / len(loader))
    times = pd.DataFrame(turns).iloc[1:]
    numbers = {f"step_ms {label}": float(times[label].median()) for label in times}
    numbers |= {f"of_plain {label}": float((times[label] / times["plain"]).median()) for label in times}
    return lambda: ({}, numbers)


def joint(
    mdata: Any,
    batch_key: str | None,
    seed: int,
    *,
    modalities: Sequence[str],
    train: Mapping[str, Any],
    predicted: str | None = None,
    missing: str | None = None,
    **init: Any,
) -> Finish:
    """RegularizedMultimodalVI: latents; with ``predicted``, that modality of the cells that ``missing`` marks."""
    from cellstill import RegularizedMultimodalVI

    RegularizedMultimodalVI.setup_mudata(mdata, modalities=modalities, batch_key=batch_key)
    model = RegularizedMultimodalVI(mdata, seed=seed, **init).train(progress=False, **train)

    def finish() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        arrays = {"embedding": model.get_latent_representation()}
        arrays |= {f"embedding_{name}": part for name, part in model.get_modality_latents().items()}
        if predicted is not None:
            arrays["predicted"] = model.get_normalized_expression(
                indices=mdata.obs[missing].to_numpy(dtype=bool),
                modality=predicted,
                library_size="latent",
                include_background=model.module.modality(predicted).background is not None,
                return_numpy=True,
            )
        return arrays, {"epochs": _epochs(model)}

    return finish


def multivi(
    mdata: Any, batch_key: str | None, seed: int, *, accelerator: str = "cpu", max_epochs: int | None = None
) -> Finish:
    """MultiVI at its defaults: its joint latent, and what it makes of each modality alone."""
    import scvi as scvi_tools

    scvi_tools.settings.seed = seed
    scvi_tools.settings.verbosity = 40
    names = {"rna_layer": "rna", "atac_layer": "atac"}
    scvi_tools.model.MULTIVI.setup_mudata(mdata, modalities=names, batch_key=batch_key)
    model = scvi_tools.model.MULTIVI(mdata, n_genes=mdata["rna"].n_vars, n_regions=mdata["atac"].n_vars)
    epochs = {} if max_epochs is None else {"max_epochs": max_epochs}
    model.train(accelerator=accelerator, enable_progress_bar=False, **epochs)

    def finish() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        arrays = {"embedding": model.get_latent_representation()}
        for name, own in (("rna", "expression"), ("atac", "accessibility")):
            arrays[f"embedding_{name}"] = model.get_latent_representation(modality=own)
        return arrays, {"epochs": len(model.history["elbo_train"])}

    return finish


def totalvi(
    mdata: Any,
    batch_key: str | None,
    seed: int,
    *,
    missing: str,
    accelerator: str = "cpu",
    max_epochs: int | None = None,
) -> Finish:
    """TOTALVI at its defaults: proteins of the cells that ``missing`` marks, which form a batch without proteins."""
    import scvi as scvi_tools

    scvi_tools.settings.seed = seed
    scvi_tools.settings.verbosity = 40
    held_out = mdata.obs[missing].to_numpy(dtype=bool)
    mdata.obs["panel"] = pd.Categorical(np.where(held_out, "without", "with"))
    mdata["prot"].X = np.asarray(mdata["prot"].X.todense())
    names = {"rna_layer": "rna", "protein_layer": "prot", "batch_key": None}
    scvi_tools.model.TOTALVI.setup_mudata(mdata, modalities=names, batch_key="panel")
    model = scvi_tools.model.TOTALVI(mdata)
    model.train(max_epochs=max_epochs, accelerator=accelerator, enable_progress_bar=False)

    def finish() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        _, proteins = model.get_normalized_expression(
            indices=np.flatnonzero(held_out),
            transform_batch=["with"],
            n_samples=25,
            include_protein_background=True,
            return_numpy=True,
        )
        arrays = {"embedding": model.get_latent_representation(), "predicted": np.asarray(proteins)}
        return arrays, {"epochs": len(model.history["elbo_train"])}

    return finish


def nearest(mdata: Any, batch_key: str | None, seed: int, *, predicted: str, missing: str) -> Finish:
    """The mean log1p counts of the 15 nearest cells in 20 principal components of RNA: a null that learns nothing."""
    from sklearn.neighbors import NearestNeighbors

    from cellstill.data.pca import fit_pca

    held_out = mdata.obs[missing].to_numpy(dtype=bool)
    counts = sp.csr_matrix(mdata["rna"].X)
    components = fit_pca(counts, 20, method="pearson_residuals", seed=seed).transform(counts)
    near = NearestNeighbors(n_neighbors=15).fit(components[~held_out]).kneighbors(components[held_out])[1]
    known = np.log1p(sp.csr_matrix(mdata[predicted].X)[~held_out].toarray())
    return lambda: ({"predicted": np.expm1(known[near].mean(axis=1))}, {})


def import_libraries(method: str) -> None:
    """Import what a job needs."""
    for name in LIBRARIES[method]:
        importlib.import_module(name)


def _fitted(
    adata: AnnData,
    batch_key: str | None,
    seed: int,
    keys: Mapping[str, Any],
    train: Mapping[str, Any],
    init: Mapping[str, Any],
) -> Any:
    from cellstill import AmbientRegularizedSCVI

    AmbientRegularizedSCVI.setup_anndata(adata, batch_key=batch_key, **keys)
    return AmbientRegularizedSCVI(adata, seed=seed, **init).train(**{"progress": False, **train})


def _epochs(model: Any) -> int:
    return len(model.history_["loss_train"])
