"""One call that trains a module: Lightning underneath, nothing written to disk."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pandas as pd
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import RichProgressBar

from cellstill.data.loader import CountsLoader
from cellstill.errors import check_option
from cellstill.train.callbacks import History, KeepBest
from cellstill.train.plans import Plan


def fit(
    module: torch.nn.Module,
    train: CountsLoader,
    validation: CountsLoader | None = None,
    *,
    max_epochs: int,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    patience: int | None = 10,
    gradient_clip: float | None = None,
    accelerator: str = "auto",
    progress: bool = False,
) -> pd.DataFrame:
    """Train ``module`` and leave it in evaluation mode with its best weights.

    Parameters
    ----------
    module
        Module with a ``loss`` (:class:`~cellstill.train.plans.Trainable`).
    train, validation
        Minibatches. Without ``validation`` the training loss is monitored.
    max_epochs
        Most passes over the training cells; 0 trains nothing.
    lr, weight_decay
        See :class:`~cellstill.train.plans.Plan`.
    patience
        Epochs without a lower monitored loss before training stops; ``None`` trains for ``max_epochs``.
    gradient_clip
        Largest norm of a step's gradient; ``None`` does not clip.
    accelerator
        ``"auto"`` (a CUDA device if there is one), ``"cpu"`` or ``"gpu"``. One device is used.
    progress
        Show a progress bar.

    Returns
    -------
    One row per epoch: ``train_loss`` and, with ``validation``, ``validation_loss``.

    Raises
    ------
    TrainingError
        The loss is no longer finite.
    KeyboardInterrupt
        Training was interrupted; the module is left in evaluation mode.
    """
    check_option("accelerator", accelerator, ("auto", "cpu", "gpu"))
    if accelerator == "auto":
        # Lightning would choose Apple's GPU, which lacks operations that are needed.
        accelerator = "gpu" if torch.cuda.is_available() else "cpu"
    history = History()
    keep_best = KeepBest(history, "train_loss" if validation is None else "validation_loss", patience)
    callbacks: list[Callback] = [history, keep_best]
    if progress:
        callbacks.append(RichProgressBar(leave=True))
    with _quiet_lightning():
        trainer = Trainer(
            max_epochs=max_epochs,
            accelerator=accelerator,
            devices=1,
            callbacks=callbacks,
            gradient_clip_val=gradient_clip,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=progress,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        if max_epochs > 0:
            _fit(trainer, Plan(module, lr=lr, weight_decay=weight_decay), train, validation)
    module.eval()
    return history.to_frame()


def _fit(trainer: Trainer, plan: Plan, train: CountsLoader, validation: CountsLoader | None) -> None:
    try:
        trainer.fit(plan, train, validation)
    except SystemExit as stop:
        # Lightning exits the process on Ctrl-C; in a notebook, or inside our own clean-up, that is not ours to do.
        plan.module.eval()
        raise KeyboardInterrupt from stop


@contextmanager
def seeded(seed: int, accelerator: str = "auto") -> Iterator[None]:
    """Seed torch inside the block, and give the caller's random state back after it."""
    devices: list[Any] = list(range(torch.cuda.device_count())) if accelerator != "cpu" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            # Minibatches are built from memory: worker processes would only copy them.
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            warnings.filterwarnings("ignore", message=".*is smaller than the logging interval.*")
            warnings.filterwarnings("ignore", message=".*was available but not used.*")
            warnings.filterwarnings("ignore", message=".*have no `val_dataloader`.*")
            # Networks that a new part is trained against stay as they are.
            warnings.filterwarnings("ignore", message=".*module.s. in eval mode at the start of training.*")
            warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated", category=FutureWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
