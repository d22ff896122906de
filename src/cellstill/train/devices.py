"""Where a module is trained, by how many processes and in which precision: Lightning Fabric knows the devices."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy

from cellstill.errors import InvalidArgumentError, check_option, whole_number
from cellstill.train.ranks import Ranks

ACCELERATORS = ("auto", "cpu", "gpu")
PRECISIONS = ("32-true", "bf16-mixed")

_LONGEST_WAIT = timedelta(days=1)
"""How long a process waits for the others: the first may compute something for all, such as a teacher."""


@contextmanager
def on_device(
    module: torch.nn.Module, accelerator: str, precision: str, devices: int = 1
) -> Iterator[tuple[torch.device, Callable[[], AbstractContextManager], Ranks]]:
    """Move a module to the device of this process inside the block, and back after it.

    Gives the device, what makes the context of a forward pass in the wanted precision, and the processes that train.
    """
    fabric, ranks = _join(accelerator, precision, devices)
    home = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    module.to(fabric.device)

    try:
        yield fabric.device, nullcontext if precision == "32-true" else fabric.autocast, ranks
    finally:
        module.to(home)


def chosen_device(accelerator: str, device: int | str = "auto") -> torch.device:
    """Device by the names that scvi-tools gives to ``load``.

    Parameters
    ----------
    accelerator
        ``"cpu"``, ``"gpu"``, or ``"auto"``: a CUDA device if there is one.
    device
        Number of the CUDA device; ``"auto"`` is the current one.

    Raises
    ------
    InvalidArgumentError
        There is no such device.
    """
    check_option("accelerator", accelerator, ACCELERATORS)
    n_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if accelerator == "cpu" or (accelerator == "auto" and not n_devices):
        return torch.device("cpu")
    index = (torch.cuda.current_device() if n_devices else 0) if device == "auto" else device
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < n_devices:
        raise InvalidArgumentError(
            f"accelerator={accelerator!r}, device={device!r}: this machine has {n_devices} CUDA devices. Give the "
            "number of one of them, from 0, or use accelerator='cpu'."
        )
    return torch.device("cuda", index)


def join(accelerator: str, devices: int) -> Ranks:
    """Start the processes that train on several devices, unless they run already.

    Parameters
    ----------
    accelerator, devices
        See :func:`~cellstill.train.fit.fit`.

    Raises
    ------
    InvalidArgumentError
        ``devices`` is below 1, is not the number of processes that were started, or they cannot be started from here.
    """
    check_option("accelerator", accelerator, ACCELERATORS)
    return _join(accelerator, "32-true", devices)[1]


def _join(accelerator: str, precision: str, devices: int) -> tuple[Fabric, Ranks]:
    devices = whole_number("devices", devices, least=1)
    if accelerator == "auto":
        # Lightning would choose Apple's GPU, which lacks operations that are needed.
        accelerator = "gpu" if torch.cuda.is_available() else "cpu"
    if accelerator == "gpu" and torch.cuda.device_count() < devices:
        raise InvalidArgumentError(
            f"accelerator='gpu', devices={devices}: torch finds {torch.cuda.device_count()} CUDA devices. Use as many "
            "at most, or accelerator='cpu'."
        )
    if devices == 1:
        with _quiet_lightning():
            return Fabric(accelerator=accelerator, devices=1, precision=precision), Ranks()
    if hasattr(sys, "ps1") or sys.flags.interactive:
        raise InvalidArgumentError(
            f"devices={devices} needs a process for each, which runs the same script: that cannot be started from a "
            "notebook or an interactive session. Write a script, or use devices=1."
        )
    n_machines = _n_machines()
    with _quiet_lightning():
        fabric = Fabric(
            accelerator=accelerator,
            devices=devices,
            num_nodes=n_machines,
            strategy=DDPStrategy(timeout=_LONGEST_WAIT),
            precision=precision,
        )
        size = devices * n_machines
        environment = fabric.strategy.cluster_environment
        if not environment.creates_processes_externally:
            _check_script(devices)
        elif environment.world_size() != size:
            raise InvalidArgumentError(
                f"devices={devices} on {n_machines} machine(s), and {environment.world_size()} processes were started. "
                "Start as many as there are devices: torchrun --nproc-per-node, or srun --ntasks-per-node."
            )
        fabric.launch()
    found = torch.distributed.get_world_size()
    if found != size:
        raise InvalidArgumentError(
            f"devices={devices}, and {found} processes train together already. Use the same number throughout."
        )
    return fabric, Ranks(fabric.global_rank, size)


def _n_machines() -> int:
    """Machines that torchrun or srun started processes on."""
    if "LOCAL_WORLD_SIZE" in os.environ and "WORLD_SIZE" in os.environ:
        return max(int(os.environ["WORLD_SIZE"]) // int(os.environ["LOCAL_WORLD_SIZE"]), 1)
    return int(os.environ.get("SLURM_NNODES", 1)) if "SLURM_PROCID" in os.environ else 1


def _check_script(devices: int) -> None:
    """Fabric starts the other processes with the command of this one, which has to be a script or a module."""
    main = sys.modules["__main__"]
    if getattr(main, "__spec__", None) is None and not os.path.isfile(sys.argv[0]):
        raise InvalidArgumentError(
            f"devices={devices} needs a process for each, which runs the same script, and {sys.argv[0]!r} is not a "
            "file. Run a script or a module, or start the processes with torchrun."
        )


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
