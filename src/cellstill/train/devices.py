"""Where a module is trained and in which precision: Lightning Fabric knows the devices."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from lightning.fabric import Fabric


@contextmanager
def on_device(
    module: torch.nn.Module, accelerator: str, precision: str
) -> Iterator[tuple[torch.device, Callable[[], AbstractContextManager]]]:
    """Move a module to the device inside the block, and back after it.

    Gives the device, and what makes the context of a forward pass in the wanted precision.
    """
    if accelerator == "auto":
        # Lightning would choose Apple's GPU, which lacks operations that are needed.
        accelerator = "gpu" if torch.cuda.is_available() else "cpu"
    with _quiet_lightning():
        fabric = Fabric(accelerator=accelerator, devices=1, precision=precision)
    home = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    module.to(fabric.device)

    try:
        yield fabric.device, nullcontext if precision == "32-true" else fabric.autocast
    finally:
        module.to(home)


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*was available but not used.*")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
