"""Where training left the finite numbers, in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_N_SHOWN = 3


@dataclass(frozen=True)
class Fault:
    """Where training left the finite numbers.

    Attributes
    ----------
    split
        ``"train"`` or ``"validation"``.
    batch
        Number of the minibatch in its epoch, from 0.
    what
        What is not finite.
    cells
        Positions of its cells (``batch["rows"]``); if some are to blame by themselves, only those.
    alone
        They are to blame by themselves, and others of the minibatch are not.
    """

    split: str
    batch: int
    what: str
    cells: list[int]
    alone: bool

    def sentence(self, epoch: int, names: Sequence[str] | None) -> str:
        """Say it, with the names of cells if they are known."""
        shown = ", ".join(
            f"{cell} ({str(names[cell])!r})" if names is not None else str(cell) for cell in self.cells[:_N_SHOWN]
        )
        more = f" and {len(self.cells) - _N_SHOWN} more" if len(self.cells) > _N_SHOWN else ""
        whose = "because of" if self.alone else "for all of"
        return f"{self.what} in epoch {epoch}, batch {self.batch} of {self.split}, {whose} its cells {shown}{more}."


def what_is_not_finite(split: str, total: float, terms: Sequence[str], gradients: Sequence[str] = ()) -> str:
    """Say which of a mean loss, its terms and, where all of these are finite, its gradients is not finite."""
    loss = f"{split}_loss is {total:g}"
    if not math.isfinite(total):
        return loss + (f" (term {listed(terms)})" if terms else "")
    if terms:
        return f"{loss}, but its term {listed(terms)} is not finite,"
    return f"The gradient of {listed(gradients)} is not finite while {loss}"


def listed(names: Sequence[str]) -> str:
    """Names with quotes, the first few."""
    more = f" and {len(names) - _N_SHOWN} more" if len(names) > _N_SHOWN else ""
    return ", ".join(map(repr, names[:_N_SHOWN])) + more
