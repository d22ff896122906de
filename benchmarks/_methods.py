"""The methods, each a function that fits and returns another that tells the result.

Only the first part is timed. Every method starts from raw counts in ``adata.X`` and uses the CPU.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from anndata import AnnData

from cellstill.data.pca import PCAMethod, fit_pca

N_COMPONENTS = 50
LIBRARIES = {
    "pca": ["cellstill.data"],
    "harmony": ["cellstill.data", "harmonypy"],
    "teacher": ["cellstill.data.covariates", "cellstill.teachers", "harmonypy"],
    "scvi": ["scvi"],
    "scdistill": ["scdistill", "harmonypy"],
    "cellstill": ["cellstill.distill", "cellstill.teachers", "harmonypy"],
}
"""What each method imports before anything is measured."""

Finish = Callable[[], tuple[dict[str, np.ndarray], dict[str, Any]]]


def pca(adata: AnnData, batch_key: str, seed: int, *, pca_method: PCAMethod) -> Finish:
    """Principal components, uncorrected: the null."""
    embedding = fit_pca(adata.X, _components(adata), method=pca_method, seed=seed).transform(adata.X)
    return lambda: ({"embedding": embedding}, {})


def harmony(adata: AnnData, batch_key: str, seed: int, *, pca_method: PCAMethod, **settings: Any) -> Finish:
    """Harmony alone, through harmonypy, on the same principal components."""
    import harmonypy

    components = fit_pca(adata.X, _components(adata), method=pca_method, seed=seed).transform(adata.X)
    result = harmonypy.run_harmony(
        components.astype(np.float64), adata.obs, [batch_key], random_state=seed, verbose=False, **settings
    )

    def finish() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        return {"embedding": np.asarray(result.Z_corr)}, {"n_iter": len(result.objective_harmony) - 1}

    return finish


def teacher(
    adata: AnnData, batch_key: str, seed: int, *, pca_method: PCAMethod, covariate_keys: Sequence[str] = ()
) -> Finish:
    """Our Harmony teacher alone: nothing is trained."""
    from cellstill.data.covariates import CovariateDesign
    from cellstill.teachers import HarmonyTeacher, TeacherInput

    lesson = HarmonyTeacher().teach(
        TeacherInput(
            pca=fit_pca(adata.X, _components(adata), method=pca_method, seed=seed).transform(adata.X),
            batch=adata.obs[batch_key].astype("category").cat.codes.to_numpy(dtype=np.int64),
            obs=adata.obs,
            design=CovariateDesign.fit(adata.obs, list(covariate_keys)),
            seed=seed,
        )
    )
    return lambda: ({"embedding": lesson.embedding}, lesson.record)


def scvi(
    adata: AnnData,
    batch_key: str,
    seed: int,
    *,
    n_hidden: int = 128,
    n_latent: int = 10,
    max_epochs: int | None = None,
    accelerator: str = "cpu",
) -> Finish:
    """scVI, everything else at its defaults; epochs by its own rule, 400 at most."""
    import scvi as scvi_tools

    scvi_tools.settings.seed = seed
    scvi_tools.settings.verbosity = 40
    adata = adata.copy()
    scvi_tools.model.SCVI.setup_anndata(adata, batch_key=batch_key)
    model = scvi_tools.model.SCVI(adata, n_hidden=n_hidden, n_latent=n_latent)
    model.train(max_epochs=max_epochs, accelerator=accelerator, enable_progress_bar=False)
    return lambda: ({"embedding": model.get_latent_representation()}, {"epochs": len(model.history["elbo_train"])})


def fit_scdistill(
    adata: AnnData, batch_key: str, seed: int, *, train: Mapping[str, Any] | None = None, **init: Any
) -> Any:
    """Train the peer's model, with its Harmony teacher and its own defaults."""
    import harmonypy
    import scdistill as peer
    import torch

    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - the peer draws from it
    run_harmony = harmonypy.run_harmony
    if not getattr(run_harmony, "turned", False):
        # scdistill 0.3.1 transposes Z_corr, which harmonypy 2.1 already returns as cells x components.
        def turned(*args: Any, **kwargs: Any) -> SimpleNamespace:
            return SimpleNamespace(Z_corr=np.asarray(run_harmony(*args, **kwargs).Z_corr).T)

        turned.turned = True  # type: ignore[attr-defined]
        harmonypy.run_harmony = turned
    model = peer.Distiller(adata, batch_key=batch_key, device="cpu", **{"n_latent": _components(adata), **init})
    model.train(verbose=False, **(train or {}))
    return model


def scdistill(adata: AnnData, batch_key: str, seed: int, **settings: Any) -> Finish:
    """The peer (:func:`fit_scdistill`)."""
    model = fit_scdistill(adata, batch_key, seed, **settings)

    def finish() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        student, teacher = model.latent.student, model.latent.teacher
        return {"embedding": student, "teacher": teacher}, {
            "epochs": sum(len(phase["loss"]) for phase in model.history.values()),
            "r2_training_cells": r2(teacher, student),
        }

    return finish


def cellstill(
    adata: AnnData,
    batch_key: str,
    seed: int,
    *,
    train: dict[str, Any] | None = None,
    teacher: dict[str, Any] | None = None,
    **init: Any,
) -> Finish:
    """Our Distiller with its Harmony teacher."""
    from cellstill import Distiller
    from cellstill.teachers import HarmonyTeacher

    model = Distiller(
        adata,
        batch_key=batch_key,
        teacher=HarmonyTeacher(**(teacher or {})),
        seed=seed,
        **{"n_latent": _components(adata), **init},
    )
    model.train(accelerator="cpu", progress=False, **(train or {}))

    def finish() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        target, student, test = model.latent.teacher, model.latent.student, model.test_indices_
        numbers = {
            "epochs": sum(len(phase) for phase in model.history.values()),
            "r2_training_cells": model.get_teacher_agreement("train"),
        }
        if len(test) > 1:
            kind: PCAMethod = "standard" if model.pca_method == "standard" else "pearson_residuals"
            uncorrected = fit_pca(adata.X, model.n_latent, method=kind, seed=seed).transform(adata.X)
            numbers["r2_held_out"] = model.get_teacher_agreement("test")
            numbers["r2_of_pca"] = r2(target[test], uncorrected[test])
        return {"embedding": student, "teacher": target}, numbers

    return finish


def r2(truth: np.ndarray, estimate: np.ndarray) -> float:
    """R^2 of each dimension, averaged uniformly over dimensions."""
    residual = np.square(truth - estimate).sum(axis=0)
    return float(np.mean(1 - residual / np.square(truth - truth.mean(axis=0)).sum(axis=0)))


def tiny_data() -> AnnData:
    """A few cells with the columns of every data set, to warm up on."""
    from cellstill.data.simulate import simulate_counts

    adata = simulate_counts(n_obs=200, n_vars=100, n_batches=2)
    adata.obs["sample"] = adata.obs["donor"]
    return adata


def import_libraries(method: str) -> None:
    """Import what a method needs."""
    for name in LIBRARIES[method]:
        importlib.import_module(name)


def shortened(method: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings with a single epoch."""
    if method in ("cellstill", "scdistill"):
        train = {**settings.get("train", {}), "n_epochs_encoder": 1, "n_epochs_decoder": 1}
        return {**settings, "train": train}
    return {**settings, "max_epochs": 1} if method == "scvi" else settings


def pin_threads(threads: int) -> None:
    """Pin torch; BLAS and numba read the environment."""
    import torch

    torch.set_num_threads(threads)


def _components(adata: AnnData) -> int:
    return min(N_COMPONENTS, min(adata.shape) - 1)
