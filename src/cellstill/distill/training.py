"""The two phases: imitate the teacher, then explain the counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch

from cellstill.data.covariates import CovariateDesign
from cellstill.data.gene_scaling import GeneScaling
from cellstill.data.loader import CountsLoader, check_shares, split_cells
from cellstill.data.pca import PCA, PCAMethod, fit_pca
from cellstill.distill.cells import Cells
from cellstill.distill.fitted import Fitted, build_networks
from cellstill.errors import above_zero, check_option, whole_number
from cellstill.nn.compiled import CompileMode, check_compile, compiled
from cellstill.teachers import Teacher, TeacherInput, TeacherOutput
from cellstill.train.devices import ACCELERATORS, PRECISIONS, join
from cellstill.train.fit import fit, seeded
from cellstill.train.progress import OnEpoch

ComponentsMethod = Literal["standard", "pearson_residuals", "scaled_residuals"]
"""What the principal components are of; see :class:`~cellstill.Distiller`."""

_EVALUATION_BATCH = 1024


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """Settings of :meth:`Distiller.train`, documented there."""

    n_epochs_encoder: int
    n_epochs_decoder: int
    lr: float
    batch_size: int
    train_size: float
    validation_size: float | None
    patience: int | None
    weight_decay: float
    accelerator: str
    devices: int
    precision: str
    compile: CompileMode
    progress: bool | OnEpoch
    checkpoint: Path | None
    resume: bool
    seed: int

    def __post_init__(self) -> None:
        # All at once, before PCA and teacher have taken their time.
        for name, least in {"n_epochs_encoder": 0, "n_epochs_decoder": 0, "batch_size": 1}.items():
            object.__setattr__(self, name, whole_number(name, getattr(self, name), least=least))
        if self.patience is not None:
            object.__setattr__(self, "patience", whole_number("patience", self.patience, least=0))
        object.__setattr__(self, "lr", above_zero("lr", self.lr))
        check_option("accelerator", self.accelerator, ACCELERATORS)
        check_option("precision", self.precision, PRECISIONS)
        check_compile(self.compile)
        check_shares(self.train_size, self.validation_size)


def distill(
    cells: Cells,
    *,
    genes: list[str],
    batch_names: list[str],
    labels: list[str] | None,
    design: CovariateDesign,
    obsm: Mapping[str, Any],
    teacher: Teacher,
    pca_method: ComponentsMethod,
    n_latent: int,
    network: Mapping[str, Any],
    settings: TrainingSettings,
) -> tuple[Fitted, dict[str, pd.DataFrame]]:
    """Run the teacher and train its student.

    Returns
    -------
    The trained model, and the losses of both phases per epoch.
    """
    # What several processes could compute to other last digits, the first computes for all.
    ranks = join(settings.accelerator, settings.devices)

    scaling = None
    if pca_method == "scaled_residuals":
        scaling = ranks.from_first(lambda: GeneScaling.fit(cells.counts, cells.batch, design.encode(cells.obs)))
        cells = replace(cells, scaled=scaling.apply(cells.counts, cells.batch))

    def teach() -> tuple[PCA, np.ndarray, TeacherOutput]:
        method: PCAMethod = "standard" if pca_method == "standard" else "pearson_residuals"
        pca = fit_pca(cells.encoded, n_latent, method=method, seed=settings.seed)
        components = pca.transform(cells.encoded)
        inputs = TeacherInput(
            pca=components, batch=cells.batch, obs=cells.obs, design=design, obsm=obsm, seed=settings.seed
        )
        return pca, components, teacher.teach(inputs)

    pca, components, lesson = ranks.from_first(teach)
    center, scale = lesson.embedding.mean(axis=0), lesson.embedding.std(axis=0)
    scale[scale < 1e-6 * max(float(scale.max()), 1e-12)] = 1.0
    target = (lesson.embedding - center) / scale

    train, validation, test = split_cells(len(cells), settings.train_size, settings.validation_size, seed=settings.seed)
    train, validation, test = _with_every_batch(cells.batch, train, validation, test)
    if teacher.info.in_pca_space:
        weight, bias = np.diag(1 / scale), -center / scale
    else:
        weight, bias = ranks.from_first(lambda: _ridge(components[train], target[train]))

    with seeded(settings.seed, settings.accelerator):
        encoder, decoder = build_networks(
            weight=weight,
            bias=bias,
            n_batches=len(batch_names),
            n_covariates=design.n_columns,
            gene_fraction=pca.gene_fraction,
            **network,
        )
        loaders = _loaders(cells.encoded, {"pca": components, "target": target}, train, validation, settings)
        history = {"encoder": _phase("encoder", encoder, loaders, settings.n_epochs_encoder, settings, cells)}
        fitted = Fitted(
            pca=pca,
            encoder=encoder.requires_grad_(False),
            decoder=decoder,
            center=center,
            scale=scale,
            teacher_latent=lesson.embedding,
            student_latent=np.empty((0, len(center)), dtype=np.float32),
            obs_names=[str(name) for name in cells.obs.index],
            genes=genes,
            batch_names=batch_names,
            design=design,
            labels=labels,
            splits={"train": train, "validation": validation, "test": test},
            usual_misfit=np.empty(0),
            record=lesson.record,
            scaling=scaling,
        )
        # The encoder is frozen now: each cell is encoded once, not once per epoch.
        with compiled(settings.compile, n_values=float(np.prod(cells.counts.shape))):
            latent = ranks.from_first(lambda: fitted.encode(cells))
        fitted.student_latent = fitted.to_teacher(latent)
        levels, continuous = design.codes(cells.obs)
        per_cell = {"z": latent, "batch": cells.batch, "levels": levels, "continuous": continuous}
        loaders = _loaders(cells.counts, per_cell, train, validation, settings)
        history["decoder"] = _phase("decoder", decoder, loaders, settings.n_epochs_decoder, settings, cells)
    decoder.requires_grad_(False)
    held_out = np.concatenate([validation, test]) if len(train) < len(cells) else train
    fitted.usual_misfit = ranks.from_first(lambda: np.sort(fitted.misfit(cells[held_out], latent[held_out])))
    return fitted, history


def _phase(
    name: str,
    network: torch.nn.Module,
    loaders: tuple[CountsLoader, CountsLoader | None],
    n_epochs: int,
    settings: TrainingSettings,
    cells: Cells,
) -> pd.DataFrame:
    """Train one network."""
    checkpoint = settings.checkpoint
    if checkpoint is not None:
        checkpoint.mkdir(parents=True, exist_ok=True)
        checkpoint /= f"{name}.safetensors"
    with compiled(settings.compile, n_values=float(np.prod(cells.counts.shape)) * n_epochs):
        return fit(
            network,
            *loaders,
            max_epochs=n_epochs,
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            patience=settings.patience,
            precision=settings.precision,
            accelerator=settings.accelerator,
            devices=settings.devices,
            progress=settings.progress,
            phase=name,
            obs_names=cells.obs.index.astype(str).tolist(),
            checkpoint=checkpoint,
            resume=settings.resume,
        )


def _with_every_batch(batch: np.ndarray, train: np.ndarray, *others: np.ndarray) -> tuple[np.ndarray, ...]:
    """Move the first cell of each batch that is not trained on into training: its embedding has to be learned."""
    absent = np.setdiff1d(batch, batch[train])
    moved = np.array([np.flatnonzero(batch == code)[0] for code in absent], dtype=train.dtype)
    return np.sort(np.concatenate([train, moved])), *(np.setdiff1d(other, moved) for other in others)


def _loaders(
    counts: sp.csr_matrix,
    per_cell: Mapping[str, np.ndarray],
    train: np.ndarray,
    validation: np.ndarray,
    settings: TrainingSettings,
) -> tuple[CountsLoader, CountsLoader | None]:
    loader = CountsLoader(
        counts, per_cell, indices=train, batch_size=settings.batch_size, shuffle=True, seed=settings.seed
    )
    if len(validation) == 0:
        return loader, None
    return loader, CountsLoader(counts, per_cell, indices=validation, batch_size=_EVALUATION_BATCH)


def _ridge(components: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Linear map from principal components to a teacher that has coordinates of its own."""
    from sklearn.linear_model import Ridge

    scale = components.std(axis=0)
    model = Ridge(alpha=1.0).fit(components / scale, target)
    return model.coef_.T / scale[:, None], model.intercept_
