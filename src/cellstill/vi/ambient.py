"""Ambient RNA as a share of the counts: a rate and a profile for each combination of categories."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from cellstill.nn.composition import SparseComposition
from cellstill.vi.parts import Codes

_SHAPE, _FLOOR = 0.5, 1e-3
_LOWEST_RATE = 1e-6


class ProfileBackground(nn.Module):
    r"""Additive background that is soup: a share of the counts, composed like the cells it comes from.

    .. math:: b_{ef} = r_e\, T\, \chi_{ef}

    with the rate r of a combination of categories, the composition :math:`\chi` of its cells, and the total expression
    T. Likelihood alone does not tell background from low expression, since a decoder can paint both. Here the rate
    comes from genes that some cells lack (:func:`~cellstill.vi.soup.estimate_soup`), the profile is the mean expression
    of the combination's cells, and native expression pays for being small but not zero (:attr:`native_prior`). None
    of the soup is learned: the rate would grow wherever the decoder has not yet reached what cells express, and the
    composition would take up what differs between batches.

    One row stands for each category of the ambient column; where there are several columns, for each combination of
    their categories that cells have, and one more, the last, for all combinations that none has. Without any column
    all cells share one row.

    Parameters
    ----------
    categories
        Number of categories of each ambient column.
    n_vars
        Features.

    Attributes
    ----------
    combinations
        Codes of the columns, shape ``(n_combinations, n_columns)``.
    rate, interval, identified
        What counts say of the rate, shapes ``(n_rows,)``, ``(n_rows, 2)``, ``(n_rows,)``; the rate is what the model
        starts from, also where counts do not identify it.
    expected
        Log background, shape ``(n_rows, n_vars)``.
    typical
        Mean expression of each feature, the unit of native expression in its penalty.
    """

    combinations: torch.Tensor
    rate: torch.Tensor
    interval: torch.Tensor
    identified: torch.Tensor
    expected: torch.Tensor
    typical: torch.Tensor

    def __init__(self, categories: Mapping[str, int], n_vars: int) -> None:
        super().__init__()
        self.columns, self.sizes = list(categories), list(categories.values())
        self.n_vars = n_vars
        if len(self.columns) == 1:
            self._set_combinations(torch.arange(self.sizes[0])[:, None])
        else:
            self._set_combinations(torch.empty(0 if self.columns else 1, len(self.columns), dtype=torch.int64))
        self.register_buffer("typical", torch.ones(n_vars))

    def _set_combinations(self, combinations: torch.Tensor) -> None:
        n = len(combinations) + (len(self.columns) > 1)
        self.register_buffer("combinations", combinations)
        self.register_buffer("rate", torch.full((n,), 0.1))
        self.register_buffer("interval", torch.tensor([[0.0, 1.0]]).repeat(n, 1))
        self.register_buffer("identified", torch.zeros(n, dtype=torch.bool))
        self.register_buffer("expected", torch.full((n, self.n_vars), math.log(1e-2)))

    def occur(self, codes: Mapping[str, np.ndarray], known: torch.Tensor | None = None) -> None:
        """Make a row for each combination of categories that cells have, after those ``known`` before."""
        if len(self.columns) < 2:
            return
        first = np.empty((0, len(self.columns)), dtype=np.int64) if known is None else known.cpu().numpy()
        found = np.unique(np.stack([codes[column] for column in self.columns], axis=1), axis=0)
        before = set(map(tuple, first.tolist()))
        new = [row for row in found.tolist() if tuple(row) not in before]
        rows = np.concatenate([first, np.array(new, dtype=np.int64).reshape(-1, len(self.columns))])
        self._set_combinations(torch.from_numpy(rows))

    def extra_repr(self) -> str:
        """The rates, which no part of it shows."""
        return "rate=" + ", ".join(f"{rate:.6g}" for rate in self.rate.tolist())

    def forward(self, codes: Codes) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Log background by group and feature, and the group of each cell."""
        if not self.columns:
            return self.expected, None
        group = self.rows_of([codes[column] for column in self.columns])
        if len(self.columns) == 1 or len(self.expected) <= len(group):
            return self.expected, group
        return self.expected.index_select(0, group), torch.arange(len(group), device=group.device)

    def rows_of(self, codes: Sequence[torch.Tensor]) -> torch.Tensor:
        """Row of each cell, from its code of each column."""
        if len(codes) == 1:
            return codes[0]
        if not len(self.combinations):
            return torch.zeros_like(codes[0])
        known, order = self._joint(self.combinations.unbind(dim=1)).sort()
        joint = self._joint(codes)
        place = torch.searchsorted(known, joint).clamp(max=len(known) - 1)
        return torch.where(known[place] == joint, order[place], len(known))

    def _joint(self, codes: Sequence[torch.Tensor]) -> torch.Tensor:
        joint = codes[0]
        for code, size in zip(codes[1:], self.sizes[1:], strict=True):
            joint = joint * size + code
        return joint

    def rows_of_cells(self, codes: Mapping[str, np.ndarray], n_obs: int) -> np.ndarray:
        """Row of each of ``n_obs`` cells, as an array."""
        if not self.columns:
            return np.zeros(n_obs, dtype=np.int64)
        return self.rows_of([torch.from_numpy(codes[column]) for column in self.columns]).numpy()

    def tables(self) -> list[torch.Tensor]:
        """Log background of the combinations, in a list as that of a free background."""
        return [self.expected[: len(self.combinations)]]

    def set_rate(self, rate: np.ndarray, interval: np.ndarray, identified: np.ndarray) -> None:
        """Set the rates, before :meth:`start`."""
        self.rate.copy_(torch.from_numpy(rate))
        self.interval.copy_(torch.from_numpy(interval))
        self.identified.copy_(torch.from_numpy(identified))

    def start(self, expression: np.ndarray) -> None:
        """Set the background to its share of each row's mean expression, rows x features."""
        rate = self.rate.clamp(min=_LOWEST_RATE)
        self.expected.copy_((rate[:, None] * torch.from_numpy(expression)).log())

    def shift(self, log_factor: torch.Tensor) -> None:
        """Multiply the expected background of all rows."""
        self.expected += log_factor

    def take_over(self, before: ProfileBackground, *, told: bool) -> None:
        """Copy what was known before, bit for bit.

        Parameters
        ----------
        before
            Background whose combinations are the first ones here.
        told
            Whether the new rows were started from data. Otherwise they become the mean of the known ones, and their
            rates are not identified.
        """
        n, several = len(before.combinations), len(self.columns) > 1
        for name in ("rate", "interval", "identified", "expected"):
            own, known = getattr(self, name), getattr(before, name).to(getattr(self, name))
            if several:
                own[-1] = known[-1]
            if not told and name in ("rate", "expected"):
                own[n : len(self.combinations)] = known[:n].mean(dim=0)
            own[:n] = known[:n]
        self.typical.copy_(before.typical)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # How many combinations there are is not in the configuration.
        combinations = state_dict.get(f"{prefix}combinations")
        if len(self.columns) > 1 and combinations is not None and combinations.ndim == 2:
            device = self.typical.device
            self._set_combinations(torch.zeros_like(combinations, device=device))
            self.to(device)
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def native_prior(self) -> SparseComposition:
        r"""Prior of native expression: its share of the cell, over that of the mean cell, is Gamma(0.5, 0.5)."""
        return SparseComposition(self.typical, _SHAPE, _SHAPE, _FLOOR)
