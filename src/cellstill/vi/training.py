"""Training of a regularised model: the split, the loaders, one call of fit."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from cellstill.data.loader import split_cells
from cellstill.nn.compiled import CompileMode, compiled
from cellstill.train.fit import fit, seeded
from cellstill.train.progress import OnEpoch
from cellstill.vi.cells import Cells
from cellstill.vi.module import RegularizedVAE

_EVALUATION_BATCH = 1024
_MOST_EPOCHS, _CELLS_AT_MOST = 400, 20_000


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """Settings of ``train``, documented there."""

    max_epochs: int
    lr: float
    modality_lr: Mapping[str, float]
    weight_decay: float
    batch_size: int
    kl_warmup: int | float | None
    patience: int | None
    min_delta: float
    gradient_clip: float | None
    accelerator: str
    devices: int
    precision: str
    compile: CompileMode
    progress: bool | OnEpoch
    checkpoint: str | os.PathLike[str] | None
    resume: bool
    seed: int


def default_epochs(n_obs: int) -> int:
    """Epochs of about 8 million cells shown, at most 400."""
    return int(np.clip(round(_CELLS_AT_MOST / n_obs * _MOST_EPOCHS), 1, _MOST_EPOCHS))


def train_module(
    module: RegularizedVAE, cells: Cells, train: np.ndarray, validation: np.ndarray, settings: TrainingSettings
) -> dict[str, pd.DataFrame]:
    """Train a module on some of the cells, watching others.

    Returns
    -------
    History: one column of values per epoch under ``{term}_{train|validation}``.
    """
    loaders = [cells.loader(train, batch_size=settings.batch_size, shuffle=True, seed=settings.seed)]
    if len(validation):
        # No minibatch has more cells than there are training cells, which global penalties are divided by.
        loaders.append(cells.loader(validation, batch_size=min(_EVALUATION_BATCH, len(train))))
    n_values = float(sum(np.prod(matrix.shape, dtype=float) for matrix in cells.counts.values())) * settings.max_epochs
    with compiled(settings.compile, n_values=n_values), seeded(settings.seed, settings.accelerator):
        history = fit(
            module,
            *loaders,
            max_epochs=settings.max_epochs,
            lr=settings.lr,
            own_lr=module.by_parameter(settings.modality_lr),
            weight_decay=settings.weight_decay,
            kl_warmup=settings.kl_warmup,
            patience=settings.patience,
            min_delta=settings.min_delta,
            gradient_clip=settings.gradient_clip,
            accelerator=settings.accelerator,
            devices=settings.devices,
            precision=settings.precision,
            progress=settings.progress,
            obs_names=cells.obs_names.tolist(),
            checkpoint=settings.checkpoint,
            resume=settings.resume,
        )
    return by_term(history)


def continued(before: Mapping[str, pd.DataFrame], after: Mapping[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """Append the history of a training to that of those before it; epochs are counted on."""
    start = max((int(frame.index[-1]) + 1 for frame in before.values() if len(frame)), default=0)
    joined = dict(before)
    for name, frame in after.items():
        later = frame.set_axis(range(start, start + len(frame)), axis=0).rename_axis(index="epoch")
        joined[name] = pd.concat([before[name], later]) if name in before else later
    return joined


def ends_with(history: Mapping[str, pd.DataFrame], run: Mapping[str, pd.DataFrame]) -> bool:
    """Whether a history has a run already, as where one that was finished is resumed."""
    return bool(run) and all(
        name in history and np.array_equal(history[name].to_numpy()[-len(frame) :], frame.to_numpy(), equal_nan=True)
        for name, frame in run.items()
    )


def split(
    n_obs: int, train_size: float, validation_size: float | None, groups: np.ndarray | None, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Split cells at random; within each of the ``groups``, codes of shape ``(n_obs,)``, if they are given."""
    if groups is None:
        return split_cells(n_obs, train_size, validation_size, seed=seed)
    parts: tuple[list[np.ndarray], ...] = ([], [], [])
    for code in np.unique(groups):
        cells = np.flatnonzero(groups == code)
        for part, own in zip(parts, split_cells(len(cells), train_size, validation_size, seed=seed), strict=True):
            part.append(cells[own])
    train, validation, test = (np.sort(np.concatenate(part)) for part in parts)
    return train, validation, test


def by_term(history: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Turn columns such as ``train_kl_z`` into frames of one column, ``kl_z_train``; add the evidence lower bound."""
    columns = {}
    for column in history:
        where, _, term = str(column).partition("_")
        columns[f"{term}_{where}"] = history[column]
    for where in ("train", "validation"):
        parts = [
            values
            for name, values in columns.items()
            if name.endswith(f"_{where}") and name.startswith(("reconstruction_loss", "kl_"))
        ]
        if parts:
            columns[f"elbo_{where}"] = pd.concat(parts, axis=1).sum(axis=1)
    return {name: values.to_frame(name) for name, values in columns.items()}
