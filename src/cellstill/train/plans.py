"""What Lightning trains: any module with a loss per minibatch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from lightning.pytorch import LightningModule

_GLOBAL_LR = 10.0


class Trainable(Protocol):
    """A torch module that knows its loss.

    Attributes
    ----------
    global_parameters
        Names of parameters that stand for the data as a whole, such as dispersions. Each enters a cell's loss by a
        small part, so they learn ten times as fast as the weights, and do not decay.
    """

    global_parameters: frozenset[str]

    def loss(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Loss of each cell of a minibatch, shape ``(n,)``."""
        ...


class Plan(LightningModule):
    """Minimise the mean loss over cells with Adam.

    Parameters
    ----------
    module
        A :class:`torch.nn.Module` that is :class:`Trainable`; only its parameters that require gradients are trained.
    lr
        Learning rate. Larger learns faster until it no longer settles.
    weight_decay
        Decoupled decay of the weights towards zero per step, times ``lr``. Larger regularises more.
    """

    def __init__(self, module: Any, *, lr: float, weight_decay: float) -> None:
        super().__init__()
        self.module = module
        self.lr = lr
        self.weight_decay = weight_decay
        self._sums: dict[str, torch.Tensor] = {}

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Return the mean loss of a minibatch."""
        loss = self.module.loss(batch)
        self._accumulate("train_loss", loss.detach())
        return loss.mean()

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        """Add a minibatch to the validation loss."""
        self._accumulate("validation_loss", self.module.loss(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Build a fused AdamW, with a group of its own for the global parameters."""
        trained = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        apart = {name: trained.pop(name) for name in self.module.global_parameters if name in trained}
        groups: list[dict[str, Any]] = [
            {"params": list(trained.values()), "lr": self.lr, "weight_decay": self.weight_decay},
            {"params": list(apart.values()), "lr": _GLOBAL_LR * self.lr, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW([group for group in groups if group["params"]], fused=True)

    def _accumulate(self, name: str, loss: torch.Tensor) -> None:
        # Sums stay on the device until the epoch ends: no synchronisation per step.
        batch = torch.stack([loss.sum().double(), loss.new_tensor(len(loss), dtype=torch.float64)])
        self._sums[name] = self._sums[name] + batch if name in self._sums else batch

    def pop_losses(self) -> dict[str, float]:
        """Return the mean loss per cell since the last call, of training and of validation."""
        losses = {name: float(total / n) for name, (total, n) in self._sums.items()}
        self._sums.clear()
        return losses
