"""All that changes while a module is trained: to go back to it, or to go on from it elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

_EPOCH = "epoch"


@dataclass(frozen=True)
class State:
    """A copy of everything that changes, taken between two epochs.

    Attributes
    ----------
    weights
        Trained parameters and buffers, by name.
    moments
        What the optimiser remembers of each parameter, as ``<parameter>/<name>``; empty before the first step.
    rng
        States of torch's generators, by device; in a checkpoint of several processes, those of all.
    epochs
        Next epoch of each loader that shuffles, by its role.
    """

    weights: dict[str, torch.Tensor]
    moments: dict[str, torch.Tensor]
    rng: dict[str, torch.Tensor]
    epochs: dict[str, int]


def take_state(
    module: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    loaders: Mapping[str, Any],
    into: State | None = None,
) -> State:
    """Copy the state of a training run; ``into`` gives the memory of an older copy, which is then no longer valid."""
    moments = {
        f"{name}/{key}": value
        for name, parameter in module.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    epochs = {role: loader.epoch for role, loader in loaders.items() if hasattr(loader, _EPOCH)}
    weights = copy_weights(module, into.weights if into else None)
    return State(weights, _copy(moments, into.moments if into else None), take_rng(module), epochs)


def put_state(
    state: State, module: torch.nn.Module, optimizer: torch.optim.Optimizer, loaders: Mapping[str, Any]
) -> None:
    """Go back, or on, to a state."""
    put_weights(module, state.weights)
    optimizer.state.clear()
    for name, parameter in module.named_parameters():
        remembered = {key: value for key, value in state.moments.items() if key.rpartition("/")[0] == name}
        for key, value in remembered.items():
            optimizer.state[parameter][key.rpartition("/")[2]] = value.to(parameter.device, copy=True)
    for role, epoch in state.epochs.items():
        setattr(loaders[role], _EPOCH, epoch)
    put_rng(state.rng)


def put_rng(rng: Mapping[str, torch.Tensor]) -> None:
    """Go back, or on, to states of the random generators."""
    for device, generator in rng.items():
        if device == "cpu":
            torch.set_rng_state(generator)
        else:
            torch.cuda.set_rng_state(generator, device)


def join_rng(each: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Put the states of several processes' generators under one name each: those of the first under their own."""
    return {
        f"{rank}/{device}" if rank else device: generator
        for rank, rng in enumerate(each)
        for device, generator in rng.items()
    }


def rng_of(joined: Mapping[str, torch.Tensor], rank: int) -> dict[str, torch.Tensor]:
    """Take one process's states out of what :func:`join_rng` made."""
    named = ((*name.rpartition("/")[::2], generator) for name, generator in joined.items())
    return {device: generator for owner, device, generator in named if owner == (str(rank) if rank else "")}


def copy_weights(module: torch.nn.Module, into: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """Copy what training changes; ``into`` as in :func:`take_state`."""
    return _copy(dict(changing(module)), into)


def put_weights(module: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Write copied weights into the module."""
    with torch.no_grad():
        for name, tensor in changing(module):
            tensor.copy_(weights[name])


def changing(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters that are trained, and buffers, by name; parameters that are frozen stay what they are."""
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            yield name, parameter
    yield from module.named_buffers()


def _copy(tensors: dict[str, torch.Tensor], into: dict[str, torch.Tensor] | None) -> dict[str, torch.Tensor]:
    # New memory costs three times as much as the copy itself.
    if not into or into.keys() != tensors.keys():
        return {name: tensor.detach().clone() for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        into[name].copy_(tensor.detach())
    return into


def take_rng(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copy the states of torch's generators on the CPU and on the module's devices, by device."""
    rng = {"cpu": torch.get_rng_state()}
    for device in {parameter.device for parameter in module.parameters()}:
        if device.type == "cuda":
            rng[str(device)] = torch.cuda.get_rng_state(device)
    return rng
