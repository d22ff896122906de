"""One call that trains a module: devices and precision by Lightning Fabric, a loop of our own."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pandas as pd
import torch

from cellstill._compat.malloc import keeping_freed_memory
from cellstill.errors import (
    InvalidArgumentError,
    StoreError,
    above_zero,
    at_least_zero,
    check_option,
    whole_number,
)
from cellstill.nn.compiled import kernels
from cellstill.train.best import KeepBest
from cellstill.train.checkpoint import describe_run, read_checkpoint
from cellstill.train.devices import ACCELERATORS, PRECISIONS, on_device
from cellstill.train.loop import Loop, Minibatches
from cellstill.train.plans import Plan
from cellstill.train.progress import OnEpoch, reporting
from cellstill.train.run import Run, to_frame
from cellstill.train.shared import SharedLoop, end_together, start_together

Path = str | os.PathLike[str]


def fit(
    module: torch.nn.Module,
    train: Minibatches,
    validation: Minibatches | None = None,
    *,
    max_epochs: int,
    lr: float = 1e-3,
    own_lr: Mapping[str, float] | None = None,
    weight_decay: float = 0.0,
    kl_warmup: int | float | None = None,
    patience: int | None = 10,
    min_delta: float = 0.0,
    gradient_clip: float | None = None,
    precision: str = "32-true",
    accelerator: str = "auto",
    devices: int = 1,
    progress: bool | OnEpoch = False,
    phase: str | None = None,
    obs_names: Sequence[str] | None = None,
    checkpoint: Path | None = None,
    resume: bool = False,
) -> pd.DataFrame:
    """Train ``module`` and leave it in evaluation mode with its best weights, on the device where it was.

    Parameters
    ----------
    module
        Module with a ``loss`` (:class:`~cellstill.train.plans.Trainable`). Parts whose parameters are all frozen stay
        in the mode they are in.
    train, validation
        Minibatches, such as those of a :class:`~cellstill.data.CountsLoader`; on a GPU its counts move there if they
        fit. Without ``validation`` the training loss is monitored.
    max_epochs
        Most passes over the training cells; 0 trains nothing.
    lr, own_lr, weight_decay, kl_warmup
        See :class:`~cellstill.train.plans.Plan`. The best weights and ``patience`` count from the first epoch that
        starts after the warm-up.
    patience
        Epochs without a lower monitored loss before training stops; ``None`` trains for ``max_epochs``.
    min_delta
        Smallest fall of the monitored loss that counts. Larger stops sooner, and keeps the weights of the last epoch
        that fell so much.
    gradient_clip
        Largest norm of a step's gradient; ``None`` does not clip.
    precision
        ``"32-true"``, or ``"bf16-mixed"``: matrix products in bfloat16, weights and losses in float32. Faster on
        hardware that has it, with the last digits of the loss lost.
    accelerator
        ``"auto"`` (a CUDA device if there is one), ``"cpu"`` or ``"gpu"``.
    devices
        Devices to train on, each with a process of its own: GPUs of this machine, or processes of the CPU, which share
        its cores. With several machines, those of each. More are faster where a minibatch keeps each of them busy, and
        change the result no more than rounding does, but for what is drawn at random. See Notes.
    progress
        Show a progress bar, if stderr is a terminal; or a function, called as ``progress(phase, epoch, losses)`` after
        each epoch. Of several processes the first shows or calls it.
    phase
        Name of this training where there are several.
    obs_names
        Names of the cells by their position in the counts, for messages.
    checkpoint
        File that is written after each epoch, in one step that a crash does not interrupt: safetensors and JSON, no
        pickle. Of several processes the first reads and writes it.
    resume
        Go on from ``checkpoint`` if it exists. The run ends with the weights and losses, bit for bit, of one that was
        never interrupted, given the same module, data and settings on the same machine and number of threads; torch's
        random state is put back as well. On a GPU, where sums of gradients over cells may have no fixed order, it does
        to rounding. A finished run is returned as it ended.

    Returns
    -------
    One row per epoch: ``train_loss`` and, with ``validation``, ``validation_loss``; then the means of the loss's terms,
    if it has any. ``attrs["seconds"]`` holds the time of each epoch.

    Raises
    ------
    TrainingError
        A loss or gradient is not finite. The message names the epoch, minibatch, cells, and the term or parameter; the
        module is left with its best weights so far, or those of the last epoch whose numbers were finite. With several
        devices, all processes raise it; it also ends those whose partner failed in another way.
    StoreError
        ``checkpoint`` exists and ``resume`` is false, cannot be written, is damaged, or belongs to a run with another
        architecture, other data or other settings.
    InvalidArgumentError
        An argument is out of range; ``devices`` is more than there are, or than the processes that were started, or
        other processes cannot be started from here; the processes have other data, modules or settings.
    KeyboardInterrupt
        Training was interrupted; the module is left in evaluation mode.

    Notes
    -----
    With ``devices`` above 1, every process runs the same script, and calls ``fit`` with the same data, module and
    settings, which is checked. Start them with ``torchrun --nproc-per-node=<devices> script.py`` or with ``srun``, on
    one machine or several; or start the script alone: at the first call with several devices, Lightning Fabric starts
    the others, which run it from its beginning. That cannot be done from a notebook. What follows in the script runs in
    every process: ``torch.distributed.get_rank() == 0`` is true in the one that should write results.

    A minibatch, ``batch_size`` cells of all devices together, is cut into shares of consecutive cells, which differ by
    at most one cell. The gradient is the mean over the shares, weighted by their cells, so that each step, loss and
    stop is that of training on one device. What a module computes over a minibatch as a whole, such as batch
    normalisation, is computed over the share; buffers are those of the first process. Random numbers, such as those of
    dropout, are drawn apart for each share.

    Every process holds the data: its own copy of the counts in memory, unless they are mapped from a file, and on each
    GPU if they fit.
    """
    max_epochs = whole_number("max_epochs", max_epochs, least=0)
    patience = None if patience is None else whole_number("patience", patience, least=0)
    min_delta = at_least_zero("min_delta", min_delta)
    gradient_clip = None if gradient_clip is None else above_zero("gradient_clip", gradient_clip)
    check_option("accelerator", accelerator, ACCELERATORS)
    check_option("precision", precision, PRECISIONS)
    if resume and checkpoint is None:
        raise InvalidArgumentError("resume=True needs the checkpoint to go on from: give checkpoint=... as well.")
    if checkpoint is not None and os.path.exists(checkpoint) and not resume:
        raise StoreError(f"{checkpoint} exists. Pass resume=True to go on from it, or choose another checkpoint.")
    n_obs = len(train.cells) if hasattr(train, "cells") else None
    if obs_names is not None and hasattr(train, "counts") and len(obs_names) != train.counts.shape[0]:
        raise InvalidArgumentError(f"obs_names has {len(obs_names)} names; {train.counts.shape[0]} cells are counted.")
    plan = Plan(module, lr=lr, own_lr=own_lr, weight_decay=weight_decay, kl_warmup=kl_warmup, n_obs=n_obs)
    if max_epochs < 1:
        module.eval()
        return to_frame([], [])
    plan.plan_steps(max_epochs, len(train))
    loaders = {"training": train} if validation is None else {"training": train, "validation": validation}
    with on_device(module, accelerator, precision, devices) as (device, autocast, ranks):
        described: dict[str, Any] = {}
        if checkpoint is not None or ranks.size > 1:
            settings = {
                "max_epochs": max_epochs,
                "lr": lr,
                **({"own_lr": dict(own_lr)} if own_lr else {}),
                "weight_decay": weight_decay,
                "kl_warmup": kl_warmup,
                "patience": patience,
                "min_delta": min_delta,
                "gradient_clip": gradient_clip,
                "precision": precision,
                "devices": ranks.size,
                "compiled": kernels(device) is not None,
            }
            described = describe_run(module, loaders, settings)
        if device.type != "cpu":
            for loader in loaders.values():
                if hasattr(loader, "to"):
                    loader.to(device)
        optimizer = plan.configure_optimizers()
        how: dict[str, Any] = {"device": device, "autocast": autocast, "gradient_clip": gradient_clip}
        if ranks.size == 1:
            loop = Loop(plan, optimizer, train, validation, **how)
        else:
            start_together(ranks, module, described)
            loop = SharedLoop(plan, optimizer, train, validation, ranks=ranks, **how)
        first_counted = -(-plan.n_warmup // len(train))
        best = KeepBest("train_loss" if validation is None else "validation_loss", patience, first_counted, min_delta)
        run = Run(loop, loaders, best, max_epochs, obs_names, checkpoint, described)
        if resume:
            assert checkpoint is not None
            found = ranks.from_first(
                lambda: read_checkpoint(checkpoint, described) if os.path.exists(checkpoint) else None
            )
            if found is not None:
                run.go_on(found)
        try:
            watching = reporting(
                progress if ranks.is_first else False,
                phase,
                n_epochs=max_epochs,
                steps_per_epoch=len(train),
                start=len(run.epochs),
            )
            with watching as reporter, keeping_freed_memory():
                run.train(reporter)
        finally:
            module.eval()
        if ranks.size > 1:
            end_together(ranks, module)
    return run.history()


@contextmanager
def seeded(seed: int, accelerator: str = "auto") -> Iterator[None]:
    """Seed torch inside the block, and give the caller's random state back after it."""
    devices: list[Any] = list(range(torch.cuda.device_count())) if accelerator != "cpu" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
