"""The loop: as little as possible between one step and the next."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager
from typing import Protocol

import torch

from cellstill.train.plans import Loss, LossSums, Plan
from cellstill.train.ranks import Ranks

Batch = Mapping[str, torch.Tensor]

_STEPS_PER_CHECK = 64


class Minibatches(Protocol):
    """A loader: the same minibatches in every epoch, or others that its attribute ``epoch`` determines."""

    def __len__(self) -> int:
        """Minibatches of an epoch."""
        ...

    def __iter__(self) -> Iterator[Batch]:
        """Minibatches of one epoch."""
        ...


class Loop:
    """Train and evaluate epoch by epoch.

    Parameters
    ----------
    plan
        What is trained, on ``device``.
    optimizer
        Of the plan.
    train, validation
        Minibatches.
    device
        Device of the module; minibatches that are elsewhere are sent there.
    autocast
        Makes the context of a forward pass.
    gradient_clip
        Largest norm of a step's gradient; ``None`` does not clip.

    Attributes
    ----------
    step
        Steps done.
    ranks
        The processes that train together: here this one alone.
    """

    ranks = Ranks()

    def __init__(
        self,
        plan: Plan,
        optimizer: torch.optim.Optimizer,
        train: Minibatches,
        validation: Minibatches | None,
        *,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager],
        gradient_clip: float | None,
    ) -> None:
        self.plan = plan
        self.optimizer = optimizer
        self.train = train
        self.validation = validation
        self.device = device
        self.autocast = autocast
        self.gradient_clip = gradient_clip
        self.step = 0
        self._parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._steps_per_check = steps_per_check(device)

    def train_epoch(self, on_step: Callable[[int, int], None] | None = None) -> dict[str, float] | None:
        """Pass over the training cells once.

        Parameters
        ----------
        on_step
            Called with the minibatches and the cells done, after each.

        Returns
        -------
        Mean losses, or ``None`` as soon as one is seen that is not finite.
        """
        set_training(self.plan.module)
        sums, each, n_cells = LossSums(), self._steps_per_check == 1, 0
        with closing(self.batches(self.train)) as batches:
            for index, batch in enumerate(batches):
                loss = self.forward(batch)
                if each and not math.isfinite(loss.total.item()):
                    return None
                loss.total.backward()
                self.update()
                sums.add(loss)
                if not each and index % self._steps_per_check == 0 and not sums.is_finite():
                    return None
                if on_step is not None:
                    n_cells += loss.n
                    on_step(index + 1, n_cells)
        return sums.pop("train") if sums.is_finite() else None

    def validate(self) -> dict[str, float] | None:
        """Pass over the validation cells once; as :meth:`train_epoch`."""
        assert self.validation is not None
        sums = LossSums()
        with evaluating(self.plan.module), torch.inference_mode(), closing(self.batches(self.validation)) as batches:
            for batch in batches:
                sums.add(self.evaluate(batch))
        return sums.pop("validation") if sums.is_finite() else None

    def forward(self, batch: Batch) -> Loss:
        """Loss of a training minibatch, after clearing the gradients."""
        # What zero_grad does, without its profiling.
        for parameter in self._parameters:
            parameter.grad = None
        with self.autocast():
            return self.plan.evaluate(batch, self.step)

    def backward(self, loss: Loss) -> None:
        """Compute the gradients of a training minibatch."""
        loss.total.backward()

    def update(self) -> None:
        """Clip the gradients and take the step."""
        if self.gradient_clip is not None:
            torch.nn.utils.clip_grad_norm_(self._parameters, self.gradient_clip)
        self.optimizer.step()
        self.step += 1

    def evaluate(self, batch: Batch) -> Loss:
        """Loss of a validation minibatch."""
        with self.autocast():
            return self.plan.evaluate(batch)

    def batches(self, loader: Minibatches) -> Generator[Batch]:
        """Minibatches on the device."""
        if self.device.type == "cpu" or getattr(loader, "device", None) == self.device:
            yield from loader
            return
        for batch in loader:
            yield {name: values.to(self.device, non_blocking=True) for name, values in batch.items()}


def steps_per_check(device: torch.device) -> int:
    """Steps between two looks at whether the loss is finite: on a GPU each makes the host wait for the device."""
    return 1 if device.type == "cpu" else _STEPS_PER_CHECK


def set_training(module: torch.nn.Module) -> None:
    """Put a module in training mode, except for the parts whose parameters are all frozen: those stay as they are."""
    parameters = list(module.parameters())
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        return
    module.training = True
    for child in module.children():
        set_training(child)


@contextmanager
def evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Put a module in evaluation mode inside the block, and every part of it back into its own mode after it."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def non_finite(named: Iterable[tuple[str, torch.Tensor | None]]) -> list[str]:
    """Names of the tensors that hold a value that is not finite."""
    return [name for name, tensor in named if tensor is not None and not bool(tensor.isfinite().all())]
