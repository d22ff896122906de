"""What is trained: any module with a loss per minibatch, and the plan by which its parameters learn."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn, Protocol

import torch
from lightning.pytorch import LightningModule

from cellstill.errors import InvalidArgumentError, TrainingError, at_least_zero, check_option
from cellstill.nn.compiled import kernels
from cellstill.train.adamw import CompiledAdamW, fits
from cellstill.train.fault import Fault, what_is_not_finite
from cellstill.train.state import changing, copy_weights, put_weights
from cellstill.train.warmup import warmup_steps

_GLOBAL_LR = 10.0


class Loss(NamedTuple):
    """What a module makes of a minibatch.

    Attributes
    ----------
    total
        What is minimised: the mean over the minibatch's cells, a scalar to differentiate. The losses of an epoch weigh
        it by ``n``.
    per_cell
        Loss of each cell, detached, shape ``(n,)``; it names the cells whose loss is not finite. ``None`` if the module
        does not have it.
    n
        Number of cells.
    terms
        Parts of the loss by name, each a detached scalar, summed over the cells. The history records their means as
        ``train_<name>`` and ``validation_<name>``.
    """

    total: torch.Tensor
    per_cell: torch.Tensor | None
    n: int
    terms: Mapping[str, torch.Tensor] = MappingProxyType({})


class Trainable(Protocol):
    """A torch module that knows its loss.

    Attributes
    ----------
    global_parameters
        Names of parameters that stand for the data as a whole, such as dispersions. Each enters a cell's loss by a
        small part, so they learn ten times as fast as the weights, and do not decay.
    """

    global_parameters: frozenset[str]

    def loss(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor | Loss:
        """Loss of a minibatch: that of each cell, shape ``(n,)``, or a :class:`Loss`.

        A module with a prior declares a second argument, ``kl_weight``: the weight of the KL divergence from it, which
        rises from 0 to 1 while training warms up, and is 1 in validation. One with penalties on the data as a whole
        declares ``n_obs``: the number of training cells, by which they are divided.
        """
        ...


class LossSums:
    """Sums of losses over an epoch, in float64 on the device: no synchronisation until they are read."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor | float] = {}
        self._n = 0

    def add(self, loss: Loss) -> None:
        """Add a minibatch."""
        self._add("loss", loss.total.detach(), loss.n)
        for name, term in loss.terms.items():
            self._add(name, term, 1)
        self._n += loss.n

    def _add(self, name: str, value: torch.Tensor, weight: int) -> None:
        if value.device.type == "cpu":
            # It need not be waited for, and adds numbers faster than tensors of one.
            self._sums[name] = self._sums.get(name, 0.0) + weight * value.item()
            return
        if name not in self._sums:
            self._sums[name] = torch.zeros((), dtype=torch.float64, device=value.device)
        self._sums[name].add_(value, alpha=weight)  # type: ignore[union-attr]

    def is_finite(self) -> bool:
        """Say whether every loss and term so far was finite; waits for the device, once."""
        tensors = [total for total in self._sums.values() if isinstance(total, torch.Tensor)]
        numbers = [total for total in self._sums.values() if not isinstance(total, torch.Tensor)]
        return all(map(math.isfinite, numbers + (torch.stack(tensors).tolist() if tensors else [])))

    def pop(self, split: str) -> dict[str, float]:
        """Return the means per cell, as ``<split>_loss`` and ``<split>_<term>``, and start again."""
        means = {f"{split}_{name}": float(total) / self._n for name, total in self._sums.items()}
        self._sums, self._n = {}, 0
        return means


