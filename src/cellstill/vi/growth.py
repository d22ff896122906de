"""A trained module that takes up new categories: its tables grow by rows, and only these learn."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import cast

import torch

from cellstill.vi.ambient import ProfileBackground
from cellstill.vi.module import RegularizedVAE

Rows = Mapping[str, int]
"""Rows of parameters, by name, that belong to categories known before; those after them are new."""

_OF_DATA = (".background.", ".library.group_")


def grow(reference: RegularizedVAE, started: RegularizedVAE, told: Collection[str]) -> Rows:
    """Put a trained module into one with more categories.

    What is known stays as it was, bit for bit. New rows of backgrounds and library priors stay where the data of their
    categories started them; those of everything else, which is learned from counts, become the mean of the known rows.

    Parameters
    ----------
    reference
        Trained module.
    started
        Module with the reference's categories first, started from the new data; filled in place.
    told
        Modalities that the new data have. Of the others, all new rows become the mean of the known rows.

    Returns
    -------
    Known rows of each parameter that has grown.
    """
    of_data: list[str] = []
    done: list[str] = []
    for i, name in enumerate(started.config.modalities):
        old, new = reference.modality(name), started.modality(name)
        if name in told:
            of_data += [f"modalities.{i}{part}" for part in _OF_DATA]
            # Library sizes of new cells are in the unit of the reference.
            log_unit = new.library.center - old.library.center
            new.library.shift(log_unit)
            if new.background is not None:
                new.background.shift(-log_unit)
        if isinstance(new.background, ProfileBackground):
            new.background.take_over(cast(ProfileBackground, old.background), told=name in told)
            done.append(f"modalities.{i}.background.")
    known = reference.state_dict()
    known_rows: dict[str, int] = {}
    learned = dict(started.named_parameters())
    with torch.no_grad():
        for name, tensor in started.state_dict().items():
            if name.startswith(tuple(done)):
                continue
            values = known[name].to(tensor)
            if values.shape == tensor.shape:
                tensor.copy_(values)
                continue
            n = len(values)
            if not name.startswith(tuple(of_data)):
                tensor[n:] = values.float().mean(dim=0)
            tensor[:n] = values
            if name in learned:
                known_rows[name] = n
    return known_rows


def freeze(module: RegularizedVAE, known_rows: Rows) -> None:
    """Let only parameters with new rows require gradients."""
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in known_rows)


@contextmanager
def holding(module: RegularizedVAE, known_rows: Rows | None) -> Iterator[None]:
    """Keep known rows as they are, bit for bit, while the block trains the new ones."""
    parameters = dict(module.named_parameters())
    kept = {name: parameters[name][:n].detach().clone() for name, n in (known_rows or {}).items()}
    handles = [parameters[name].register_hook(_without(n)) for name, n in (known_rows or {}).items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        with torch.no_grad():
            # Weight decay moves rows that have no gradient.
            for name, values in kept.items():
                parameters[name][: len(values)] = values.to(parameters[name])


def _without(n: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def hook(gradient: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.zeros_like(gradient[:n]), gradient[n:]])

    return hook
