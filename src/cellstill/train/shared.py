"""The loop of one of several processes: each takes its share of every minibatch, and all take the same step."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from typing import Any

import torch

from cellstill.data.loader import Share, share_of
from cellstill.errors import InvalidArgumentError
from cellstill.train.gradients import SummedGradients
from cellstill.train.guard import cut
from cellstill.train.loop import Batch, Loop, Minibatches, evaluating, set_training
from cellstill.train.plans import Loss, LossSums
from cellstill.train.ranks import Ranks
from cellstill.train.state import copy_weights, put_rng, put_weights, take_rng


class SharedLoop(Loop):
    """Train and evaluate epoch by epoch, together with other processes.

    The gradient of a minibatch's mean loss is the mean of those of its shares, weighted by their cells. Every process
    returns the losses of all cells. What goes wrong in one process stops all of them, at the same step.

    Parameters
    ----------
    plan, optimizer, train, validation, **settings
        See :class:`~cellstill.train.loop.Loop`. The minibatches are whole, and the same in every process; loaders with
        a method ``shares``, such as :class:`~cellstill.data.CountsLoader`, read only this process's part of them.
    ranks
        The processes.
    """

    def __init__(self, *args: Any, ranks: Ranks, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.ranks = ranks
        self._gradients = SummedGradients(self._parameters, ranks)
        self._n_whole = 1
        self._loss: torch.Tensor | float = 0.0
        self._error: Exception | None = None

    def train_epoch(self, on_step: Callable[[int, int], None] | None = None) -> dict[str, float] | None:
        """Pass over the training cells once; as :meth:`Loop.train_epoch`."""
        set_training(self.plan.module)
        sums, n_own, n_cells, good = LossSums(), 0, 0, True
        with closing(self.batches(self.train)) as batches:
            for index in range(len(self.train)):
                loss = self._learn(batches)
                total = self._gradients.add_up(self._loss)
                if self._steps_per_check == 1 and not math.isfinite(total.item()):
                    good = False
                    break
                super().update()
                if loss is not None:
                    sums.add(loss)
                    n_own += loss.n
                if self._steps_per_check > 1 and index % self._steps_per_check == 0:
                    good = all(self.ranks.gather(self._error is None and sums.is_finite()))
                    if not good:
                        break
                if on_step is not None:
                    n_cells += self._n_whole
                    on_step(index + 1, n_cells)
        means = self._means("train", sums, n_own)
        if means is None or not good:
            return None
        self._share_buffers()
        return means

    def validate(self) -> dict[str, float] | None:
        """Pass over the validation cells once; as :meth:`Loop.validate`."""
        assert self.validation is not None
        sums, n_own = LossSums(), 0
        with evaluating(self.plan.module), torch.inference_mode(), closing(self.batches(self.validation)) as batches:
            try:
                for batch in batches:
                    if batch:
                        loss = self.evaluate(batch)
                        sums.add(loss)
                        n_own += loss.n
            except Exception as error:  # noqa: BLE001 - raised in every process by _means
                self._error = error
        return self._means("validation", sums, n_own)

    def backward(self, loss: Loss) -> None:
        """Compute the share of the minibatch's gradient that the share of its cells has."""
        share = loss.total * (loss.n / self._n_whole)
        self._loss = share.detach()
        share.backward()

    def update(self) -> None:
        """Add up the gradients, clip them and take the step."""
        self._gradients.add_up(self._loss)
        super().update()

    def batches(self, loader: Minibatches) -> Generator[Batch]:
        """Shares of minibatches on the device; without cells, an empty one."""
        with closing(_shares(loader, self.ranks)) as shares:
            for batch, n, self._n_whole in shares:
                if n == 0:
                    self._nothing(0.0)
                    yield {}
                elif self.device.type == "cpu" or getattr(loader, "device", None) == self.device:
                    yield batch
                else:
                    yield {name: values.to(self.device, non_blocking=True) for name, values in batch.items()}

    def _learn(self, batches: Generator[Batch]) -> Loss | None:
        """Loss of the next share, and its gradients; ``None`` without cells, and after an error."""
        if self._error is None:
            try:
                batch = next(batches, None)
                if batch is None:
                    raise InvalidArgumentError(f"train yields fewer minibatches than its length, {len(self.train)}.")
                if not batch:
                    return None
                loss = self.forward(batch)
                self.backward(loss)
                return loss
            except Exception as error:  # noqa: BLE001 - raised in every process by _means
                self._error = error
        # The others wait for this process: it stays in step until they look.
        self._nothing(math.nan)
        return None

    def _nothing(self, loss: float) -> None:
        self.optimizer.zero_grad()
        self._loss = loss

    def _means(self, split: str, sums: LossSums, n: int) -> dict[str, float] | None:
        """Mean losses over the cells of all processes."""
        self.ranks.check(self._error)
        own = sums.pop(split) if n else {}
        found = self.ranks.gather((own, n))
        n_all = sum(n for _, n in found)
        names = dict.fromkeys(name for means, _ in found for name in means)
        means = {name: sum(means.get(name, 0.0) * n for means, n in found) / n_all for name in names}
        return means if all(map(math.isfinite, means.values())) else None

    def _share_buffers(self) -> None:
        """Give every process the buffers of the first, as each has seen other cells."""
        buffers = dict(self.plan.module.named_buffers())
        if not buffers:
            return
        first = self.ranks.from_first(lambda: {name: buffer.cpu() for name, buffer in buffers.items()})
        with torch.no_grad():
            for name, buffer in buffers.items():
                buffer.copy_(first[name])


def _shares(loader: Minibatches, ranks: Ranks) -> Generator[Share]:
    if hasattr(loader, "shares"):
        yield from loader.shares(ranks.rank, ranks.size)
        return
    for batch in loader:
        n = len(batch["indptr"]) - 1 if "indptr" in batch else len(next(iter(batch.values())))
        start, stop = share_of(n, ranks.rank, ranks.size)
        yield Share(cut(batch, start, stop), stop - start, n)


def start_together(ranks: Ranks, module: torch.nn.Module, described: Mapping[str, Any]) -> None:
    """Give every process the weights of the first, and random numbers of its own.

    Parameters
    ----------
    ranks
        The processes.
    module
        What is trained.
    described
        Module, data and settings of this process (:func:`~cellstill.train.checkpoint.describe_run`).

    Raises
    ------
    InvalidArgumentError
        The processes differ in these; all of them raise it.
    """
    first, *others = ranks.gather(described)
    for rank, other in enumerate(others, 1):
        different = [name for name in first if other[name] != first[name]]
        if different:
            raise InvalidArgumentError(
                f"Rank {rank} and rank 0 differ in {' and '.join(different)}. Every process has to call with the same "
                "module, data and settings: seed whatever is drawn at random before."
            )
    put_weights(module, ranks.from_first(lambda: {name: copy.cpu() for name, copy in copy_weights(module).items()}))
    seed = ranks.from_first(lambda: int(torch.randint(2**62, ())))
    if not ranks.is_first:
        torch.manual_seed(seed + ranks.rank)


def end_together(ranks: Ranks, module: torch.nn.Module) -> None:
    """Give every process the random state of the first, so that what follows in the script is the same in each."""
    own, first = take_rng(module), ranks.from_first(lambda: take_rng(module))
    put_rng(dict(zip(own, first.values(), strict=True)))
