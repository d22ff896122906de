"""A training run: its epochs, the best of them, checkpoints, and what happens when numbers are no longer finite."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch

from cellstill.errors import TrainingError
from cellstill.train.best import KeepBest
from cellstill.train.checkpoint import Progress, write_checkpoint
from cellstill.train.guard import find_fault
from cellstill.train.loop import Loop, Minibatches
from cellstill.train.progress import Reporter
from cellstill.train.state import State, join_rng, put_state, put_weights, rng_of, take_state


class Run:
    """A training run.

    Parameters
    ----------
    loop
        Trains and evaluates an epoch.
    loaders
        Its loaders, by role.
    best
        Chooses the weights and when to stop.
    max_epochs
        Most epochs.
    obs_names
        Names of cells by position, for messages.
    checkpoint
        File that the first process writes after each epoch, or ``None``.
    described
        What the run was started with (:func:`~cellstill.train.checkpoint.describe_run`).

    Attributes
    ----------
    epochs, seconds
        Losses and time of every complete epoch.
    finished
        Training has ended.
    """

    def __init__(
        self,
        loop: Loop,
        loaders: dict[str, Minibatches],
        best: KeepBest,
        max_epochs: int,
        obs_names: Sequence[str] | None,
        checkpoint: str | os.PathLike[str] | None,
        described: dict[str, Any],
    ) -> None:
        self.loop = loop
        self.module = loop.plan.module
        self.loaders = loaders
        self.best = best
        self.max_epochs = max_epochs
        self.obs_names = obs_names
        self.checkpoint = checkpoint
        self.described = described
        self.epochs: list[dict[str, float]] = []
        self.seconds: list[float] = []
        self.finished = False

    def go_on(self, progress: Progress) -> None:
        """Take over what a checkpoint holds."""
        state = dataclasses.replace(progress.state, rng=rng_of(progress.state.rng, self.loop.ranks.rank))
        put_state(state, self.module, self.loop.optimizer, self.loaders)
        self.loop.step = progress.step
        self.epochs, self.seconds = progress.epochs, progress.seconds
        self.best.value, self.best.epoch = progress.best_value, progress.best_epoch
        self.best.weights = {name: tensor.to(self.loop.device) for name, tensor in progress.best.items()}
        self.finished = progress.finished

    def train(self, reporter: Reporter) -> None:
        """Train to the end, and put the best weights in place."""
        state = self._take_state()
        while not self.finished:
            started, epoch = time.perf_counter(), len(self.epochs)
            losses = self._one_epoch(reporter)
            if losses is None:
                raise TrainingError(self._explain(state, epoch))
            stop = self.best.update(epoch, losses, self.module)
            self.finished = stop or epoch + 1 == self.max_epochs
            self.epochs.append(losses)
            self.seconds.append(time.perf_counter() - started)
            state = self._take_state(state)
            all_rng = [] if self.checkpoint is None else self.loop.ranks.gather(state.rng)
            with self.loop.ranks.together():
                self._write(state, all_rng)
                reporter.epoch(epoch, losses)
        if self.best.weights:
            put_weights(self.module, self.best.weights)

    def _one_epoch(self, reporter: Reporter) -> dict[str, float] | None:
        train = self.loop.train_epoch(reporter.on_step)
        # The last step's gradient shows in no loss of the epoch, only in the weights.
        if train is None or not self._has_finite_weights():
            return None
        validation: dict[str, float] | None = {}
        if self.loop.validation is not None:
            validation = self.loop.validate()
            if validation is None:
                return None
        losses = {**train, **validation}  # type: ignore[dict-item]
        return dict(sorted(losses.items(), key=lambda item: not item[0].endswith("_loss")))

    def _has_finite_weights(self) -> bool:
        weights = [parameter.detach() for parameter in self.module.parameters() if parameter.requires_grad]
        # A sum takes a fortieth of the time of looking at each, and is not finite if one is not; or if it overflows.
        if bool(torch.stack([weight.sum() for weight in weights]).isfinite().all()):
            return True
        return all(bool(weight.isfinite().all()) for weight in weights)

    def _explain(self, state: State, epoch: int) -> str:
        self._put_state(state, epoch)
        try:
            fault = find_fault(self.loop)
        finally:
            put_weights(self.module, self.best.weights or state.weights)
        if fault is None:
            what = f"The losses of epoch {epoch} are not finite, but were when it was repeated."
        else:
            what = fault.sentence(epoch, self.obs_names)
        if self.best.weights:
            left = f"the best epoch, {self.best.epoch}"
        else:
            left = f"the end of epoch {epoch - 1}" if epoch else "the start"
        return (
            f"{what} Epochs and batches count from 0. The weights are those of {left}. Train with a smaller lr, and "
            "check that the counts have no extreme outliers."
        )

    def _take_state(self, into: State | None = None) -> State:
        return take_state(self.module, self.loop.optimizer, self.loaders, into)

    def _put_state(self, state: State, epoch: int) -> None:
        put_state(state, self.module, self.loop.optimizer, self.loaders)
        self.loop.step = epoch * len(self.loop.train)

    def _write(self, state: State, all_rng: Sequence[dict[str, torch.Tensor]]) -> None:
        if self.checkpoint is None or not self.loop.ranks.is_first:
            return
        best = self.best
        progress = Progress(
            dataclasses.replace(state, rng=join_rng(all_rng)),
            self.loop.step,
            self.epochs,
            self.seconds,
            best.value,
            best.epoch,
            best.weights,
            self.finished,
        )
        write_checkpoint(self.checkpoint, progress, self.described)

    def history(self) -> pd.DataFrame:
        """One row of losses per epoch, indexed by ``epoch`` from 0, with their times in ``attrs["seconds"]``."""
        return to_frame(self.epochs, self.seconds)


def to_frame(epochs: Sequence[Mapping[str, float]], seconds: Sequence[float]) -> pd.DataFrame:
    """Make the table of :meth:`Run.history`."""
    frame = pd.DataFrame(epochs).rename_axis(index="epoch")
    frame.attrs["seconds"] = list(seconds)
    return frame