class Plan(LightningModule):
    """Minimise the mean loss over cells with Adam.

    :func:`~cellstill.train.fit.fit` follows it with a loop of its own; a Lightning ``Trainer``, such as that of
    scvi-tools' ``TrainRunner``, follows it too, and then finds ``train_loss``, ``validation_loss`` and the terms among
    its metrics at the end of each epoch.

    Parameters
    ----------
    module
        A :class:`torch.nn.Module` that is :class:`Trainable`; only its parameters that require gradients are trained.
    lr
        Learning rate. Larger learns faster until it no longer settles.
    own_lr
        Learning rates of some parameters, by their names, instead of ``lr``; ten times as much where they are global.
        0 leaves them as they are.
    weight_decay
        Decoupled decay of the weights towards zero per step, times ``lr``. Larger regularises more.
    kl_warmup
        Steps over which the weight of the KL divergence rises from 0 to 1: a number of steps (int), or a share of the
        planned ones (float, at most 1). Longer lets the module explain the data first, and guards against a collapsed
        latent; the warm-up always ends before training does (:func:`~cellstill.train.warmup.warmup_steps`). ``None``
        trains with weight 1 throughout.

    n_obs
        Number of training cells, for modules that ask for it; a Lightning ``Trainer``'s datamodule gives its own.

    Raises
    ------
    InvalidArgumentError
        A rate, ``weight_decay`` or ``kl_warmup`` is out of range, ``own_lr`` names no parameter, the module has no
        ``loss``, or one that takes no ``kl_weight``.
    """

    def __init__(
        self,
        module: Any,
        *,
        lr: float = 1e-3,
        own_lr: Mapping[str, float] | None = None,
        weight_decay: float = 0.0,
        kl_warmup: int | float | None = None,
        n_obs: int | None = None,
    ) -> None:
        super().__init__()
        if not callable(getattr(module, "loss", None)):
            raise InvalidArgumentError(
                f"module={type(module).__name__} has no loss. Give it a method loss(batch) that returns the loss of "
                "each cell, or a cellstill.train.Loss."
            )
        known = [name for name, _ in module.named_parameters()]
        for name in own_lr or {}:
            check_option("own_lr", name, known)
        self.module = module
        self.lr = at_least_zero("lr", lr)
        self.own_lr = {name: at_least_zero(f"own_lr[{name!r}]", rate) for name, rate in (own_lr or {}).items()}
        self.weight_decay = at_least_zero("weight_decay", weight_decay)
        self.kl_warmup = kl_warmup
        self.sums = LossSums()
        self._good: dict[str, torch.Tensor] = {}
        self.n_warmup = self._first_counted = 0
        self.n_obs = n_obs
        arguments = inspect.signature(module.loss).parameters
        self._takes_kl_weight, self._takes_n_obs = "kl_weight" in arguments, "n_obs" in arguments
        if kl_warmup is not None and not self._takes_kl_weight:
            raise InvalidArgumentError(
                f"kl_warmup={kl_warmup!r} is given, but {type(module).__name__}.loss takes no kl_weight. Leave it out."
            )
        warmup_steps(kl_warmup, 1, 1)

    def plan_steps(self, n_epochs: int, steps_per_epoch: int) -> None:
        """Fix the length of the warm-up, once the length of training is known."""
        self.n_warmup = warmup_steps(self.kl_warmup, n_epochs, steps_per_epoch)

    def evaluate(self, batch: Mapping[str, torch.Tensor], step: int | None = None) -> Loss:
        """Loss of a minibatch at a step of training; without ``step``, as after the warm-up."""
        asked: dict[str, Any] = {"n_obs": self.n_obs} if self._takes_n_obs else {}
        if self._takes_kl_weight:
            asked["kl_weight"] = 1.0 if step is None or step >= self.n_warmup else step / self.n_warmup
        loss = self.module.loss(batch, **asked)
        if isinstance(loss, Loss):
            return loss
        if loss.dim() != 1:
            raise InvalidArgumentError(
                f"{type(self.module).__name__}.loss returned a tensor of shape {tuple(loss.shape)}. Return the loss of "
                "each cell, shape (n,), or a cellstill.train.Loss."
            )
        if len(loss) != len(batch.get("rows", loss)):
            raise InvalidArgumentError(
                f"{type(self.module).__name__}.loss returned {len(loss)} losses for a minibatch of "
                f"{len(batch['rows'])} cells. Return one for each."
            )
        return Loss(loss.mean(dtype=_at_least_float32(loss)), loss.detach(), len(loss))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Build an AdamW, with a group of its own for the global parameters; compiled where loops are to be."""
        trained = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        if not trained:
            raise InvalidArgumentError(f"{type(self.module).__name__} has no parameter that requires a gradient.")
        groups: list[dict[str, Any]] = []
        for lr in dict.fromkeys([self.lr, *self.own_lr.values()]):
            of_lr = {name: trained.pop(name) for name in list(trained) if self.own_lr.get(name, self.lr) == lr}
            apart = {name: of_lr.pop(name) for name in list(of_lr) if name in self.module.global_parameters}
            groups.append({"params": list(of_lr.values()), "lr": lr, "weight_decay": self.weight_decay})
            groups.append({"params": list(apart.values()), "lr": _GLOBAL_LR * lr, "weight_decay": 0.0})
        groups = [group for group in groups if group["params"]]
        parameters = [parameter for group in groups for parameter in group["params"]]
        if kernels(parameters[0].device) is not None and all(map(fits, parameters)):
            return CompiledAdamW(groups)
        # Lightning cannot clip what a fused optimiser of mixed precision would be given.
        clips = self._trainer is not None and self._trainer.gradient_clip_val is not None
        return torch.optim.AdamW(groups, fused=not clips)

    def on_train_start(self) -> None:
        """Plan the warm-up of a ``Trainer``'s run."""
        steps = max(int(self.trainer.num_training_batches), 1)
        self.n_obs = getattr(self.trainer.datamodule, "n_train", self.n_obs)
        self.plan_steps(max(int(self.trainer.estimated_stepping_batches) // steps, 1), steps)
        # The first epoch at full weight is the first that early stopping compares.
        self._first_counted = self.n_warmup + steps if self.n_warmup else 0

    def on_fit_start(self) -> None:
        """Keep the weights that training starts with."""
        self._good = copy_weights(self.module)

    def on_train_epoch_start(self) -> None:
        """Keep the weights: those of the last epoch whose losses were finite."""
        if self._is_finite():
            self._good = copy_weights(self.module, self._good)
        if self.global_step < self._first_counted:
            # Losses of the warm-up cannot be compared with later ones.
            for callback in self.trainer.early_stopping_callbacks:
                callback.best_score = callback.best_score.new_tensor(math.inf if callback.mode == "min" else -math.inf)

    def on_train_end(self) -> None:
        """Look at the weights, which a last step may have spoilt without any loss that shows it."""
        if not self._is_finite():
            self._stop(f"Weights are not finite after the last step, in epoch {self.current_epoch}.")

    def _is_finite(self) -> bool:
        return all(bool(tensor.isfinite().all()) for _, tensor in changing(self.module) if tensor.is_floating_point())

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Return the mean loss of a minibatch."""
        loss = self.evaluate(batch, self.global_step)
        # A GPU would be waited for; there it shows at the end of the epoch.
        if loss.total.device.type == "cpu" and not math.isfinite(loss.total.item()):
            self._stop(self._fault(loss, batch, batch_idx))
        self.sums.add(loss)
        return loss.total

    def on_validation_epoch_start(self) -> None:
        """Keep the sums of training, which are not read yet, apart from those of validation."""
        self._train_sums, self.sums = self.sums, LossSums()

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        """Add a minibatch to the validation loss."""
        self.sums.add(self.evaluate(batch))

    def on_validation_epoch_end(self) -> None:
        """Log the validation losses."""
        self._log_epoch("validation")
        self.sums = self._train_sums

    def on_train_epoch_end(self) -> None:
        """Log the training losses."""
        self._log_epoch("train")

    def test_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        """Add a minibatch to the test loss."""
        self.sums.add(self.evaluate(batch))

    def on_test_epoch_end(self) -> None:
        """Log the test losses."""
        self._log_epoch("test")

    def _log_epoch(self, split: str) -> None:
        losses = self.sums.pop(split)
        value = losses[f"{split}_loss"]
        if not math.isfinite(value):
            self._stop(f"{split}_loss is {value} in epoch {self.current_epoch}.")
        # The size of a minibatch of CSR rows cannot be read off its tensors.
        self.log_dict(losses, prog_bar=True, batch_size=1, sync_dist=True)

    def _fault(self, loss: Loss, batch: Mapping[str, torch.Tensor], batch_idx: int) -> str:
        """Say which minibatch, term and cells a loss is not finite of."""
        cells: list[int] = [] if loss.per_cell is None else (~loss.per_cell.isfinite()).nonzero().flatten().tolist()
        alone = bool(cells) and len(cells) < loss.n
        rows = batch["rows"].tolist() if "rows" in batch else range(loss.n)
        terms = [name for name, term in loss.terms.items() if not bool(term.isfinite().all())]
        what = what_is_not_finite("train", loss.total.item(), terms)
        fault = Fault("train", batch_idx, what, [rows[cell] for cell in cells or range(loss.n)], alone)
        return fault.sentence(self.current_epoch, None)

    def _stop(self, what: str) -> NoReturn:
        """Give the module its last good weights back, and raise."""
        if self._good:
            put_weights(self.module, self._good)
        self.module.eval()
        raise TrainingError(
            f"{what} The module has the weights of the last epoch whose losses were finite, or those it started with. "
            "Train with a smaller lr, and check that the counts have no extreme outliers."
        )


def _at_least_float32(loss: torch.Tensor) -> torch.dtype:
    return torch.promote_types(loss.dtype, torch.float32)
