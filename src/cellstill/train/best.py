"""Early stopping: which epoch was the best, and whether to go on."""

from __future__ import annotations

import math

import torch

from cellstill.train.state import copy_weights


class KeepBest:
    """Keep the weights with the lowest monitored loss, and say when it no longer falls.

    Parameters
    ----------
    monitor
        Loss to watch.
    patience
        Epochs without improvement before training stops; ``None`` never stops early, but still keeps the best.
    min_delta
        Smallest fall of the loss that is an improvement.
    start
        First epoch that counts: those before it are warm-up, whose losses cannot be compared with later ones.

    Attributes
    ----------
    value, epoch
        Lowest loss and its epoch; infinite and ``None`` before an epoch counted.
    weights
        The weights at the end of that epoch.
    """

    def __init__(self, monitor: str, patience: int | None, start: int = 0, min_delta: float = 0.0) -> None:
        self.monitor = monitor
        self.patience = math.inf if patience is None else patience
        self.start = start
        self.min_delta = min_delta
        self.value = math.inf
        self.epoch: int | None = None
        self.weights: dict[str, torch.Tensor] = {}

    def update(self, epoch: int, losses: dict[str, float], module: torch.nn.Module) -> bool:
        """Compare an epoch with the best so far, and return whether to stop after it."""
        if epoch < self.start:
            return False
        if losses[self.monitor] < self.value - self.min_delta:
            self.value, self.epoch = losses[self.monitor], epoch
            self.weights = copy_weights(module, self.weights)
            return False
        return self.epoch is not None and epoch - self.epoch >= self.patience
