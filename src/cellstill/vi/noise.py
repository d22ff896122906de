"""Standard normal noise of cells, the same however many of them are visited at a time."""

from __future__ import annotations

import numpy as np
import torch

from cellstill.errors import whole_number

_ROWS = 128
"""Rows drawn at once. A generator fills arrays of other sizes with other numbers."""


class CellNoise:
    """Draws from posteriors of cells that depend on a seed and on the positions of the cells, and on nothing else.

    Parameters
    ----------
    seed
        Of all draws.
    """

    def __init__(self, seed: int) -> None:
        self.seed = whole_number("seed", seed, least=0)

    def draw(self, rows: slice, mean: torch.Tensor, variance: torch.Tensor, *what: int) -> torch.Tensor:
        """Draw from Normal(``mean``, ``variance``), both of shape ``(n, d)``.

        Parameters
        ----------
        rows
            Positions of the n cells.
        mean, variance
            Of the posterior.
        *what
            Numbers of what is drawn: draws of others are independent.
        """
        first, stop = rows.start // _ROWS, -(-rows.stop // _ROWS)
        parts = [self._rows(number, mean, what) for number in range(first, stop)]
        noise = parts[0] if len(parts) == 1 else torch.cat(parts)
        return mean + variance.sqrt() * noise[rows.start - first * _ROWS : rows.stop - first * _ROWS]

    def _rows(self, number: int, like: torch.Tensor, what: tuple[int, ...]) -> torch.Tensor:
        state = np.random.SeedSequence((self.seed, number, *what)).generate_state(1, np.uint64)[0]
        generator = torch.Generator(like.device).manual_seed(int(state >> 1))
        return torch.randn(_ROWS, like.shape[1], generator=generator, device=like.device, dtype=like.dtype)
