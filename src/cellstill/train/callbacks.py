"""What happens at the end of each epoch: record, keep the best, stop."""

from __future__ import annotations

import math
from typing import cast

import pandas as pd
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from cellstill.errors import TrainingError
from cellstill.train.plans import Plan


class History(Callback):
    """Collect the losses of every epoch, and show them in the progress bar."""

    def __init__(self) -> None:
        self.epochs: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Append the epoch; validation has been run by now."""
        losses = cast(Plan, pl_module).pop_losses()
        self.epochs.append({name: losses[name] for name in ("train_loss", "validation_loss") if name in losses})
        pl_module.log_dict(losses, prog_bar=True)

    def to_frame(self) -> pd.DataFrame:
        """Return one row per epoch, indexed by ``epoch`` from 0."""
        return pd.DataFrame(self.epochs).rename_axis(index="epoch")


class KeepBest(Callback):
    """Stop when the monitored loss no longer falls, and end with the weights that had the lowest.

    Parameters
    ----------
    history
        Where the losses are found; it has to come before this callback.
    monitor
        Loss to watch.
    patience
        Epochs without improvement before training stops; ``None`` never stops early, but still ends with the best.
    """

    def __init__(self, history: History, monitor: str, patience: int | None) -> None:
        self.history = history
        self.monitor = monitor
        self.patience = math.inf if patience is None else patience
        self.best = math.inf
        self.best_epoch = 0
        self._weights: dict[str, torch.Tensor] = {}

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare the epoch with the best so far; refuse to go on from a loss that is not finite."""
        value = self.history.epochs[-1][self.monitor]
        epoch = trainer.current_epoch
        if not math.isfinite(value):
            raise TrainingError(
                f"{self.monitor} is {value} in epoch {epoch}. Train with a smaller lr, and check that the counts "
                "have no extreme outliers."
            )
        if value < self.best:
            self.best, self.best_epoch = value, epoch
            self._weights = {name: tensor.detach().clone() for name, tensor in pl_module.state_dict().items()}
        elif epoch - self.best_epoch >= self.patience:
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the best weights."""
        pl_module.load_state_dict(self._weights)
