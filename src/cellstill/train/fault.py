"""Where training left the finite numbers, in words."""

from __future__ import annotations

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


def listed(names: Sequence[str]) -> str:
    """Names with quotes, the first few."""
    more = f" and {len(names) - _N_SHOWN} more" if len(names) > _N_SHOWN else ""
    return ", ".join(map(repr, names[:_N_SHOWN])) + more
