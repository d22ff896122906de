"""What test_devices.py lets two processes do: every function is a run of training, whose end is written by rank.

Run as a script: ``on_two_ranks.py <folder> <name> [<name> ...]``.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch

from cellstill.data import CountsLoader
from cellstill.train import Loss, fit, loop, seeded

_spec = importlib.util.spec_from_file_location("parts", Path(__file__).with_name("conftest.py"))
parts = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(parts)

# The last minibatch has two cells, fewer than two for each process, and the others an odd number.
BATCH = 37


def rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def make_data(y=None):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 3)).astype(np.float32)
    return {"x": x, "y": x @ [1.0, -2.0, 0.5] + 3 + rng.normal(scale=0.1, size=200) if y is None else y}


def make_loaders(data, validation=range(150, 200)):
    return (
        CountsLoader(parts.COUNTS, data, indices=np.arange(150), shuffle=True, batch_size=BATCH),
        CountsLoader(parts.COUNTS, data, indices=np.array(validation), batch_size=7),
    )


class Exact(torch.nn.Module):
    """No random numbers; a parameter for a few cells only, and one that has no gradient; in float64."""

    global_parameters = frozenset({"scale"})

    def __init__(self) -> None:
        super().__init__()
        self.network = torch.nn.Sequential(torch.nn.Linear(3, 16), torch.nn.LayerNorm(16), torch.nn.Tanh())
        self.output = torch.nn.Linear(16, 1)
        self.scale = torch.nn.Parameter(torch.zeros(1))
        self.rare = torch.nn.Parameter(torch.ones(2))
        self.unused = torch.nn.Parameter(torch.ones(5))
        self.double()

    def loss(self, batch, kl_weight=1.0):
        hidden = self.network(batch["x"].double())
        fit = (self.output(hidden).squeeze(1) * self.scale.exp() - batch["y"]).square()
        kl = 0.01 * hidden.square().mean(dim=1)
        rare = batch["rows"] < 2
        if rare.any():
            fit = fit + torch.where(rare, self.rare.square().sum(), 0.0)
        per_cell = fit + kl_weight * kl
        terms = {"fit": fit.detach().sum(), "kl": kl.detach().sum()}
        return Loss(per_cell.mean(), per_cell.detach(), len(per_cell), terms)


def run(module, *loaders, settings, error=Exception):
    """Train, and tell what a process has afterwards."""
    settings = {"max_epochs": 4, "lr": 0.02, "weight_decay": 0.1, "gradient_clip": 2.0, "accelerator": "cpu"} | settings
    history = said = None
    try:
        history = fit(module, *loaders, **settings)
    except error as raised:
        said = f"{type(raised).__name__}: {raised}"
    return {
        "weights": {name: tensor.clone() for name, tensor in module.state_dict().items()},
        "history": history,
        "error": said,
        "follows": torch.rand(3),
        "training": module.training,
    }


def exact(folder, devices):
    """Everything that has to be as in one process; with one cell to validate on, and weights only of the first."""
    with seeded(rank()):
        return run(Exact(), *make_loaders(make_data(), [150]), settings={"kl_warmup": 7, "devices": devices})


def early_stop(folder, devices):
    data = make_data(np.random.default_rng(1).normal(size=200))
    with seeded(0):
        return run(
            Exact(), *make_loaders(data), settings={"max_epochs": 200, "lr": 0.1, "patience": 3, "devices": devices}
        )


def plain_minibatches(folder, devices):
    data = {name: torch.as_tensor(values) for name, values in make_data().items()} | {"rows": torch.arange(200)}
    batches = [{name: values[i : i + 29] for name, values in data.items()} for i in range(0, 200, 29)]
    with seeded(0):
        return run(Exact(), batches, settings={"devices": devices})


class Root(parts.Line):
    def loss(self, batch):
        # At 0 the root is 0 and its slope infinite.
        return super().loss(batch) + (self.linear.weight.sum() * batch["zero"]).abs().sqrt()


class Coupled(parts.Line):
    """A scalar loss that is not finite for any part of a minibatch after some steps."""

    def loss(self, batch, kl_weight=1.0):
        loss = super().loss(batch)
        return Loss(loss.mean() * (torch.nan if kl_weight == 0.75 else 1.0), None, len(loss))


def _not_finite(module, devices, per_check=1, validation=range(150, 200), kl_warmup=None, **changes):
    data = make_data() | {"zero": np.ones(200)}
    for name, (cells, value) in changes.items():
        data[name][cells] = value
    before = loop.steps_per_check
    # On a GPU a loss is looked at every 64 steps only.
    loop.steps_per_check = lambda device: per_check
    try:
        with seeded(0):
            return run(
                module(),
                *make_loaders(data, validation),
                settings={
                    "lr": 1e-4,
                    "devices": devices,
                    "kl_warmup": kl_warmup,
                    "obs_names": [f"cell-{i}" for i in range(200)],
                },
            )
    finally:
        loop.steps_per_check = before


def nan_loss(folder, devices):
    return _not_finite(parts.Line, devices, y=([17], np.nan))


def nan_loss_seen_late(folder, devices):
    return _not_finite(parts.Line, devices, 64, y=([17], np.nan))


def nan_loss_of_both(folder, devices):
    # Cells 58 and 120 are in the first minibatch of the first epoch, in two shares.
    return _not_finite(parts.Line, devices, y=(FIRST, np.inf))


FIRST = np.random.default_rng((0, 0)).permutation(np.arange(150))[[3, 30]]


def nan_gradient(folder, devices):
    return _not_finite(Root, devices, zero=([5], 0.0))


def nan_gradient_seen_late(folder, devices):
    return _not_finite(Root, devices, 64, zero=([5], 0.0))


def nan_of_all(folder, devices):
    return _not_finite(Coupled, devices, kl_warmup=8)


def nan_of_plain_minibatches(folder, devices):
    """Cells without a position: numbered within their minibatch, of which this one is in the second share."""
    data = {name: torch.as_tensor(values, dtype=torch.float32) for name, values in make_data().items()}
    data["y"][29 + 21] = torch.nan
    with seeded(0):
        module = parts.Line()
        batches = [{name: values[i : i + 29] for name, values in data.items()} for i in range(0, 200, 29)]
        return run(module, batches, settings={"devices": devices})


def nan_validation(folder, devices):
    return _not_finite(parts.Line, devices, y=([163], np.inf))


class Fails(parts.Line):
    """One process alone runs into an error, in its seventh step or in validation."""

    n = 0
    in_training = True

    def loss(self, batch):
        self.n += 1
        if rank() == 1 and (self.n > 6 if self.in_training else not self.training):
            raise ValueError("out of luck")
        return super().loss(batch)


class FailsInValidation(Fails):
    in_training = False


def failure(folder, devices):
    return _not_finite(Fails, devices)


def failure_seen_late(folder, devices):
    return _not_finite(Fails, devices, 64)


def failure_in_validation(folder, devices):
    return _not_finite(FailsInValidation, devices)


class StopError(Exception):
    """Interrupts a run between two epochs."""


def stop(phase, epoch, losses):
    if epoch == 1:
        raise StopError("here")


NOISY = {"max_epochs": 6, "kl_warmup": 9, "patience": None}


def noisy(folder, devices):
    with seeded(0):
        return run(parts.Noisy(), *make_loaders(make_data()), settings=NOISY | {"devices": devices})


def stopped(folder, devices):
    """Only the first process calls ``progress``."""
    settings = NOISY | {"devices": devices, "checkpoint": folder / "stopped", "progress": stop}
    with seeded(0):
        return run(parts.Noisy(), *make_loaders(make_data()), settings=settings)


def resumed(folder, devices, name="stopped", seed=50):
    settings = NOISY | {"devices": devices, "checkpoint": folder / name, "resume": True}
    # Other weights and other random numbers: everything has to come from the checkpoint.
    with seeded(seed + rank()):
        return run(parts.Noisy(), *make_loaders(make_data()), settings=settings)


def finished(folder, devices):
    return resumed(folder, devices, seed=60)


def resumed_after_a_kill(folder, devices):
    return resumed(folder, devices, "killed")


def not_resumed(folder, devices):
    settings = NOISY | {"devices": devices, "checkpoint": folder / "stopped"}
    return run(parts.Noisy(), *make_loaders(make_data()), settings=settings)


def other_settings(folder, devices):
    settings = NOISY | {"devices": devices, "checkpoint": folder / "stopped", "resume": True, "lr": 0.5}
    return run(parts.Noisy(), *make_loaders(make_data()), settings=settings)


def other_data(folder, devices):
    data = make_data()
    data["y"][0] += rank()
    return run(parts.Line(), *make_loaders(data), settings={"devices": devices})


def other_number(folder, devices):
    return run(parts.Line(), *make_loaders(make_data()), settings={"devices": 3})


class Draws(parts.Line):
    def __init__(self) -> None:
        super().__init__()
        self.drawn = []

    def loss(self, batch):
        self.drawn.append(torch.rand(()).item())
        return super().loss(batch)


def draws(folder, devices):
    with seeded(0):
        module = Draws()
        return run(module, *make_loaders(make_data()), settings={"devices": devices}) | {"drawn": module.drawn}


def killed(folder, devices):
    """Slow, for somebody to kill: says the number of processes after each epoch."""

    class Noisy(parts.Noisy):
        def loss(self, batch, kl_weight=1.0):
            time.sleep(0.05)
            return super().loss(batch, kl_weight)

    def say(phase, epoch, losses):
        print(epoch, torch.distributed.get_world_size(), flush=True)

    settings = NOISY | {"devices": devices, "checkpoint": folder / "killed", "progress": say}
    with seeded(0):
        return run(Noisy(), *make_loaders(make_data()), settings=settings)


ON_TWO = [
    *(exact, early_stop, plain_minibatches, draws),
    *(nan_loss, nan_loss_seen_late, nan_loss_of_both, nan_gradient, nan_gradient_seen_late, nan_of_all),
    *(nan_of_plain_minibatches, nan_validation, failure, failure_seen_late, failure_in_validation),
    *(noisy, stopped, resumed, finished, resumed_after_a_kill),
    *(not_resumed, other_settings, other_data, other_number),
]


def main() -> None:
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    for name in names:
        end = globals()[name](folder, 2)
        torch.save(end, folder / f"{name}-{rank()}.pt")
    if rank() == 0:
        print(os.getpid(), "has seen", torch.distributed.get_world_size(), "ranks")


if __name__ == "__main__":
    main()
