"""From a file of counts to a folder of results: what ``integrate`` runs, and ``demo`` after it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cellstill.cli._memory import peak_mb, used_mb
from cellstill.cli._outputs import MAX_DRAWN, draw_figures, versions, write_data, write_json
from cellstill.cli._scores import MAX_SCORED, Scores, sample_cells, scorable_labels, score
from cellstill.cli._terminal import Terminal
from cellstill.errors import InvalidArgumentError, check_key, check_option
from cellstill.io.anndata import StoredAnnData, open_anndata

if TYPE_CHECKING:
    from anndata import AnnData

    from cellstill import Distiller

RESULTS = ("figures", "integrated.h5ad", "model", "summary.json")
"""Names in a folder of results; one that holds anything else is never replaced."""

BEFORE, AFTER = "before (PCA)", "after (student)"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What ``cellstill integrate`` was asked for; its ``--help`` explains every one."""

    path: Path
    batch_key: str
    layer: str | None = None
    label_key: str | None = None
    covariate_keys: tuple[str, ...] = ()
    teacher: str = "harmony"
    teacher_settings: Mapping[str, Any] = field(default_factory=dict)
    n_latent: int = 50
    pca_method: str = "standard"
    n_epochs_encoder: int = 100
    n_epochs_decoder: int = 100
    corrected: bool = False
    target_batches: tuple[str, ...] = ()
    allow_noninteger: bool = False
    accelerator: str = "auto"
    seed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return a form that JSON can hold, with the name of the input but not its folder."""
        return asdict(self) | {"path": self.path.name}


@dataclass(frozen=True)
class Integration:
    """What a run made, for whoever goes on from here.

    Attributes
    ----------
    adata
        The cells as the model read them.
    model
        The trained student.
    scores
        Before and after.
    summary
        Content of ``summary.json``.
    """

    adata: AnnData
    model: Distiller
    scores: Scores
    summary: dict[str, Any]


def integrate_file(settings: Settings, folder: Path, term: Terminal) -> Integration:
    """Integrate a file and write the results into an existing folder.

    Parameters
    ----------
    settings
        What to do.
    folder
        Where ``integrated.h5ad``, ``model/``, ``figures/`` and ``summary.json`` go.
    term
        Where to report.

    Raises
    ------
    CellstillError
        The file, a key or the counts cannot be used; raised before anything takes long.
    """
    started = time.perf_counter()
    with open_anndata(settings.path) as stored:
        _check_keys(stored, settings)
        with term.stage("load", "Loading libraries"):
            import cellstill.distill
            import cellstill.pl  # noqa: F401 - what is loaded now is not counted as memory of the integration
        with term.stage("read", f"Reading {settings.path.name}: {stored.shape[0]:,} cells x {stored.shape[1]:,} genes"):
            obsm_key = settings.teacher_settings.get("obsm_key")
            adata, layer = read_counts(stored, settings.layer, () if obsm_key is None else (obsm_key,))
        with term.stage("check", "Checking counts, batches and settings"):
            label_key = scorable_labels(adata.obs, settings.batch_key, settings.label_key)
            model = _build(adata, layer, settings)
        loaded = used_mb()
        epochs = f"at most {settings.n_epochs_encoder} + {settings.n_epochs_decoder} epochs"
        with term.stage("train", f"Teaching ({settings.teacher}) and training the student ({epochs})"):
            model.train(
                settings.n_epochs_encoder,
                settings.n_epochs_decoder,
                accelerator=settings.accelerator,
                progress=term.verbose and term.err.is_terminal,
            )
        with term.stage("encode", "Encoding the cells"):
            embeddings = _embeddings(model, settings.teacher)
        nominal = list(model._fitted().design.levels)
        with term.stage("score", "Scoring batch mixing and label conservation"):
            cells = sample_cells(adata.n_obs, MAX_SCORED, settings.seed)
            scores = score(
                {name: array[cells] for name, array in embeddings.items()},
                adata.obs.iloc[cells],
                batch_key=settings.batch_key,
                label_key=label_key,
                covariate_keys=nominal,
                seed=settings.seed,
            )
        with term.stage("draw", "Drawing the figures"):
            drawn = sample_cells(adata.n_obs, MAX_DRAWN, settings.seed)
            draw_figures(
                folder / "figures",
                {name: embeddings[name][drawn] for name in (BEFORE, AFTER)},
                adata.obs.iloc[drawn],
                list(dict.fromkeys([settings.batch_key, *filter(None, [settings.label_key]), *nominal])),
                model.history,
                seed=settings.seed,
            )
        with term.stage("write", "Writing integrated.h5ad and the model"):
            model.save(folder / "model")
            before, teacher, after = embeddings.values()
            write_data(
                settings.path,
                folder / "integrated.h5ad",
                obsm={"X_pca_uncorrected": before, "X_teacher": teacher, "X_cellstill": after},
                record={"settings": settings.to_dict(), "versions": versions()},
                shape=adata.shape,
                corrected=_corrected(model, settings),
            )
    peak = peak_mb()
    summary = {
        "input": _describe(adata, layer, settings),
        "settings": settings.to_dict(),
        "teacher": {
            **model.teacher.to_dict(),
            "reference": model.teacher.info.reference,
            "record": model._fitted().record,
        },
        "training": _training(model),
        "student_teacher_r2": model.get_teacher_agreement() if len(model.validation_indices_) > 1 else None,
        "scores": scores.to_dict(),
        "n_cells_drawn": len(drawn),
        "seconds": term.seconds | {"total": time.perf_counter() - started},
        "memory_mb": {"loaded": loaded, "peak": peak, "increase": max(peak - loaded, 0.0)},
        "versions": versions(),
        "warnings": list(term.warnings),
    }
    write_json(folder / "summary.json", summary)
    return Integration(adata, model, scores, summary)


def _check_keys(stored: StoredAnnData, settings: Settings) -> None:
    """Check what can be checked before anything is imported or read."""
    check_key("batch_key", settings.batch_key, "adata.obs", stored.obs.columns)
    if settings.label_key is not None:
        check_key("labels_key", settings.label_key, "adata.obs", stored.obs.columns)
    for key in settings.covariate_keys:
        check_key("covariate_keys", key, "adata.obs", stored.obs.columns)
    if settings.layer is not None:
        check_key("layer", settings.layer, "adata.layers", stored.layers)


def read_counts(stored: StoredAnnData, layer: str | None, obsm_keys: Sequence[str] = ()) -> tuple[AnnData, str | None]:
    """Read the counts into memory, and leave all other matrices on disk; returns the layer they are in, too."""
    from cellstill.distill.setup import find_counts

    adata = stored.to_adata(obsm_keys)
    layer = find_counts(adata, layer)
    matrix = stored.matrix(layer)
    if matrix is None:
        return adata, layer
    if layer is None:
        adata.X = matrix.to_csr()
    else:
        adata.layers[layer] = matrix.to_csr()
    return adata, layer


def check_accelerator(accelerator: str) -> None:
    """Refuse a GPU that is not there.

    Raises
    ------
    InvalidArgumentError
        ``accelerator`` is ``"gpu"``, and torch finds no CUDA device.
    """
    import torch

    if accelerator == "gpu" and not torch.cuda.is_available():
        raise InvalidArgumentError("accelerator='gpu': torch finds no CUDA device. Use accelerator='auto'.")


def _build(adata: AnnData, layer: str | None, settings: Settings) -> Distiller:
    """Set the model up, which checks the data, and check what would otherwise come to light in training."""
    from cellstill import Distiller
    from cellstill.teachers import get_teacher

    check_accelerator(settings.accelerator)
    teacher = get_teacher(settings.teacher, **settings.teacher_settings)
    if settings.covariate_keys and not teacher.info.protection:
        raise InvalidArgumentError(
            f"covariate_keys={list(settings.covariate_keys)}: the teacher {settings.teacher!r} cannot protect "
            "covariates. Take another teacher, or leave them out."
        )
    model = Distiller(
        adata,
        settings.batch_key,
        layer=layer,
        labels_key=settings.label_key,
        covariate_keys=settings.covariate_keys,
        allow_noninteger=settings.allow_noninteger,
        teacher=teacher,
        n_latent=settings.n_latent,
        pca_method=settings.pca_method,  # type: ignore[arg-type]
        seed=settings.seed,
    )
    for batch in settings.target_batches:
        check_option("target_batch", batch, model.batch_names)
    most = min(adata.shape) - 1
    if settings.n_latent > most:
        raise InvalidArgumentError(
            f"n_latent={settings.n_latent} is too many for {adata.n_obs} cells x {adata.n_vars} genes. Use at most "
            f"{most}."
        )
    return model


def _embeddings(model: Distiller, teacher: str) -> dict[str, np.ndarray]:
    fitted, counts = model._fitted(), model._cells().counts
    pca = fitted.pca
    if fitted.scaling is not None:
        from cellstill.data import fit_pca

        # The model's own components are of scaled counts: those before any correction are of the counts as they are.
        pca = fit_pca(counts, pca.components.shape[1], method=pca.method, seed=model.seed)
    return {
        BEFORE: pca.transform(counts),
        f"teacher ({teacher})": model.latent.teacher,
        AFTER: model.latent.student,
    }


def _corrected(model: Distiller, settings: Settings) -> Any:
    if not settings.corrected:
        return None
    target = list(settings.target_batches) or None
    return lambda layer: model.corrected_expression(target, out=layer)


def _describe(adata: AnnData, layer: str | None, settings: Settings) -> dict[str, Any]:
    counts = adata.X if layer is None else adata.layers[layer]
    depth = np.asarray(counts.sum(axis=1)).ravel()
    return {
        "name": settings.path.name,
        "n_obs": adata.n_obs,
        "n_vars": adata.n_vars,
        "counts": "X" if layer is None else f"layers/{layer}",
        "density": counts.nnz / np.prod(adata.shape),
        "median_library_size": float(np.median(depth)),
        "batches": adata.obs[settings.batch_key].astype(str).value_counts().to_dict(),
    }


def _training(model: Distiller) -> dict[str, Any]:
    """Epochs of each phase, and the best of them."""
    phases = {}
    for phase, losses in model.history.items():
        record: dict[str, Any] = {"epochs": len(losses)}
        if "validation_loss" in losses:
            record |= {
                "best_epoch": int(losses["validation_loss"].idxmin()),
                "best_validation_loss": float(losses["validation_loss"].min()),
            }
        phases[phase] = record
    return phases
